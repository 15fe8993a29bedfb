"""Speed and memory of a training step, compared with the same step on torch's modules and with its floor.

    python bench.py                                  # both tables; about half an hour on two cores
    python bench.py --settings small ptb-lstm --tables 1 --rounds 5
    python bench.py --device cuda --json bench.json  # also all raw times
    python bench.py --peers                          # also fastai's AWD_LSTM, see benchmarks/peers.py
    python bench.py --profile ptb-qrnn               # the profile of one step of ours, and its number of kernels
    python bench.py --fastest ptb-qrnn               # the flags of main.py that are fastest on this GPU

ours: `train.train_step` on a run as main.py starts it, with the published command's dropouts, regularisation,
    clipping and optimizer, on text drawn from Zipf's law, in batches of exactly bptt rows; bf16: with --amp bf16,
    if the processor has bfloat16; graphs: with --graphs --padded, on a GPU.
plain: the same on torch's `nn.LSTM`, `nn.GRU`, `F.dropout`, `F.linear`, `F.cross_entropy`; QRNN, Mogrifier and RLSTM
    are loops over time.
floor: the step's matrix products alone, over all bptt x batch rows at once, each by the fastest library. An
    LSTM cannot reach it: its recurrent products have to wait for each other.

Each of them runs in a new process. They take turns, one step each, round after round, so that a machine that slows
down slows all of them. The first rounds warm up and are discarded. Times are medians over the other rounds (lowest-
highest). Peak memory is the most that a process has had: on the CPU resident memory, with interpreter and libraries;
on a CUDA device `torch.cuda.max_memory_allocated`. wt103-qrnn takes 17 GB in all.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import timed
from benchmarks.fastest import choices, fastest
from benchmarks.peers import check_fastai, fits_fastai
from benchmarks.work import SETTINGS, VARIANTS, Work, others, ours, setting
from corpus.files import find_files
from harness.files import check_writable, write
from harness.flags import COUNT, ArgumentParser
from harness.script import run_script
from products import has_bf16
from utils import RunError, UserError, pick_device, use_tf32

BUDGET_S = 45  # for the rounds of a setting, or of table 2, without --rounds
WARM_UP_ROUNDS = 2  # the memory that a process keeps has its final size after the second step
CONTEXT = multiprocessing.get_context("spawn")  # a new interpreter each, for a peak memory without other work
Row = dict[str, str]  # of a table: column -> cell


def call(pool: ProcessPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in the process of a variant, and returns its result."""
    try:
        return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise RunError("a process was killed; is there enough memory? Choose other --settings") from None


@functools.cache
def make_work(kind: str, name: str, tiny: bool, device: torch.device) -> Work:
    """The work of a variant, made once in its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends bench.py, which ends this process
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # set in bench.py's process by `keep_freed_memory`
    use_tf32()  # for all variants, as in main.py
    return VARIANTS[kind](name, tiny, device)


def prepare(kind: str, name: str, tiny: bool, device: torch.device) -> None:
    """Makes the work of a variant, in its process."""
    make_work(kind, name, tiny, device)


def step_ms(kind: str, name: str, tiny: bool, device: torch.device) -> float:
    """The time of one step, in the process of its variant.

    Raises:
        RunError: its loss is not finite, so that its time is not that of training.
    """
    ms, loss = timed(make_work(kind, name, tiny, device), device)
    if loss is not None and not math.isfinite(loss):
        raise RunError(f"the loss is {float(loss)}: no training to be timed; choose other --settings")
    return ms


def work_ms(work: Work, device: torch.device) -> float:
    """The time of one call, in this process."""
    return timed(work, device)[0]


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    except OSError:  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alternate(title: str, works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls all works in turn, round after round, after warm-up rounds; returns milliseconds, one value per round.

    `rounds` 0: as many as the budget allows, 2 to 15.
    """

    def one_round(label: str) -> dict[str, float]:
        ms = {}
        for name, work in works.items():
            ms[name] = work()
            print(f"{title}: {label}: {name} {ms[name]:,.1f} ms", file=sys.stderr, flush=True)
        return ms

    for _ in range(WARM_UP_ROUNDS):
        round_ms = sum(one_round("warm-up").values())
    rounds = rounds or min(15, max(2, round(1000 * BUDGET_S / round_ms)))
    results = [one_round(f"round {i} of {rounds}") for i in range(1, rounds + 1)]
    return {name: [ms[name] for ms in results] for name in works}


def bench_steps(args: Namespace, device: torch.device) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Table 1: a row per setting, and its raw figures."""
    cpu = device.type == "cpu"
    left_out = {"fastai": not args.peers, "ours bf16": cpu and not has_bf16(), "ours graphs": cpu}
    kinds = [kind for kind in VARIANTS if not left_out.get(kind)]
    for name in args.settings:
        ntoken, run = setting(name, args.tiny)
        here = [kind for kind in kinds if kind != "fastai" or fits_fastai(run)]
        with contextlib.ExitStack() as stack:
            pools = {kind: stack.enter_context(ProcessPoolExecutor(1, CONTEXT)) for kind in here}
            for kind, pool in pools.items():  # one after the other: the floor's choice needs a quiet machine
                call(pool, prepare, kind, name, args.tiny, device)
            steps = {kind: partial(call, pool, step_ms, kind, name, args.tiny, device) for kind, pool in pools.items()}
            ms = alternate(name, steps, args.rounds)
            peak = {kind: call(pool, peak_bytes, device) for kind, pool in pools.items()}
        middle = {kind: median(times) for kind, times in ms.items()}
        size = f"{run.model} {run.emsize}-{run.nhid} x {run.nlayers}, V {ntoken:,}"
        row = {
            "setting": f"{name}: {size}, {run.batch_size} x {run.bptt}, {run.optimizer}",
            **{f"{kind}, ms": spread(ms[kind]) if kind in ms else "" for kind in kinds},
            "ours, tokens/s": f"{run.batch_size * run.bptt / middle['ours'] * 1000:,.0f}",
            "ours / floor": f"{middle['ours'] / middle['floor']:.2f}",
        }
        for kind in kinds[1:-1]:
            row[f"{kind} / ours"] = f"{middle[kind] / middle['ours']:.2f}" if kind in ms else ""
        for kind in kinds[:-1]:
            row[f"peak of {kind}, GB"] = f"{peak[kind] / 1e9:.2f}" if kind in ms else ""
        yield row, {"setting": name, "vocabulary": ntoken, "args": vars(run), "ms": ms, "peak_bytes": peak}


def bench_others(args: Namespace, device: torch.device) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Table 2: evaluation, pointer, reading a corpus and start-up, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(others(args.data, args.tiny, Path(folder), device))
        works = {name: partial(work_ms, work, device) for name, _, work in rows}
        results = alternate("others", works, args.rounds)
    for name, tokens, _ in rows:
        ms = results[name]
        row = {"what": name, "ms": spread(ms), "tokens": "", "tokens/s": ""}
        if tokens:
            row |= {"tokens": f"{tokens:,}", "tokens/s": f"{tokens / median(ms) * 1000:,.0f}"}
        yield row, {"what": name, "tokens": tokens, "ms": ms}


def spread(values: list[float]) -> str:
    """Median (lowest-highest)."""
    return f"{median(values):,.1f} ({min(values):,.1f}-{max(values):,.1f})"


def table(rows: list[Row]) -> str:
    """A Markdown table with aligned columns: the first one to the left, figures to the right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def machine(device: torch.device) -> str:
    """The machine, for the line above each table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name += next(line.partition("name\t")[2] for line in lines if line.startswith("model name"))
    facts = f"machine: {name}  cores: {os.cpu_count()}  threads: {torch.get_num_threads()}"
    return f"{facts}  torch: {torch.__version__}  load average before: {os.getloadavg()[0]:.2f}"


def profile(name: str, tiny: bool, device: torch.device) -> str:
    """torch's profile of one step of ours, after the warm-up rounds."""
    use_tf32()
    step = ours(name, tiny, device)
    for _ in range(WARM_UP_ROUNDS):
        step()
    with torch.profiler.profile() as profiler:
        step()
    rows = profiler.key_averages()
    table = rows.table(sort_by=f"self_{device.type}_time_total", row_limit=30, max_name_column_width=60)
    kernels = sum(row.count for row in rows if row.device_type == torch.autograd.DeviceType.CUDA)
    return f"{table}\nkernels and copies on the GPU: {kernels}" if device.type == "cuda" else table


def step_with(name: str, tiny: bool, device: torch.device, flags: str) -> Work:
    """A step of ours with these flags of main.py."""
    use_tf32()
    graphs, padded, persistent = (flag in flags for flag in ("--graphs", "--padded", "--persistent"))
    return ours(name, tiny, device, graphs=graphs, padded=padded, persistent=persistent)


def parse_args() -> Namespace:
    parser = ArgumentParser(__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="rows of table 1 (default: all)")
    tables = "1: training steps; 2: evaluation, pointer, reading a corpus, start-up (default: both)"
    add("--tables", nargs="+", type=int, choices=[1, 2], default=[1, 2], help=tables)
    add("--rounds", **COUNT, default=0, help="of each row (default: 2 to 15, as time allows)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--data", default=None, help="the corpus to read for table 2 (default: 2.4 M made-up tokens)")
    add("--json", default=None, help="also write all raw times to this file")
    add("--peers", action="store_true", default=False, help="also fastai's AWD_LSTM, version 2.8.12")
    add("--profile", choices=SETTINGS, default=None, help="only profile one step of ours")
    add("--fastest", choices=SETTINGS, default=None, help="only print the fastest of --graphs, --padded, --persistent")
    add("--tiny", action="store_true", default=False, help="toy sizes: does it run?")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no such device here; use --device cpu")
    if args.profile:
        print(profile(args.profile, args.tiny, device))
        return
    if args.fastest:
        device = pick_device("auto")
        flags = choices(setting(args.fastest, args.tiny)[1].model)
        make_step = partial(step_with, args.fastest, args.tiny, device)
        print(fastest(make_step, flags, device) if device.type == "cuda" else "")
        return
    if args.peers:
        check_fastai()
    if args.json:
        check_writable(args.json, "--json")
    if args.data:
        find_files(args.data)
    raw: dict[str, Any] = {"machine": machine(device)}
    for number, name, measure in ((1, "steps", bench_steps), (2, "others", bench_others)):
        if number in args.tables:
            rows, raw[name] = zip(*measure(args, device), strict=True)
            print(f"{raw['machine']}\n\n{table(rows)}\n", flush=True)
    if args.json:
        write(args.json, lambda file: file.write(f"{json.dumps(raw, indent=1)}\n".encode()))


if __name__ == "__main__":
    run_script(main)
