"""Evaluation: the loss of a model on a text, temperature, the test of a saved model, and the lines that are printed.

Losses are nats per token. Shapes: T time, B batch, N = T·B, E the criterion's input, V vocabulary, K temperatures.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import EVAL_BATCH_SIZE, TEST_BATCH_SIZE, Corpus, eval_batches
from harness.files import Opened, to_evaluate
from harness.log import DOUBLE_RULE, RunLog, figures, figures_per_unit, ppl, say, unit_text
from harness.ranks import ALONE, Ranks
from model import Criterion, RNNModel
from splitcross import block_rows
from utils import RunError, not_a_command

# Positions at once, at least: with so many, matrix products reach their full speed, and a GPU does not wait for Python.
POSITIONS, POSITIONS_ON_GPU = 1024, 2**14


@torch.no_grad()
def tempered_losses(
    criterion: Criterion, weight: Tensor, bias: Tensor | None, hiddens: Tensor, targets: Tensor,
    temperatures: Sequence[float],
) -> Tensor:  # fmt: skip
    """The loss of each target at several temperatures: -log of p^(1/T), renormalised over the vocabulary.

    It needs the whole distribution, whatever the output layer: a block of rows at a time. At a temperature of 1 it is
    the criterion's own loss, bit for bit.

    Args:
        weight, bias: the decoder's, (V, E) and (V,) or None.
        hiddens: (N, E).  targets: (N,).

    Returns:
        (K, N), in nats.
    """
    losses = hiddens.new_empty(len(temperatures), len(targets))
    others = [k for k, temperature in enumerate(temperatures) if temperature != 1]
    for k in set(range(len(temperatures))) - set(others):
        losses[k] = criterion(weight, bias, hiddens, targets, reduction="none")
    rows = max(1, block_rows(len(weight)) // getattr(criterion, "n_experts", 1))
    for first in range(0, len(targets), rows) if others else ():
        block = slice(first, first + rows)
        logprob = criterion.logprob(weight, bias, hiddens[block])  # (rows, V)
        chosen = logprob.gather(1, targets[block, None])[:, 0]
        for k in others:
            losses[k, block] = torch.logsumexp(logprob / temperatures[k], 1) - chosen / temperatures[k]
    return losses


class Tempered(nn.Module):
    """A criterion at a temperature, for evaluation: the same calls and the same parameters as the `criterion` in it."""

    def __init__(self, criterion: Criterion, temperature: float) -> None:
        super().__init__()
        self.criterion, self.temperature = criterion, temperature
        self.n_experts = getattr(criterion, "n_experts", 1)

    def forward(
        self, weight: Tensor, bias: Tensor | None, hiddens: Tensor, targets: Tensor, reduction: str = "mean"
    ) -> Tensor:
        hiddens, targets = hiddens.flatten(0, -2), targets.reshape(-1)
        losses = tempered_losses(self.criterion, weight, bias, hiddens, targets, [self.temperature])[0]
        return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()

    def logprob(self, weight: Tensor, bias: Tensor | None, hiddens: Tensor) -> Tensor:
        return F.log_softmax(self.criterion.logprob(weight, bias, hiddens) / self.temperature, dim=-1)


def tempered(saved: Opened, temperature: float) -> Opened:
    """The model with its distributions at this temperature; at 1 the model itself."""
    if temperature == 1:
        return saved
    return saved._replace(criterion=cast(Criterion, Tempered(saved.criterion, temperature)))


def untempered(criterion: Criterion) -> Criterion:
    """The model's own criterion, which dynamic evaluation learns by."""
    return criterion.criterion if isinstance(criterion, Tempered) else criterion


@torch.no_grad()
def evaluate(
    model: RNNModel,
    criterion: Criterion,
    ids: Tensor,
    bptt: int,
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean negative log-likelihood over the predicted tokens, in nats, each counted once.

    Nothing is dropped. The hidden state goes on from segment to segment, so `bptt` changes no figure. The first row of
    the text is only read, never predicted. Each rank evaluates its share of the columns.
    """
    model.eval()
    criterion.eval()
    columns = ranks.columns(batch_size)
    hidden = model.init_hidden(columns.stop - columns.start)
    total, count = 0.0, 0.0
    positions = POSITIONS_ON_GPU if ids.is_cuda else POSITIONS
    for source, target in eval_batches(ids, max(bptt, positions // batch_size), batch_size):
        check_stop()
        source, target = source[:, columns], target[:, columns]
        if not target.numel():
            continue  # more ranks than columns
        output, hidden = model(source, hidden)
        weight, bias = model.decoder.weight, model.decoder.bias
        # A synchronisation, once per segment; the sum is in float64.
        total += criterion(weight, bias, output, target, reduction="sum").item()
        count += target.numel()
    total, count = ranks.sum([total, count])
    return total / count


def test(saved: dict[str, Any], ids: Tensor, bptt: int, log: RunLog) -> None:
    """Evaluates a saved model on the test text at batch size 1 and prints the last line of a run."""
    report_test(to_evaluate(saved, ids.device), ids, bptt, log)


def report_test(opened: Opened, ids: Tensor, bptt: int, log: RunLog) -> None:
    """As `test`, of a model that is open."""
    loss = evaluate(opened.model, opened.criterion, ids, bptt, TEST_BATCH_SIZE)
    check_finite(loss, "test ")
    units = report("End of training", "test ", loss, opened, ids, bpc=True)
    log.write("test", loss, **units)


def evaluate_only(saved: dict[str, Any], corpus: Corpus, bptt: int, temperature: float) -> None:
    """`main.py --epochs 0`: prints a saved model's figures on this text; trains nothing and writes no file."""
    opened = tempered(to_evaluate(saved, corpus.valid.device), temperature)
    loss = evaluate(opened.model, opened.criterion, corpus.valid, bptt, EVAL_BATCH_SIZE)
    check_finite(loss, "valid ")
    say(f"| End of evaluation | {figures(loss, 'valid ')}")
    report_test(opened, corpus.test, bptt, RunLog(None))


def report(title: str, prefix: str, loss: float, saved: Opened, ids: Tensor, bpc: bool = False) -> dict[str, float]:
    """Prints the figures of a text between two double rules.

    Returns:
        The figures per word and per character where the model has a tokenizer, for the log.
    """
    units = figures_per_unit(saved.tokenizer, saved.vocab, ids, loss)
    text = figures(loss, prefix, bpc) + unit_text(units, prefix)
    say(f"{DOUBLE_RULE}\n| {title} | {text}\n{DOUBLE_RULE}")
    return units


def check_finite(loss: float, prefix: str) -> None:
    """Raises RunError for a loss that is nan or infinite: finite weights can be too large to calculate with."""
    if not math.isfinite(loss):
        raise RunError(f"the {prefix}loss is {loss}: the weights are too large; use another copy, or train again")


def print_table(
    title: str, row: str, rows: Sequence[float], column: str, columns: Sequence[float],
    losses: Iterable[Sequence[float]],
) -> None:  # fmt: skip
    """Prints the perplexities of a search on the validation text: a row per value of the setting called `row`.

    `losses`: nats, row by row; each row is printed as soon as it is there.
    """
    say(f"| {title} | val ppl, a row per {row}, a column per {column}")
    say(f"| {row:>8} |" + "".join(f"{value:9g}" for value in columns))
    for value, row_losses in zip(rows, losses, strict=True):
        say(f"| {value:8g} |" + "".join(f"{ppl(loss):9.2f}" for loss in row_losses))


def print_best(best: dict[str, float], tried: dict[str, Sequence[float]]) -> None:
    """Prints the settings that a search has found, as flags, and a line for each on the edge of its range."""
    say("| best on val: " + " ".join(f"--{name} {value:g}" for name, value in best.items()))
    for name, value in best.items():
        if len(tried[name]) > 1 and value in (min(tried[name]), max(tried[name])):
            say(f"| --{name} {value:g} lies on the edge of what was tried: a better one may lie beyond")


if __name__ == "__main__":
    not_a_command(__file__)
