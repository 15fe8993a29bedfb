"""What tests share: toy layers, models and texts, and a script called as from a shell."""

import contextlib
import resource
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prepare
from harness import files
from harness.flags import DEFAULTS
from harness.script import run_script
from layers.recurrent import RecurrentLayer
from model import CELLS, DROPOUTS, LAYERS, Criterion, Hidden, RNNModel, build, detach

LEVELS = ("word", "char", "subword")  # of prepare.py
WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(48))]
NO_DROPOUT = dict.fromkeys(DROPOUTS, 0.0)
NO_DROPOUT_FLAGS = [word for name in ("", "h", "i", "e") for word in (f"--dropout{name}", 0)] + ["--wdrop", 0]


# Every kind of layer. All is worked out from the attributes of its class, so a new kind needs no line here.

# The choices of --model; then the choices of --cell that are not the default.
KINDS: dict[str, type[RecurrentLayer]] = {**LAYERS, **{cell: kind for cell, kind in CELLS.items() if cell != "lstm"}}
SMALL_OPTIONS = {"rounds": 3, "rank": 2}  # instead of the flags' defaults


def options_of(kind: str) -> dict[str, Any]:
    """A value for each further setting that this kind of layer takes."""
    return {name: SMALL_OPTIONS.get(name, DEFAULTS[name]) for name in KINDS[kind].options}


def names_of(kind: str) -> dict[str, str]:
    """The settings that name the kind: model, and cell where it is not the default."""
    return {"model": kind} if kind in LAYERS else {"model": "Mogrifier", "cell": kind}


def has_weight_drop(kind: str) -> bool:
    return bool(KINDS[kind].defaults.get("wdrop", DEFAULTS["wdrop"]))


def settings_of(kind: str, emsize: int = 12, nhid: int = 16, **more: Any) -> dict[str, Any]:
    """The settings that shape a toy model of this kind. Layers that are summed are as wide as the embedding."""
    nhid = emsize if KINDS[kind].summed else nhid
    shape = {**names_of(kind), "emsize": emsize, "nhid": nhid, "nlayers": 2, "tied": True, "splits": []}
    return shape | options_of(kind) | more


def dropouts_of(kind: str, p: float = 0.5) -> dict[str, float]:
    """Every dropout with this probability; weight drop only where the kind has it."""
    wdrop = p if has_weight_drop(kind) else 0.0
    return dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute"), p) | {"wdrop": wdrop}


def flags_of(kind: str) -> list[object]:
    """The same as flags, to be given after conftest.SMALL."""
    given = names_of(kind) | ({"nhid": 8} if KINDS[kind].summed else {}) | options_of(kind)
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def make_layer(kind: str, inputs: int, outputs: int, first: bool, wdrop: float = 0.0, **more: Any) -> RecurrentLayer:
    """A layer in float64, its weights large enough for gates to move."""
    layer = KINDS[kind](inputs, outputs, wdrop, first=first, **options_of(kind) | more).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def draw(*size: int) -> Tensor:
    """Normal numbers in float64 that a gradient is wanted of."""
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


# Models

# Arguments of `make_model`: every kind of layer with one softmax, every other output layer with an LSTM.
MODELS: dict[str, dict[str, Any]] = {kind: {"rnn_type": kind} for kind in KINDS}
MODELS |= {"split softmax": {"splits": (7, 20)}, "mixture": {"n_experts": 3}}
every_model = pytest.mark.parametrize("how", MODELS.values(), ids=MODELS)


def make_model(
    rnn_type: str = "LSTM", splits: tuple[int, ...] = (), vocab: list[str] = WORDS, n_experts: int = 0
) -> tuple[dict[str, Any], RNNModel, Criterion]:
    """The args, model and criterion (evaluation mode, float32) of two layers of random weights."""
    torch.manual_seed(0)
    args = settings_of(rnn_type, splits=list(splits), **{"n_experts": n_experts} if n_experts else {})
    model, criterion = build(args | NO_DROPOUT, len(vocab))
    for parameter in [*model.parameters(), *criterion.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    return args, model.eval(), criterion.eval()


def double_model(**how: Any) -> tuple[RNNModel, Criterion]:
    """The model and criterion that `save_model` saves, in float64."""
    _, model, criterion = make_model(**how)
    return model.double(), criterion.double()


def save_model(path: Path, tokenizer: str | None = None, vocab: list[str] = WORDS, **how: Any) -> Path:
    """Writes what `make_model` makes, as a file of a model."""
    args, model, criterion = make_model(vocab=vocab, **how)
    files.save(str(path), files.model_contents(Namespace(**args), vocab, model, criterion, {}, tokenizer))
    return path


@torch.no_grad()
def one_by_one(model: RNNModel, criterion: Criterion, ids: list[int]) -> Tensor:
    """Log-probabilities of the word after each of `ids`, (T, V), read a word at a time."""
    hidden, rows = model.init_hidden(1), []
    for word in ids:
        output, hidden = model(torch.tensor([[word]]), hidden)
        rows.append(criterion.logprob(model.decoder.weight, model.decoder.bias, output)[0])
    return torch.stack(rows)


def mean_loss(
    model: RNNModel, criterion: Criterion, source: Tensor, target: Tensor, hidden: list[Hidden]
) -> tuple[Tensor, list[Hidden]]:
    """The mean loss of a segment, (T, B) each, by whole distributions; and what is carried, detached."""
    output, hidden = model(source, hidden)
    logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output)
    return -logprob.gather(1, target.reshape(-1, 1)).mean(), detach(hidden)


class SlowDynamics:
    """Dynamic evaluation's formula, written out on a model in float64: its statistics, and one move at a time."""

    def __init__(self, model: RNNModel, criterion: Criterion, lr: float, lamb: float, epsilon: float) -> None:
        self.parts, self.lr, self.lamb, self.epsilon = (model, criterion), lr, lamb, epsilon
        self.weights = [*model.parameters(), *criterion.parameters()]
        self.first = [weight.detach().clone() for weight in self.weights]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, self.weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(self.weights, found, strict=True)]

    def take_statistics(self, ids: Tensor, columns: int, bptt: int) -> list[Tensor]:
        """MS: the root of the mean of g² over whole segments."""
        rows, hidden = len(ids) // columns, self.parts[0].init_hidden(columns)
        text, squares = ids[: rows * columns].view(columns, rows).T, []
        for start in range(0, rows - 1 - (rows - 1) % bptt, bptt):
            segment = text[start : start + bptt], text[start + 1 : start + bptt + 1]
            loss, hidden = mean_loss(*self.parts, *segment, hidden)
            squares.append([g**2 for g in self.gradients(loss)])
        self.ms = [torch.stack(each).mean(0).sqrt() for each in zip(*squares, strict=True)]
        return self.ms

    def move(self, loss: Tensor) -> None:
        mean, gradients = sum(x.mean() for x in self.ms) / len(self.ms), self.gradients(loss)
        with torch.no_grad():
            for w, w0, g, x in zip(self.weights, self.first, gradients, self.ms, strict=True):
                pull = (x / mean).clamp(max=1 / self.lamb)
                w.copy_(w + self.lamb * pull * (w0 - w) - self.lr * g / (x + self.epsilon))


# Texts


def make_text(tokens: int, seed: int = 0, vocab_size: int = len(WORDS)) -> Tensor:
    """Frequent and rare words, and stretches that come again, as a cache likes it: (tokens,) int64."""
    generator = torch.Generator().manual_seed(seed)
    odds = 1 / torch.arange(1.0, vocab_size + 1)
    ids = torch.multinomial(odds, tokens, replacement=True, generator=generator)
    for start in range(60, tokens, 90):
        again = ids[start - 50 : start - 50 + min(25, tokens - start)]
        ids[start : start + len(again)] = again.clone()
    return ids


# Scripts and processes


def call(script: Any, *argv: object) -> int:
    """Runs a script's main within this process, as its own `__main__` does; returns the exit status.

    What would be a traceback is an exception here, and fails the test.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
            run_script(script.main)
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGTERM, handler)


def text_of(capsys: pytest.CaptureFixture[str], script: Any, *argv: object) -> str:
    """The stdout of a call that went well."""
    assert call(script, *argv) == 0
    return capsys.readouterr().out


def prepare_levels(folder: Path, lines: list[str], vocab_size: int) -> dict[str, Path]:
    """A corpus of each level, made by prepare.py; all three texts are these lines."""
    source = folder / "source.txt"
    source.write_text("\n".join(lines) + "\n")
    for level in LEVELS:
        size = ["--vocab_size", vocab_size] if level == "subword" else []
        argv = [source, "--valid_file", source, "--test_file", source, "--min_count", 1, *size]
        assert call(prepare, *argv, "--level", level, "--out", folder / level) == 0
    return {level: folder / level for level in LEVELS}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on stderr of a call that went wrong."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found
