"""Log-probability, entropy and rank of every token of lines of text under a saved model: the figures of score.py.

A line is scored after an `<eos>`, and the `<eos>` at its end is one of its tokens. There are three ways: lines side by
side, each from a fresh state; line after line, as one text (--carry); and one line after the other, where the model
learns from each line after it was scored (--adaptive; van Schijndel and Linzen, EMNLP 2018). The last one is dynamic
evaluation with one segment per line and a rate in proportion to the line's length.

Shapes: T time, B lines side by side, E the criterion's input, V vocabulary, N = T·B.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from corpus.codec import make_codec
from corpus.plain import Token
from corpus.read import EOS, UNK, encode_line, make_encoder
from corpus.text import read_lines
from dynamiceval import MovingWeights, weights_of
from harness.files import Opened
from model import Hidden
from utils import UserError, not_a_command

BATCH_LINES = 64  # lines scored together
SORT_WINDOW = 512  # lines sorted by length before batching
BATCH_TOKENS = 4096  # tokens of all lines together that go through the model at once
BATCH_DISTRIBUTIONS = 512  # distributions over the vocabulary at once; each expert of a mixture has one


class Line(NamedTuple):
    """A line to score."""

    number: int  # in the file, from 1
    text: str
    tokens: list[Token]
    ids: list[int]
    unknown: int  # how many tokens are not in the vocabulary
    before: list[int]  # the ids that are read before the line; the last one is an `<eos>`


class Scored(NamedTuple):
    """A line's figures, in float64 on the CPU.

    logprob: (T + 1,), in nats, of the line's T tokens and the `<eos>`.
    entropy, rank: (T + 1,), in nats, and 1 for the likeliest token; empty unless asked for.
    """

    line: Line
    logprob: Tensor
    entropy: Tensor
    rank: Tensor


@torch.no_grad()
def column_figures(
    saved: Opened, columns: list[list[int]], hidden: list[Hidden], with_entropy: bool
) -> tuple[list[Tensor], list[Hidden]]:
    """The figures of each token of B columns, given the tokens before it; the first token is only read.

    Shorter columns are filled up at their end. That changes none of their figures, but only the longest columns have
    a valid state at the end.

    Args:
        hidden: the states to start from, B columns.
        with_entropy: also compute entropy and rank, for which the whole distribution is needed.

    Returns:
        One (1 or 3, length - 1) per column: log-probability, entropy, rank; float64 on the CPU; and the state.
    """
    model, criterion = saved.model, saved.criterion
    weight, bias, B = model.decoder.weight, model.decoder.bias, len(columns)
    length = max(map(len, columns))
    filled = [[*column, *[column[0]] * (length - len(column))] for column in columns]
    words, parts = torch.tensor(filled, device=saved.device).T.contiguous(), []  # (T + 1, B)
    rows = max(1, BATCH_TOKENS // B)
    distributions = max(1, BATCH_DISTRIBUTIONS // getattr(criterion, "n_experts", 1))
    for source, target in zip(words[:-1].split(rows), words[1:].split(rows), strict=True):
        output, hidden = model(source, hidden)  # (N, E)
        if not with_entropy:
            figures = -criterion(weight, bias, output, target, reduction="none")[None]  # (1, N)
        else:
            blocks = zip(output.split(distributions), target.flatten().split(distributions), strict=True)
            figures = torch.cat([distribution_figures(saved, x, y) for x, y in blocks], dim=1)  # (3, N)
        parts.append(figures.cpu().double().view(len(figures), -1, B))
    figures = torch.cat(parts, dim=1)  # (1 or 3, T, B)
    return [figures[:, : len(column) - 1, b] for b, column in enumerate(columns)], hidden


def distribution_figures(saved: Opened, output: Tensor, target: Tensor) -> Tensor:
    """(N, E), (N,) -> (3, N): log-probability of the target, entropy, rank of the target."""
    logprob = saved.criterion.logprob(saved.model.decoder.weight, saved.model.decoder.bias, output)  # (N, V)
    chosen, scratch = logprob.gather(1, target[:, None]), torch.exp(logprob)
    entropy = -torch.linalg.vecdot(scratch, logprob)
    rank = torch.gt(logprob, chosen, out=scratch).sum(1) + 1
    return torch.stack([chosen[:, 0], entropy, rank])


def score_apart(saved: Opened, lines: Iterable[Line], with_entropy: bool) -> Iterator[Scored]:
    """Each line from a fresh state, many side by side."""
    lines = iter(lines)
    while window := list(islice(lines, SORT_WINDOW)):
        order = sorted(range(len(window)), key=lambda i: len(window[i].ids) + len(window[i].before))
        scored: dict[int, Scored] = {}
        for start in range(0, len(order), BATCH_LINES):
            chunk = order[start : start + BATCH_LINES]
            columns = [[*window[i].before, *window[i].ids, window[i].before[-1]] for i in chunk]
            results, _ = column_figures(saved, columns, saved.model.init_hidden(len(chunk)), with_entropy)
            for i, figures in zip(chunk, results, strict=True):
                scored[i] = make_scored(window[i], figures[:, len(window[i].before) - 1 :])
        yield from (scored[i] for i in range(len(window)))


def score_carried(saved: Opened, lines: Iterable[Line], with_entropy: bool) -> Iterator[Scored]:
    """Line after line, as one text."""
    lines, hidden = iter(lines), saved.model.init_hidden(1)
    while group := take_tokens(lines, BATCH_TOKENS):
        eos = group[0].before
        column = [*eos, *chain.from_iterable([*line.ids, *eos] for line in group)]
        (figures,), hidden = column_figures(saved, [column], hidden, with_entropy)
        for line, part in zip(group, figures.split([len(line.ids) + 1 for line in group], dim=1), strict=True):
            yield make_scored(line, part)


def score_adaptively(
    saved: Opened, lines: Iterable[Line], with_entropy: bool, carry: bool, moving: MovingWeights, bptt: int
) -> Iterator[Scored]:
    """One line after the other: it is scored, then the weights move as they would for `len / bptt` segments."""
    hidden = saved.model.init_hidden(1)
    for line in lines:
        start = hidden if carry else saved.model.init_hidden(1)
        column = [*line.before, *line.ids, line.before[-1]]
        (figures,), hidden = column_figures(saved, [column], start, with_entropy)
        yield make_scored(line, figures[:, len(line.before) - 1 :])
        saved.model.train()  # cuDNN has no backward pass in evaluation mode; all dropouts are 0
        words = torch.tensor(column, device=saved.device)[:, None]  # (T + 1, 1)
        output, _ = saved.model(words[:-1], start)
        decoder = saved.model.decoder
        loss = saved.criterion(decoder.weight, decoder.bias, output, words[1:], reduction="sum") / bptt
        moving.update(torch.autograd.grad(loss, weights_of(saved), allow_unused=True))
        saved.model.eval()


def take_tokens(lines: Iterator[Line], count: int) -> list[Line]:
    """The next lines, until they have `count` tokens together."""
    taken: list[Line] = []
    for line in lines:
        taken.append(line)
        count -= len(line.ids) + 1
        if count <= 0:
            break
    return taken


def make_scored(line: Line, figures: Tensor) -> Scored:
    logprob, entropy, rank = figures if len(figures) == 3 else (figures[0], *torch.empty(2, 0))
    return Scored(line, logprob, entropy, rank)


class Reader:
    """Turns lines of text into the ids of a saved model's vocabulary."""

    def __init__(self, saved: Opened, path: str, plain: bool = False) -> None:
        self.codec = make_codec(saved.tokenizer, saved.vocab, f"--save {path}", plain)
        self.encoder = make_encoder(saved.vocab)
        self.eos = self.encoder.token_to_index[EOS]

    def encode(self, text: str, place: str) -> tuple[list[Token], list[int]]:
        tokens = self.codec.tokens(text)
        return tokens, encode_line(" ".join(token.piece for token in tokens), self.encoder, place)

    def line(self, number: int, text: str, place: str, context: str | None = None) -> Line:
        """Encodes a line. Raises UserError when a word is unknown and the vocabulary has no `<unk>`."""
        text, before = text.rstrip(), [self.eos]
        if context is not None:
            before = [self.eos, *self.encode(context.rstrip(), place)[1], self.eos]
        tokens, ids = self.encode(text, place)
        return Line(number, text, tokens, ids, sum(map(self.is_unknown, tokens)), before)

    def is_unknown(self, token: Token) -> bool:
        return token.piece not in self.encoder.token_to_index or (token.piece == UNK != token.text)

    def show(self, token: Token) -> str:
        return f"{UNK} {' '.join(token.text.split())}" if self.is_unknown(token) else token.piece

    def lines(self, path: str, context: str | None) -> Iterator[Line]:
        """The lines of a file, each with the line of the same number in the file `context`.

        Raises:
            UserError: see `read_lines`; or the files differ in their number of lines.
        """
        contexts = read_lines(context) if context else None
        for number, text in enumerate(read_lines(path), start=1):
            before = next(contexts, None) if contexts else None
            if contexts and before is None:
                raise UserError(f"--context {context}: has no line {number}; give a line for each of {path}")
            yield self.line(number, text, f"{path}, line {number}", before)
        if contexts and next(contexts, None) is not None:
            raise UserError(f"--context {context}: has more lines than {path}; give a line for each")


if __name__ == "__main__":
    not_a_command(__file__)
