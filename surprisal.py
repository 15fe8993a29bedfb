"""What a saved model says of lines of text: log-probability, entropy and rank of every token.

    python score.py --save PTB.pt sentences.txt --tokens

A line is scored after an `<eos>`, and the `<eos>` that ends it is one of its tokens. Lines are scored side by
side; or line after line, as one text; or with the model learning from each line once it is scored: `--adaptive`
(van Schijndel and Linzen, EMNLP 2018), here dynamic evaluation, each line a segment, its rate in proportion to
its length.

Shapes: T time, B lines side by side, E the criterion's input, V vocabulary, N = T·B.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from corpus.files import read_lines
from corpus.read import EOS, UNK, encode_line, make_encoder
from corpus.tokenizer import Token, make_text
from dynamiceval import MovingWeights, weights_of
from harness.files import Opened
from model import Hidden
from utils import UserError

LINES, WINDOW = 64, 512  # lines side by side, of so many put in the order of their length
POSITIONS = 4096  # at once, of all columns together
ROWS = 512  # whole distributions at once, those of a mixture's experts among them


class Line(NamedTuple):
    """A line to score."""

    number: int
    text: str
    tokens: list[Token]
    ids: list[int]
    unknown: int  # tokens that the vocabulary lacks
    before: list[int]  # what it is read after, the `<eos>` that begins it last


class Scored(NamedTuple):
    """A line's figures, in float64 on the CPU.

    logprob: (T + 1,), nats, of its T tokens and the `<eos>`.
    entropy, rank: (T + 1,), nats and 1 for the likeliest; empty unless they were asked for.
    """

    line: Line
    logprob: Tensor
    entropy: Tensor
    rank: Tensor


@torch.no_grad()
def column_figures(
    saved: Opened, columns: list[list[int]], hidden: list[Hidden], whole: bool
) -> tuple[list[Tensor], list[Hidden]]:
    """Figures of the tokens of B columns but the first, each given those before it.

    Shorter columns are filled up: what comes after a column's end changes nothing before it, but then the state at
    the end is of use for the longest only.

    Args:
        hidden: the states to start from, B columns.
        whole: entropy and rank too, for which the whole distribution is needed.

    Returns:
        One (1 or 3, length - 1) per column: log-probability, entropy, rank; float64 on the CPU; and the state.
    """
    model, criterion = saved.model, saved.criterion
    weight, bias, B = model.decoder.weight, model.decoder.bias, len(columns)
    length = max(map(len, columns))
    filled = [[*column, *[column[0]] * (length - len(column))] for column in columns]
    words, found = torch.tensor(filled, device=saved.device).T.contiguous(), []  # (T + 1, B)
    rows, whole_rows = max(1, POSITIONS // B), max(1, ROWS // getattr(criterion, "n_experts", 1))
    for source, target in zip(words[:-1].split(rows), words[1:].split(rows), strict=True):
        output, hidden = model(source, hidden)  # (N, E)
        if not whole:
            figures = -criterion(weight, bias, output, target, reduction="none")[None]  # (1, N)
        else:
            blocks = zip(output.split(whole_rows), target.flatten().split(whole_rows), strict=True)
            figures = torch.cat([distribution_figures(saved, x, y) for x, y in blocks], dim=1)  # (3, N)
        found.append(figures.cpu().double().view(len(figures), -1, B))
    figures = torch.cat(found, dim=1)  # (·, T, B)
    return [figures[:, : len(column) - 1, b] for b, column in enumerate(columns)], hidden


def distribution_figures(saved: Opened, output: Tensor, target: Tensor) -> Tensor:
    """(N, E), (N,) -> (3, N): log-probability of the target, entropy, rank of the target."""
    logprob = saved.criterion.logprob(saved.model.decoder.weight, saved.model.decoder.bias, output)  # (N, V)
    chosen, scratch = logprob.gather(1, target[:, None]), torch.exp(logprob)
    entropy = -torch.linalg.vecdot(scratch, logprob)
    rank = torch.gt(logprob, chosen, out=scratch).sum(1) + 1
    return torch.stack([chosen[:, 0], entropy, rank])


def score_apart(saved: Opened, lines: Iterable[Line], whole: bool) -> Iterator[Scored]:
    """Each line from a fresh state, many side by side."""
    lines = iter(lines)
    while window := list(islice(lines, WINDOW)):
        order = sorted(range(len(window)), key=lambda i: len(window[i].ids) + len(window[i].before))
        found: dict[int, Scored] = {}
        for start in range(0, len(order), LINES):
            chunk = order[start : start + LINES]
            columns = [[*window[i].before, *window[i].ids, window[i].before[-1]] for i in chunk]
            results, _ = column_figures(saved, columns, saved.model.init_hidden(len(chunk)), whole)
            for i, figures in zip(chunk, results, strict=True):
                found[i] = make_scored(window[i], figures[:, len(window[i].before) - 1 :])
        yield from (found[i] for i in range(len(window)))


def score_carried(saved: Opened, lines: Iterable[Line], whole: bool) -> Iterator[Scored]:
    """Line after line, as one text."""
    lines, hidden = iter(lines), saved.model.init_hidden(1)
    while group := take_tokens(lines, POSITIONS):
        eos = group[0].before
        column = [*eos, *chain.from_iterable([*line.ids, *eos] for line in group)]
        (figures,), hidden = column_figures(saved, [column], hidden, whole)
        for line, part in zip(group, figures.split([len(line.ids) + 1 for line in group], dim=1), strict=True):
            yield make_scored(line, part)


def score_adaptively(
    saved: Opened, lines: Iterable[Line], whole: bool, carry: bool, moving: MovingWeights, bptt: int
) -> Iterator[Scored]:
    """One line after the other: it is scored, then the weights move as if it were `len / bptt` segments."""
    hidden = saved.model.init_hidden(1)
    for line in lines:
        start = hidden if carry else saved.model.init_hidden(1)
        column = [*line.before, *line.ids, line.before[-1]]
        (figures,), hidden = column_figures(saved, [column], start, whole)
        yield make_scored(line, figures[:, len(line.before) - 1 :])
        saved.model.train()  # cuDNN's backward refuses evaluation mode; nothing is dropped
        words = torch.tensor(column, device=saved.device)[:, None]  # (T + 1, 1)
        output, _ = saved.model(words[:-1], start)
        decoder = saved.model.decoder
        loss = saved.criterion(decoder.weight, decoder.bias, output, words[1:], reduction="sum") / bptt
        moving.update(torch.autograd.grad(loss, weights_of(saved), allow_unused=True))
        saved.model.eval()


def take_tokens(lines: Iterator[Line], count: int) -> list[Line]:
    """The next lines, until they have so many tokens."""
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
    """Texts to the lines that the model scores."""

    def __init__(self, saved: Opened, path: str) -> None:
        self.form = make_text(saved.tokenizer, saved.vocab, f"--save {path}")
        self.encoder = make_encoder(saved.vocab)
        self.eos = self.encoder.token_to_index[EOS]

    def encode(self, text: str, place: str) -> tuple[list[Token], list[int]]:
        tokens = self.form.tokens(text)
        return tokens, encode_line(" ".join(token.piece for token in tokens), self.encoder, place)

    def line(self, number: int, text: str, place: str, context: str | None = None) -> Line:
        """Raises UserError when a word is unknown and there is no `<unk>`."""
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
        """The lines of a file, each with the line of that number of `context`, another file.

        Raises:
            UserError: see `read_lines`; or the two have not as many lines.
        """
        contexts = read_lines(context) if context else None
        for number, text in enumerate(read_lines(path), start=1):
            before = next(contexts, None) if contexts else None
            if contexts and before is None:
                raise UserError(f"--context {context}: has no line {number}; give a line for each of {path}")
            yield self.line(number, text, f"{path}, line {number}", before)
        if contexts and next(contexts, None) is not None:
            raise UserError(f"--context {context}: has more lines than {path}; give a line for each")
