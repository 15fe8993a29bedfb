"""Speed and memory of a training step, beside the same step on torch's own modules and beside its floor.

    python bench.py                                  # both tables; about a quarter of an hour on two cores
    python bench.py --settings small ptb-lstm --tables 1 --rounds 5
    python bench.py --device cuda --json bench.json  # also all raw times
    python bench.py --profile ptb-qrnn               # where one step of ours spends its time

ours: `train.train_step` on a run as main.py starts it, with the published command's dropouts, regularisation,
    clipping and optimizer, on text drawn from Zipf's law, in batches of just bptt rows (bench_work.py).
plain: the same on torch's `nn.LSTM`, `F.dropout`, `F.linear`, `F.cross_entropy`; a QRNN as a loop (plain.py).
floor: the step's matrix products alone, `torch.mm` over all bptt x batch rows at once (plain.py). An LSTM
    cannot reach it: its recurrent products have to wait for each other.

Each of them is a process of its own, started afresh, that sleeps until it is told to do a step. They take
turns, a step each, round after round, so that a machine that slows down slows all three. The first two rounds
warm up and are discarded; times are medians over the others (lowest-highest). ours and the floor keep freed
memory, as main.py does (utils.keep_freed_memory); plain runs as torch comes. On a CUDA device times are read
from events, the device being idle before and after.

Peak memory is a process's high-water mark: on the CPU resident memory, interpreter and libraries included; on
a CUDA device `torch.cuda.max_memory_allocated`. The three processes of wt103-qrnn take 17 GB together.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import corpus_cache
import options
from bench_work import (
    SETTINGS,
    Worker,
    evaluation_sizes,
    ours,
    own_environment,
    pointer_sizes,
    setting,
    write_corpus,
)
from data import SPLITS, read_corpus
from utils import RunError, UserError, check_writable, run_script

ROOT = Path(__file__).parent
VARIANTS = ("ours", "plain", "floor")
# Seconds for the rounds of a setting, and of a group of rows in table 2, unless --rounds says how many.
STEPS_BUDGET_S, OTHERS_BUDGET_S = 45, 15
WARM_UP_ROUNDS = 2  # the memory that a process keeps has its final size after the second step


def alternate(
    title: str, works: dict[str, Callable[[], float]], rounds: int, budget_s: float
) -> dict[str, list[float]]:
    """All works in turn, round after round, first to warm up: milliseconds, a value a round.

    `rounds` 0: as many as `budget_s` allows, 2 to 15.
    """

    def one_round(label: str) -> dict[str, float]:
        found = {name: work() for name, work in works.items()}
        figures = ", ".join(f"{name} {ms:,.1f} ms" for name, ms in found.items())
        print(f"{title}: {label}: {figures}", file=sys.stderr, flush=True)
        return found

    for _ in range(WARM_UP_ROUNDS):
        begin = time.perf_counter()
        one_round("warm-up, discarded")
        round_s = time.perf_counter() - begin
    rounds = rounds or min(15, max(2, round(budget_s / round_s)))
    found = [one_round(f"round {i} of {rounds}") for i in range(1, rounds + 1)]
    return {name: [times[name] for times in found] for name in works}


def bench_steps(names: list[str], device: str, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Table 1, raw: an entry a setting."""
    for name in names:
        ntoken, args = setting(name, tiny)
        with contextlib.ExitStack() as stack:
            workers = {kind: stack.enter_context(Worker(kind, name, device, tiny)) for kind in VARIANTS}
            works = {kind: partial(worker.ask, "step") for kind, worker in workers.items()}
            times = alternate(name, works, rounds, STEPS_BUDGET_S)
            peaks = {kind: worker.finish() for kind, worker in workers.items()}
        yield {
            "setting": name,
            "vocabulary": ntoken,
            "args": args,
            "tokens": args["batch_size"] * args["bptt"],
            "ms": times,
            "median_ms": {kind: statistics.median(ms) for kind, ms in times.items()},
            "peak_bytes": peaks,
        }


def bench_others(device: str, tiny: bool, rounds: int, data: str | None) -> Iterator[dict[str, Any]]:
    """Table 2, raw: an entry a row."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        works, tokens = {}, {}
        for name in ("ptb-lstm", "ptb-qrnn"):
            worker = stack.enter_context(Worker("evaluation", name, device, tiny))
            for split, (columns, size) in evaluation_sizes(tiny).items():
                row = f"{name}, batch size {columns}"
                works[row], tokens[row] = partial(worker.ask, split), size - columns
        yield from measured("evaluation", works, rounds, tokens)

        works, tokens = {}, {}
        worker = stack.enter_context(Worker("pointer", "-", device, tiny))
        for window, size in pointer_sizes(tiny).items():
            row = f"window {window}, without the model"
            works[row], tokens[row] = partial(worker.ask, str(window)), size
        yield from measured("pointer", works, rounds, tokens)

        folder = Path(scratch)
        write_corpus(folder / "tiny", tokens=1000, ntoken=50)
        flags = ["--data", folder / "tiny", "--save", folder / "m.pt", "--device", device, "--max_steps", 1]
        flags += ["--emsize", 8, "--nhid", 12, "--nlayers", 1, "--batch_size", 4, "--log-interval", 1]
        works = {
            "main.py --help": partial(script_ms, "--help", until="usage"),
            "main.py, a toy's first step": partial(script_ms, *flags, until="| epoch"),
        }
        yield from measured("start-up", works, rounds, {})

        if data is None:
            write_corpus(folder / "text", tokens=3_000 if tiny else 2_000_000, ntoken=33_278)
        reading = Reading(Path(data or folder / "text"), folder / "copy", device)
        size = reading.tokens()
        works = {"first time": reading.first, "from its cache": reading.again}
        yield from measured("reading a corpus", works, rounds, dict.fromkeys(works, size))


def measured(
    title: str, works: dict[str, Callable[[], float]], rounds: int, tokens: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Entries of table 2; `tokens`: how many one call works on, where that has a meaning."""
    for name, ms in alternate(title, works, rounds, OTHERS_BUDGET_S).items():
        yield {
            "what": f"{title}: {name}",
            "tokens": tokens.get(name),
            "ms": ms,
            "median_ms": statistics.median(ms),
        }


class Reading:
    """A corpus read by a fresh process: a copy of it that has no cache yet, and once more with its cache."""

    def __init__(self, text: Path, copy: Path, device: str) -> None:
        self.text, self.copy, self.device = text, copy, device

    def fresh_copy(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.mkdir()
        for split in SPLITS:
            shutil.copy(self.text / f"{split}.txt", self.copy)
        time.sleep(corpus_cache.RACY)  # a cache trusts no younger text without reading it again

    def tokens(self) -> int:
        self.fresh_copy()
        corpus = read_corpus(str(self.copy))
        return len(corpus.train) + len(corpus.valid) + len(corpus.test)

    def first(self) -> float:
        self.fresh_copy()
        return self.again()

    def again(self) -> float:
        with Worker("reading", str(self.copy), self.device, tiny=False) as worker:
            return worker.ask("read")


def script_ms(*flags: object, until: str) -> float:
    """Milliseconds from the start of main.py, a fresh process, to its first line that begins with `until`."""
    command = [sys.executable, "-u", ROOT / "main.py", *map(str, flags)]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own_environment()) as process:
        times = [time.perf_counter() for line in process.stdout if line.startswith(until)]
    if process.returncode or not times:
        raise RunError(f"main.py ended with status {process.returncode}; see above")
    return (times[0] - begin) * 1000


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), cpu)
    return {
        "machine": cpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load average before": round(os.getloadavg()[0], 2),
    }


def spread(values: list[float], unit: float = 1.0) -> str:
    """Median (lowest-highest), to three or four digits."""
    shown = [value / unit for value in (statistics.median(values), min(values), max(values))]
    digits = 0 if shown[0] >= 100 else 1 if shown[0] >= 10 else 3
    middle, lowest, highest = (f"{value:,.{digits}f}" for value in shown)
    return f"{middle} ({lowest}-{highest})"


def table(header: list[str], body: list[list[str]]) -> str:
    """Markdown, its columns aligned: the first to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in [header, rule, *body])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps_table(entries: list[dict[str, Any]]) -> str:
    """Table 1."""
    header = [
        "setting",
        "ours, ms a step",
        "ours, tokens/s",
        "plain, ms",
        "floor, ms",
        "ours / floor",
        "plain / ours",
    ]
    header += ["peak of ours, GB", "peak of plain, GB"]
    body = []
    for entry in entries:
        args, ms, median, peak = entry["args"], entry["ms"], entry["median_ms"], entry["peak_bytes"]
        size = (
            f"{args['model']} {args['emsize']}-{args['nhid']} x {args['nlayers']}, V {entry['vocabulary']:,}"
        )
        body.append(
            [
                f"{entry['setting']}: {size}, {args['batch_size']} x {args['bptt']}, {args['optimizer']}",
                spread(ms["ours"]),
                f"{entry['tokens'] / median['ours'] * 1000:,.0f}",
                spread(ms["plain"]),
                spread(ms["floor"]),
                f"{median['ours'] / median['floor']:.2f}",
                f"{median['plain'] / median['ours']:.2f}",
                f"{peak['ours'] / 1e9:.2f}",
                f"{peak['plain'] / 1e9:.2f}",
            ]
        )
    return table(header, body)


def others_table(entries: list[dict[str, Any]]) -> str:
    """Table 2."""
    body = [
        [
            entry["what"],
            f"{entry['tokens']:,}" if entry["tokens"] else "",
            spread(entry["ms"], unit=1000),
            f"{entry['tokens'] / entry['median_ms'] * 1000:,.0f}" if entry["tokens"] else "",
        ]
        for entry in entries
    ]
    return table(["what", "tokens", "seconds", "tokens/s"], body)


def profile(name: str, tiny: bool, device: torch.device) -> str:
    """torch's profile of one step of ours, once its memory has settled."""
    step = ours(name, tiny, device)["step"]
    for _ in range(WARM_UP_ROUNDS):
        step()
    with torch.profiler.profile() as profiler:
        step()
    key = f"self_{device.type}_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60)


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="rows of table 1"
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        type=int,
        choices=[1, 2],
        default=[1, 2],
        help="1: training steps; 2: evaluation, pointer, start-up, reading a corpus (default: both)",
    )
    parser.add_argument(
        "--rounds",
        type=options.count,
        default=0,
        help="of each row (default: 2 to 15, as time allows)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--data", default=None, help="the corpus to read for table 2 (default: 2.5 M made-up tokens)"
    )
    parser.add_argument("--json", default=None, help="also write all raw times to this file")
    parser.add_argument("--profile", choices=SETTINGS, default=None, help="only profile one step of ours")
    parser.add_argument("--tiny", action="store_true", default=False, help="toy sizes: does it run?")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no such device here; use --device cpu")
    if args.profile:
        print(profile(args.profile, args.tiny, device))
        return
    if args.json:
        check_writable(args.json, "--json")
    missing = [split for split in SPLITS if args.data and not Path(args.data, f"{split}.txt").is_file()]
    if missing:
        raise UserError(f"--data {args.data}: has no {missing[0]}.txt; give a folder with all three splits")
    facts, steps, others = machine(device), [], []
    facts_line = "  ".join(f"{name}: {value}" for name, value in facts.items())
    if 1 in args.tables:
        steps += bench_steps(args.settings, args.device, args.tiny, args.rounds)
        print(f"{facts_line}\n\n{steps_table(steps)}\n", flush=True)
    if 2 in args.tables:
        others += bench_others(args.device, args.tiny, args.rounds, args.data)
        print(f"{facts_line}\n\n{others_table(others)}", flush=True)
    if args.json:
        found = {"machine": facts, "steps": steps, "others": others}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
