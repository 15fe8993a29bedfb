"""The work that bench.py times, and the process of its own that does a piece of it whenever it is told to.

    printf 'step\nstep\n' | python bench_work.py ours ptb-lstm    # ready, ms, ms, peak memory in bytes
    printf 'step\nstep\n' | python bench_work.py plain ptb-lstm
    printf 'valid\ntest\n' | python bench_work.py evaluation ptb-qrnn --device cuda

A line on stdin names the work; its milliseconds are a line on stdout. In between the process sleeps.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import options
from batches import EVAL_BATCH_SIZE, TEST_BATCH_SIZE, Texts
from data import SPLITS, read_corpus
from plain import PlainModel, make_floor, plain_optimizer, plain_step, products
from pointer import mixture_logprob, pointer_prob
from run import Run, start_run
from splitcross import default_splits
from train import evaluate, train_step
from utils import RunError, UserError, keep_freed_memory, pick_device

Works = dict[str, Callable[[], Any]]  # each call one step, or one pass over a text

# The published commands: size of the vocabulary, and what they set beside main.py's defaults.
PTB = {"batch_size": 20, "dropouti": 0.4, "dropouth": 0.25}
ADAM = {"optimizer": "adam", "alpha": 0.0, "beta": 0.0, "dropoute": 0.0, "dropouti": 0.1, "dropout": 0.1}
QRNN = {"model": "QRNN", "nlayers": 4}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "ptb-lstm": (10_000, PTB),
    "ptb-qrnn": (10_000, PTB | QRNN | {"nhid": 1550, "clip": 0.2, "wdrop": 0.1, "dropouth": 0.3}),
    "wt2-lstm": (33_278, {"dropouth": 0.2}),
    "wt103-qrnn": (
        267_735,
        ADAM
        | QRNN
        | {"nhid": 2500, "dropouth": 0.1, "wdrop": 0.0, "wdecay": 0.0, "bptt": 140, "batch_size": 60},
    ),
    "small": (10_000, PTB | {"emsize": 200, "nhid": 400, "nlayers": 2}),
    "ptb-chars": (
        50,
        ADAM | {"emsize": 200, "nhid": 1000, "dropouth": 0.25, "bptt": 150, "batch_size": 128, "lr": 2e-3},
    ),
}
TINY = {"emsize": 8, "nhid": 12, "batch_size": 4, "bptt": 6}
BATCHES = 4  # different ones, in turn
WINDOWS = {500: 5000, 3785: 2000}  # of the pointer, and tokens at once: the published commands


def setting(name: str, tiny: bool) -> tuple[int, dict[str, Any]]:
    """The size of the vocabulary and all settings of main.py; `tiny` keeps the kind and shrinks it."""
    ntoken, given = SETTINGS[name]
    splits = default_splits(ntoken)
    if tiny:
        ntoken, given, splits = 60, given | TINY, [10, 20, 40] if splits else []
    return ntoken, options.settle({**given, "splits": splits, "save": "none.pt"}, {})  # nothing is saved


def zipf_text(ntoken: int, tokens: int, device: torch.device) -> Tensor:
    """Ids with odds 1/rank, the most frequent word first as in a vocabulary of ours: (tokens,) int32."""
    odds = 1 / torch.arange(1, ntoken + 1, dtype=torch.float64)
    draws = torch.multinomial(odds, tokens, replacement=True, generator=torch.Generator().manual_seed(0))
    return draws.to(device, torch.int32)


def write_corpus(folder: Path, tokens: int, ntoken: int) -> None:
    """Made-up text in the layout of a corpus: `tokens` of training text, a tenth of it twice."""
    folder.mkdir()
    for split, share in zip(SPLITS, (1, 10, 10), strict=True):
        words = [f"w{i}" for i in zipf_text(ntoken, tokens // share, torch.device("cpu")).tolist()]
        lines = (" ".join(words[i : i + 20]) + "\n" for i in range(0, len(words), 20))
        (folder / f"{split}.txt").write_text("".join(lines))


def training_text(ntoken: int, args: dict[str, Any], device: torch.device) -> Tensor:
    """Text for BATCHES batches of just bptt rows; the same for each variant."""
    return zipf_text(ntoken, args["batch_size"] * (BATCHES * args["bptt"] + 1), device)


def make_run(name: str, tiny: bool, device: torch.device) -> tuple[Run, Tensor]:
    """A run as main.py starts it, and its text."""
    ntoken, args = setting(name, tiny)
    ids = training_text(ntoken, args, device)
    texts = Texts([f"w{i}" for i in range(ntoken)], ids, ids, ids)
    torch.manual_seed(args["seed"])
    return start_run("main.py", args, texts, device, warm_start=None), ids


def our_training(run: Run, ids: Tensor) -> Callable[[], Tensor]:
    """A function that does the toolkit's own step on the next batch and returns its loss."""
    args, bptt = run.args, run.args["bptt"]
    columns = range(0, len(ids), len(ids) // args["batch_size"])
    rows = itertools.cycle(range(0, BATCHES * bptt, bptt))
    run.model.train()

    def step() -> Tensor:
        row = next(rows)
        slices = [slice(column + row, column + row + bptt) for column in columns]
        return train_step(run, ids, slices, bptt, args["alpha"], args["beta"], args["clip"])

    return step


def plain_training(model: PlainModel, ids: Tensor) -> Callable[[], Tensor]:
    """The same with the plain step."""
    args, bptt = model.args, model.args["bptt"]
    text = ids.view(args["batch_size"], -1).t().long()  # (rows, B)
    rows = itertools.cycle(range(0, BATCHES * bptt, bptt))
    optimizer, hidden = plain_optimizer(model), model.init_hidden(args["batch_size"])
    model.train()

    def step() -> Tensor:
        nonlocal hidden
        row = next(rows)
        source, target = text[row : row + bptt], text[row + 1 : row + bptt + 1]
        loss, hidden = plain_step(model, optimizer, hidden, source, target)
        return loss

    return step


def ours(name: str, tiny: bool, device: torch.device) -> Works:
    return {"step": our_training(*make_run(name, tiny, device))}


def plain(name: str, tiny: bool, device: torch.device) -> Works:
    ntoken, args = setting(name, tiny)
    torch.manual_seed(args["seed"])
    model = PlainModel(args, ntoken).to(device)
    return {"step": plain_training(model, training_text(ntoken, args, device))}


def floor(name: str, tiny: bool, device: torch.device) -> Works:
    """The matrix products of a step; the first batch says how many rows hit a cluster of a split softmax."""
    ntoken, args = setting(name, tiny)
    text = training_text(ntoken, args, device).view(args["batch_size"], -1).t()  # (rows, B)
    return {"step": make_floor(products(args, ntoken, text[1 : args["bptt"] + 1]), device)}


def evaluation_sizes(tiny: bool) -> dict[str, tuple[int, int]]:
    """Columns and tokens of the two kinds of evaluation; test has segments of 1,024 tokens."""
    valid, test = (21, 41) if tiny else (1021, 2049)  # rows that whole segments fill, and a last target
    return {"valid": (EVAL_BATCH_SIZE, EVAL_BATCH_SIZE * valid), "test": (TEST_BATCH_SIZE, test)}


def evaluation(name: str, tiny: bool, device: torch.device) -> Works:
    """train.evaluate as validation and test call it, on a part of a text."""
    run, _ = make_run(name, tiny, device)

    def work(columns: int, tokens: int) -> Callable[[], float]:
        ids = zipf_text(len(run.vocab), tokens, device)
        return lambda: evaluate(run.model, run.criterion, ids, run.args["bptt"], columns)

    return {split: work(*sizes) for split, sizes in evaluation_sizes(tiny).items()}


def pointer(name: str, tiny: bool, device: torch.device) -> Works:
    """The cache pointer from the model's states and losses on: a full window before the text, H = 400."""

    def work(window: int, tokens: int) -> Callable[[], float]:
        states = torch.randn(window + tokens, 400, device=device) / 10
        words = zipf_text(10_000, window + tokens, device).long()
        log_vocab, lambdasm = torch.full((tokens,), -5.0, dtype=torch.float64), torch.tensor(0.1).double()

        def run_pointer() -> float:
            prob = pointer_prob(states, words, window, [1.0], [window]).cpu().double()
            return mixture_logprob(prob, log_vocab, lambdasm).sum().item()

        return run_pointer

    return {str(window): work(window, tokens) for window, tokens in pointer_sizes(tiny).items()}


def pointer_sizes(tiny: bool) -> dict[int, int]:
    return dict.fromkeys(WINDOWS, 300) if tiny else WINDOWS


def reading(name: str, tiny: bool, device: torch.device) -> Works:
    """data.read_corpus on the folder `name`."""
    return {"read": lambda: read_corpus(name) and None}


WORKS = {
    "ours": ours,
    "plain": plain,
    "floor": floor,
    "evaluation": evaluation,
    "pointer": pointer,
    "reading": reading,
}


def timed_ms(work: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, from an idle device to an idle device.

    Raises:
        RunError: it returns a loss that is not finite: its time would not be that of training.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        loss = work()
        end.record()
        torch.cuda.synchronize()
        elapsed = start.elapsed_time(end)
    else:
        begin = time.perf_counter()
        loss = work()
        elapsed = (time.perf_counter() - begin) * 1000
    if loss is not None and not math.isfinite(loss):
        raise RunError(f"the loss is {float(loss)}: no training to be timed; choose other --settings")
    return elapsed


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process had so far, as the docstring of bench.py says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):  # Linux; its ru_maxrss begins with what the parent had
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def own_environment() -> dict[str, str]:
    """The environment without what `keep_freed_memory` has set in it: each process says for itself."""
    return {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}


class Worker:
    """A fresh process of bench_work.py; use it in a `with`.

    Raises:
        RunError: it ended; why is on stderr.
    """

    def __init__(self, kind: str, name: str, device: str, tiny: bool) -> None:
        self.what = f"{kind} {name}"
        command = [sys.executable, __file__, kind, name, "--device", device]
        self.process = subprocess.Popen(
            command + ["--tiny"] * tiny,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=own_environment(),
        )

    def __enter__(self) -> "Worker":
        try:
            self.reply()  # "ready"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        with self.process:  # closes the pipes and waits
            pass

    def reply(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            raise RunError(f"{self.what}: its process ended with status {self.process.wait()}; see above")
        return line

    def ask(self, work: str) -> float:
        """Milliseconds of one call."""
        with contextlib.suppress(BrokenPipeError):  # `reply` says it better
            self.process.stdin.write(f"{work}\n")
        return float(self.reply())

    def finish(self) -> int:
        """Ends the process: its peak memory in bytes."""
        self.process.stdin.close()
        return int(self.reply())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=WORKS)
    parser.add_argument("name", help="a setting; for reading, a folder of text")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, as in bench.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends bench.py, and that closes stdin
    if args.kind != "plain":  # a script written plainly has nothing of the kind
        keep_freed_memory()
    device = pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True  # for all alike: cuDNN's layers have it by torch's default
    replies = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()):  # what a run prints about itself
        works = WORKS[args.kind](args.name, args.tiny, device)
        print("ready", file=replies, flush=True)
        for line in sys.stdin:
            print(timed_ms(works[line.strip()], device), file=replies, flush=True)
        print(peak_bytes(device), file=replies, flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
