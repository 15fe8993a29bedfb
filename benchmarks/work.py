"""The work that bench.py times, on made-up text: VARIANTS of a training step, by the published settings, and others."""

import contextlib
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import make_floor, shapes
from benchmarks.peers import make_fastai_step
from benchmarks.plain import PlainModel, make_plain_step
from corpus.corpora import SPLITS
from corpus.files import find_files
from corpus.read import read_corpus
from data import Corpus
from evaluate import evaluate
from harness.flags import resolve_args
from pointer import mixture_logprob, pointer_prob
from splitcross import default_splits
from train import Run, train_step
from utils import RunError, keep_freed_memory

# The published commands: the settings that differ from main.py's defaults.
PTB: dict[str, Any] = {"batch_size": 20, "dropouti": 0.4, "dropouth": 0.25}
ADAM = {"optimizer": "adam", "alpha": 0.0, "beta": 0.0, "dropoute": 0.0, "dropouti": 0.1, "dropout": 0.1}
QRNN = {"model": "QRNN", "nlayers": 4}
WT103 = {"nhid": 2500, "dropouth": 0.1, "wdrop": 0.0, "wdecay": 0.0, "bptt": 140, "batch_size": 60}
CHARS = {"emsize": 200, "nhid": 1000, "dropouth": 0.25, "bptt": 150, "batch_size": 128, "lr": 2e-3}
MOS = {"emsize": 280, "nhid": 960, "nhidlast": 620, "dropoutl": 0.29, "batch_size": 12, "lr": 20.0}
MELIS = {
    **{"model": "Mogrifier", "emsize": 912, "nhid": 912, "nlayers": 2, "optimizer": "adam", "beta1": 0.0},
    **{"lr": 2.3e-3, "batch_size": 64, "dropouti": 0.729, "dropouth": 0.291, "dropoutr": 0.387, "dropout": 0.716},
    **{"clip": 0.143, "wdecay": 3.6e-6, "alpha": 0.0, "beta": 0.0, "drop_state": 0.0},
}
SETTINGS = {  # name: size of the vocabulary, settings
    "ptb-lstm": (10_000, PTB),
    "ptb-qrnn": (10_000, {**PTB, **QRNN, "nhid": 1550, "clip": 0.2, "wdrop": 0.1, "dropouth": 0.3}),
    "ptb-gru": (10_000, {**PTB, "model": "GRU"}),
    "wt2-lstm": (33_278, {"dropouth": 0.2}),
    "wt103-qrnn": (267_735, {**ADAM, **QRNN, **WT103}),
    "small": (10_000, {**PTB, "emsize": 200, "nhid": 400, "nlayers": 2}),
    "ptb-chars": (50, {**ADAM, **CHARS}),
    "ptb-mos": (10_000, {**PTB, **MOS, "n_experts": 15}),
    "ptb-mos-1": (10_000, {**PTB, **MOS, "n_experts": 1}),
    "ptb-mogrifier": (10_000, {**MELIS, "rounds": 5, "rank": 84}),
    "ptb-melis": (10_000, {**MELIS, "rounds": 0}),
    "ptb-rlstm": (10_000, {**MELIS, "rounds": 0, "cell": "rlstm", "emsize": 1000, "nhid": 1000}),
}
TINY = {"emsize": 8, "nhid": 12, "nhidlast": 0, "batch_size": 4, "bptt": 6}
BATCHES = 4  # different batches, in turn
Work = Callable[[], Any]  # one step, which returns its loss, or one pass over a text


def setting(name: str, tiny: bool) -> tuple[int, Namespace]:
    """The size of the vocabulary, and all settings of main.py; `tiny`: the same kind of model at toy sizes."""
    ntoken, given = SETTINGS[name]
    splits = default_splits(ntoken)
    if tiny:
        ntoken, given, splits = 60, {**given, **TINY}, [10, 20, 40] if splits else []
        if given.get("model") == "Mogrifier":
            given |= {"nhid": given["emsize"], "rank": 3 if given["rounds"] else 0}
    return ntoken, resolve_args({**given, "splits": splits, "save": "none.pt"}, {})  # nothing is saved


def zipf_text(ntoken: int, tokens: int) -> Tensor:
    """Ids with odds 1/rank, the most frequent word first as in a corpus's vocabulary: (tokens,) int32."""
    odds = 1 / torch.arange(1, ntoken + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(odds, tokens, replacement=True, generator=generator).int()


def training_batches(ntoken: int, args: Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Source and target of exactly bptt rows, (T, B) each, without end; the same for each variant."""
    text = zipf_text(ntoken, args.batch_size * (BATCHES * args.bptt + 1)).to(device)
    text = text.view(args.batch_size, -1).t().long().contiguous()  # (rows, B)
    batches = [text[row : row + args.bptt + 1] for row in range(0, BATCHES * args.bptt, args.bptt)]
    return cycle([(batch[:-1], batch[1:]) for batch in batches])


def make_run(ntoken: int, args: Namespace, device: torch.device) -> Run:
    """A run as main.py starts it; its texts are as short as texts can be."""
    text = torch.zeros(2 * args.batch_size, dtype=torch.int32)
    corpus = Corpus([f"w{i}" for i in range(ntoken)], text, text, text, digest="")
    return Run("main.py", args, corpus, device)


def ours(
    name: str, tiny: bool, device: torch.device, amp: str = "none", graphs: bool = False, padded: bool = False,
    persistent: bool = False,
) -> Work:  # fmt: skip
    keep_freed_memory()
    ntoken, args = setting(name, tiny)
    args.amp, args.graphs, args.padded, args.persistent = amp, graphs, padded, persistent
    run, batches = make_run(ntoken, args, device), training_batches(ntoken, args, device)
    run.model.train()
    run.criterion.train()

    def step() -> Tensor:
        with run.graphs.capture.on_stream() if run.graphs else contextlib.nullcontext():
            return train_step(run, *next(batches))

    return step


def plain(name: str, tiny: bool, device: torch.device) -> Work:
    """Without `keep_freed_memory`, as in a plain script."""
    ntoken, args = setting(name, tiny)
    torch.manual_seed(args.seed)
    step, batches = make_plain_step(PlainModel(args, ntoken).to(device)), training_batches(ntoken, args, device)
    return lambda: step(*next(batches))


def floor(name: str, tiny: bool, device: torch.device) -> Work:
    keep_freed_memory()
    ntoken, args = setting(name, tiny)
    _, target = next(training_batches(ntoken, args, device))  # its words belong to clusters of a split softmax
    step, libraries = make_floor(shapes(args, ntoken, target), device)
    counts = ", ".join(f"{libraries.count(library)} by {library}" for library in sorted(set(libraries)))
    print(f"{name}: the floor's products: {counts}", file=sys.stderr, flush=True)
    return step


def fastai(name: str, tiny: bool, device: torch.device) -> Work:
    ntoken, args = setting(name, tiny)
    torch.manual_seed(args.seed)
    step, batches = make_fastai_step(args, ntoken, device), training_batches(ntoken, args, device)
    return lambda: step(*next(batches))


# In the order of the table; the others are compared with the first one.
VARIANTS: dict[str, Callable[[str, bool, torch.device], Work]] = {
    "ours": ours,
    "ours bf16": partial(ours, amp="bf16"),
    "ours graphs": partial(ours, graphs=True, padded=True),
    "plain": plain,
    "fastai": fastai,
    "floor": floor,
}


def others(data: str | None, tiny: bool, folder: Path, device: torch.device) -> Iterator[tuple[str, int, Work]]:
    """Other work that takes time: its name, the number of its tokens (0: none), and the work itself."""
    scale = 40 if tiny else 1
    for name in ("ptb-lstm", "ptb-qrnn"):
        ntoken, args = setting(name, tiny)
        run = make_run(ntoken, args, device)
        for columns, rows in ((10, 1020 // scale), (1, 2048 // scale)):
            ids = zipf_text(ntoken, (rows + 1) * columns).to(device)
            work = partial(evaluate, run.model, run.criterion, ids, args.bptt, columns)
            yield f"evaluation: {name}, batch size {columns}", rows * columns, work
    for window, tokens in ((500, 5000 // scale), (3785, 2000 // scale)):  # the published commands
        states = torch.randn(window + tokens, 400, device=device) / 10  # a full window, and the text behind it
        words = zipf_text(10_000, window + tokens).to(device).long()
        yield f"pointer without the model: window {window}", tokens, partial(point, states, words, window)

    text, toy = folder / "text", folder / "toy"
    if data:
        text.mkdir()  # a copy, whose cache may be removed
        for path in find_files(data):
            shutil.copy(path, text)
    else:
        write_corpus(text, 2_000_000 // scale, ntoken=33_278)
    corpus = read_corpus(str(text))
    tokens = sum(len(getattr(corpus, split)) for split in SPLITS)
    yield "reading a corpus: first time", tokens, partial(read, text, first=True)
    yield "reading a corpus: from its cache", tokens, partial(read, text, first=False)

    write_corpus(toy, 1000, ntoken=50)
    flags: list[object] = ["--data", toy, "--save", folder / "m.pt", "--device", device, "--max_steps", 1]
    flags += ["--log-interval", 1, "--emsize", 8, "--nlayers", 1, "--batch_size", 4]
    yield "start-up: main.py --help", 0, partial(start_up, "--help", until="usage")
    yield "start-up: main.py, a toy's first step", 0, partial(start_up, *flags, until="| epoch")


def point(states: Tensor, words: Tensor, window: int) -> None:
    """The cache pointer from the model's states and losses on."""
    prob = pointer_prob(states, words, window, [1.0], [window]).cpu().double()
    log_vocab, lambdasm = torch.full_like(prob[0, 0], -5.0), torch.tensor(0.1).double()
    mixture_logprob(prob, log_vocab, lambdasm).sum().item()


def write_corpus(folder: Path, tokens: int, ntoken: int) -> None:
    """Made-up text in the layout of a corpus: `tokens` of training text, a tenth of that twice."""
    folder.mkdir()
    for split, share in zip(SPLITS, (1, 10, 10), strict=True):
        words = [f"w{i}" for i in zipf_text(ntoken, tokens // share).tolist()]
        lines = (" ".join(words[i : i + 20]) + "\n" for i in range(0, len(words), 20))
        (folder / f"{split}.txt").write_text("".join(lines))


def read(folder: Path, first: bool) -> None:
    """`first`: without the cache of the encoded text, which it leaves for the next call."""
    for path in folder.glob(".cache-*") if first else ():
        path.unlink()
    read_corpus(str(folder))


def start_up(*flags: object, until: str) -> None:
    """main.py, a fresh process, up to its first line that begins with `until`."""
    command = [sys.executable, "-u", str(Path(__file__).parent.parent / "main.py"), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        seen = any(line.startswith(until) for line in process.stdout or ())
        process.kill()
    if not seen:
        raise RunError(f"main.py ended without a line {until!r}; see above")
