"""What bench.py times: the published settings, made-up text for them, and the works, each made by a function.

VARIANTS holds those of table 1: a function (setting, tiny, device) that returns a "step". The works of table 2
take a name of their own: a setting, a folder.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.floor import make_floor, products
from benchmarks.plain import PlainModel, make_plain_step
from benchmarks.process import Works
from data import SPLITS, Corpus, read_corpus
from harness.flags import resolve_args
from harness.run import Run
from pointer import mixture_logprob, pointer_prob
from splitcross import default_splits
from train import evaluate, train_step
from utils import keep_freed_memory

# The published commands: size of the vocabulary, and what they set beside main.py's defaults.
PTB = {"batch_size": 20, "dropouti": 0.4, "dropouth": 0.25}
ADAM = {"optimizer": "adam", "alpha": 0.0, "beta": 0.0, "dropoute": 0.0, "dropouti": 0.1, "dropout": 0.1}
QRNN = {"model": "QRNN", "nlayers": 4}
WT103 = {"nhid": 2500, "dropouth": 0.1, "wdrop": 0.0, "wdecay": 0.0, "bptt": 140, "batch_size": 60}
CHARS = {"emsize": 200, "nhid": 1000, "dropouth": 0.25, "bptt": 150, "batch_size": 128, "lr": 2e-3}
SETTINGS = {
    "ptb-lstm": (10_000, PTB),
    "ptb-qrnn": (10_000, {**PTB, **QRNN, "nhid": 1550, "clip": 0.2, "wdrop": 0.1, "dropouth": 0.3}),
    "wt2-lstm": (33_278, {"dropouth": 0.2}),
    "wt103-qrnn": (267_735, {**ADAM, **QRNN, **WT103}),
    "small": (10_000, {**PTB, "emsize": 200, "nhid": 400, "nlayers": 2}),
    "ptb-chars": (50, {**ADAM, **CHARS}),
}
TINY = {"emsize": 8, "nhid": 12, "batch_size": 4, "bptt": 6}
BATCHES = 4  # different ones, in turn
EVALUATION = {10: 10_210, 1: 2_049}  # batch size: tokens; rows that whole segments fill, and a last target
POINTER = {500: 5000, 3785: 2000}  # window: tokens at once; the published commands


def setting(name: str, tiny: bool) -> tuple[int, Namespace]:
    """The size of the vocabulary and all settings of main.py; `tiny` keeps the kind and shrinks it."""
    ntoken, given = SETTINGS[name]
    splits = default_splits(ntoken)
    if tiny:
        ntoken, given, splits = 60, {**given, **TINY}, [10, 20, 40] if splits else []
    return ntoken, resolve_args({**given, "splits": splits, "save": "none.pt"}, {})  # nothing is saved


def zipf_text(ntoken: int, tokens: int) -> Tensor:
    """Ids with odds 1/rank, the most frequent word first as in a vocabulary of ours: (tokens,) int32."""
    odds = 1 / torch.arange(1, ntoken + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(odds, tokens, replacement=True, generator=generator).int()


def write_corpus(folder: Path, tokens: int, ntoken: int) -> None:
    """Made-up text in the layout of a corpus: `tokens` of training text, a tenth of that twice."""
    folder.mkdir()
    for split, share in zip(SPLITS, (1, 10, 10), strict=True):
        words = [f"w{i}" for i in zipf_text(ntoken, tokens // share).tolist()]
        lines = (" ".join(words[i : i + 20]) + "\n" for i in range(0, len(words), 20))
        (folder / f"{split}.txt").write_text("".join(lines))


def training_batches(ntoken: int, args: Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Source and target of just bptt rows, (T, B) each, without end; the same for each variant."""
    text = zipf_text(ntoken, args.batch_size * (BATCHES * args.bptt + 1)).to(device)
    text = text.view(args.batch_size, -1).t().long().contiguous()  # (rows, B)
    batches = [text[row : row + args.bptt + 1] for row in range(0, BATCHES * args.bptt, args.bptt)]
    return cycle([(batch[:-1], batch[1:]) for batch in batches])


def make_run(ntoken: int, args: Namespace, device: torch.device) -> Run:
    """A run as main.py starts it; its text is not looked at."""
    keep_freed_memory()
    torch.manual_seed(args.seed)
    nothing = torch.empty(0, dtype=torch.int32)
    return Run("main.py", args, Corpus([f"w{i}" for i in range(ntoken)], *[nothing] * 3, digest=""), device)


def ours(name: str, tiny: bool, device: torch.device) -> Works:
    ntoken, args = setting(name, tiny)
    run, batches = make_run(ntoken, args, device), training_batches(ntoken, args, device)
    run.model.train()
    return {"step": lambda: train_step(run, *next(batches))}


def plain(name: str, tiny: bool, device: torch.device) -> Works:
    """Freed memory is not kept: a script that is written plainly has nothing of the kind."""
    ntoken, args = setting(name, tiny)
    torch.manual_seed(args.seed)
    step, batches = make_plain_step(PlainModel(args, ntoken).to(device)), training_batches(ntoken, args, device)
    return {"step": lambda: step(*next(batches))}


def floor(name: str, tiny: bool, device: torch.device) -> Works:
    """The first batch says how many rows hit a cluster of a split softmax."""
    keep_freed_memory()
    ntoken, args = setting(name, tiny)
    _, target = next(training_batches(ntoken, args, device))
    step, libraries = make_floor(products(args, ntoken, target), device)
    found = ", ".join(f"{libraries.count(library)} by {library}" for library in sorted(set(libraries)))
    print(f"{name}: the floor's products: {found}", file=sys.stderr, flush=True)
    return {"step": step}


VARIANTS: dict[str, Callable[[str, bool, torch.device], Works]] = {"ours": ours, "plain": plain, "floor": floor}


def sizes(table: dict[int, int], tiny: bool) -> dict[int, int]:
    return {key: tokens // 40 if tiny else tokens for key, tokens in table.items()}


def evaluation(name: str, tiny: bool, device: torch.device) -> Works:
    """train.evaluate as validation and test call it, on a part of a text, by batch size."""
    ntoken, args = setting(name, tiny)
    run = make_run(ntoken, args, device)

    def work(columns: int, tokens: int) -> Callable[[], float]:
        ids = zipf_text(ntoken, tokens).to(device)
        return lambda: evaluate(run.model, run.criterion, ids, args.bptt, columns)

    return {columns: work(columns, tokens) for columns, tokens in sizes(EVALUATION, tiny).items()}


def pointer(_: str, tiny: bool, device: torch.device) -> Works:
    """The cache pointer from the model's states and losses on, by window, which is full from the start; H = 400."""
    keep_freed_memory()

    def work(window: int, tokens: int) -> Callable[[], float]:
        states = torch.randn(window + tokens, 400, device=device) / 10
        words = zipf_text(10_000, window + tokens).to(device).long()
        log_vocab, lambdasm = torch.full((tokens,), -5.0, dtype=torch.float64), torch.tensor(0.1).double()

        def run_pointer() -> float:
            prob = pointer_prob(states, words, window, [1.0], [window]).cpu().double()
            return mixture_logprob(prob, log_vocab, lambdasm).sum().item()

        return run_pointer

    return {window: work(window, tokens) for window, tokens in sizes(POINTER, tiny).items()}


def reading(folder: str, tiny: bool, device: torch.device) -> Works:
    keep_freed_memory()
    return {"read": lambda: read_corpus(folder) and None}
