"""What the tests of the scripts share: toy models and corpora, and a script called as from a shell."""

import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import files
from harness.script import run_script
from model import DROPOUTS, Criterion, Hidden, RNNModel, build, detach

ROOT = Path(__file__).parent.parent
WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(48))]


def make_model(
    rnn_type: str = "LSTM",
    splits: tuple[int, ...] = (),
    vocab: list[str] = WORDS,
    seed: int = 0,
    n_experts: int = 0,
) -> tuple[dict[str, Any], RNNModel, Criterion]:
    """The args, model and criterion (evaluation mode, float32) of two layers of random weights."""
    torch.manual_seed(seed)
    args = {"model": rnn_type, "emsize": 12, "nhid": 16, "nlayers": 2, "tied": True, "splits": list(splits)}
    args |= {"n_experts": n_experts} if n_experts else {}
    args |= {"nhid": 12, "rounds": 3, "rank": 2} if rnn_type == "Mogrifier" else {}
    model, criterion = build({**args, **dict.fromkeys(DROPOUTS, 0.0)}, len(vocab))
    for parameter in [*model.parameters(), *criterion.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    return args, model.eval(), criterion.eval()


def double_model(
    rnn_type: str = "LSTM", splits: tuple[int, ...] = (), vocab: list[str] = WORDS, n_experts: int = 0
) -> tuple[RNNModel, Criterion]:
    """The model and criterion that `save_model` saves, in float64."""
    _, model, criterion = make_model(rnn_type, splits, vocab, n_experts=n_experts)
    return model.double(), criterion.double()


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


def save_model(
    path: Path,
    rnn_type: str = "LSTM",
    splits: tuple[int, ...] = (),
    vocab: list[str] = WORDS,
    n_experts: int = 0,
    tokenizer: str | None = None,
) -> Path:
    args, model, criterion = make_model(rnn_type, splits, vocab, n_experts=n_experts)
    files.save(str(path), files.model_contents(Namespace(**args), vocab, model, criterion, {}, tokenizer))
    return path


def make_text(tokens: int, seed: int = 0, vocab_size: int = len(WORDS)) -> Tensor:
    """Frequent and rare words, and stretches that come again, as a cache likes it: (tokens,) int64."""
    generator = torch.Generator().manual_seed(seed)
    odds = 1 / torch.arange(1.0, vocab_size + 1)
    ids = torch.multinomial(odds, tokens, replacement=True, generator=generator)
    for start in range(60, tokens, 90):
        again = ids[start - 50 : start - 50 + min(25, tokens - start)]
        ids[start : start + len(again)] = again.clone()
    return ids


def write_corpus(folder: Path, tokens: int = 400, seed: int = 0, vocab: list[str] = WORDS) -> Path:
    """Three splits of text in a folder, lines of eight words."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(("train", "valid", "test")):
        words = [vocab[2 + k % (len(vocab) - 2)] for k in make_text(tokens, seed + i).tolist()]
        lines = (" ".join(words[k : k + 8]) for k in range(0, tokens, 8))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


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


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on stderr of a call that went wrong."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]
