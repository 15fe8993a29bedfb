"""The scores of sentences under a model: what `generate.py --score` prints.

    python generate.py --save PTB.pt --score sentences.txt          # each line by itself
    python generate.py --save PTB.pt --score article.txt --carry    # line after line, as one text

Shapes: T time, B lines side by side.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import torch

from compat import LabelEncoder
from data import encode_line
from model import RNNModel, State
from splitcross import SplitCrossEntropyLoss
from utils import UserError, ppl
from words import EOS

BATCH = 16  # lines scored side by side, when the state is reset between them
ROWS = 1024  # positions at once, of all lines together


@torch.no_grad()
def line_logprobs(
    model: RNNModel, criterion: SplitCrossEntropyLoss, lines: list[list[int]], eos: int, hidden: list[State]
) -> tuple[list[float], list[State]]:
    """Log-probabilities of B lines in nats, each with the `<eos>` that ends it, and the state at the end.

    Args:
        lines: the words of each line. Shorter ones are filled up; what comes after a line's end changes
            nothing before it, but the returned state is of use for a single line only.
        hidden: the states to start from, B columns.
    """
    length = max(map(len, lines)) + 1
    filled = [[eos, *line, *[eos] * (length - len(line))] for line in lines]
    words = torch.tensor(filled, device=model.encoder.weight.device).T  # (T + 1, B)
    counted = torch.arange(length)[:, None] <= torch.tensor([len(line) for line in lines])  # (T, B)
    total = torch.zeros(len(lines), dtype=torch.float64)
    rows = max(1, ROWS // len(lines))
    for source, target, mask in zip(
        words[:-1].split(rows), words[1:].split(rows), counted.split(rows), strict=True
    ):
        output, hidden = model(source, hidden)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, target, reduction="none")
        total -= loss.cpu().double().view_as(mask).where(mask, 0.0).sum(0)
    return total.tolist(), hidden


def read_lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 file, split at newlines only.

    Raises:
        UserError: it cannot be read, is empty or not UTF-8.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"--score {path}: not UTF-8 in line {number}; convert the file, e.g. with iconv"
        ) from None
    except OSError as error:
        raise UserError(f"--score {path}: cannot be read: {error.strerror}; give a text file") from None
    if not number:
        raise UserError(f"--score {path}: is empty; give a text with at least one line")


def score(
    model: RNNModel, criterion: SplitCrossEntropyLoss, path: str, encoder: LabelEncoder, carry: bool
) -> Iterator[str]:
    """Yields the table that `--score` prints: its head, a row for each line of the file, the total.

    Raises:
        UserError: see `read_lines`; or a word is unknown and there is no `<unk>`.
    """
    total = Counter()
    lines, hidden = read_lines(path), model.init_hidden(1)
    while batch := list(islice(lines, 1 if carry else BATCH)):
        first = total["lines"] + 1
        ids = [encode_line(line, encoder, f"--score {path}, line {i}") for i, line in enumerate(batch, first)]
        start = hidden if carry else model.init_hidden(len(batch))
        logprobs, hidden = line_logprobs(model, criterion, ids, encoder.token_to_index[EOS], start)
        if first == 1:  # the file can be read
            yield row("line", "tokens", "unknown", "logprob", "ppl", "unknown words")
        for line, logprob in zip(batch, logprobs, strict=True):
            words = line.split()
            unknown = [word for word in words if word not in encoder.token_to_index]
            total.update(lines=1, tokens=len(words) + 1, unknown=len(unknown), logprob=logprob)
            yield row(total["lines"], *figures(len(words) + 1, len(unknown), logprob), " ".join(unknown))
    yield row("total", *figures(total["tokens"], total["unknown"], total["logprob"]), "")


def figures(tokens: int, unknown: int, logprob: float) -> tuple[int, int, str, str]:
    """The cells that a line and the total have in common."""
    return tokens, unknown, f"{logprob:.4f}", f"{ppl(-logprob / tokens):.2f}"


def row(*cells: int | str) -> str:
    """A row of the table, tabs between its cells."""
    return "\t".join(map(str, cells)) + "\n"
