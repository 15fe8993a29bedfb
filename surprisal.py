"""Log-probability, entropy and rank of every token of lines of text under a saved model: the figures of score.py.

A line is scored after an `<eos>`, and the `<eos>` at its end is one of its tokens. There are three ways: lines side by
side, each from a fresh state; line after line, as one text (--carry); and one line after the other, where the model
learns from each segment of a line after it was scored (--adaptive; van Schijndel and Linzen, EMNLP 2018), which is
dynamic evaluation.

Lines come in windows, lists of lines that are there at the same time: a window is scored before the next one is read.

Shapes: T time, B lines side by side, E the criterion's input, V vocabulary, N = T·B.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from corpus.codec import make_codec
from corpus.plain import Token
from corpus.read import EOS, UNK, encode_line, make_encoder, say_literal_eos, without_literal_eos
from corpus.text import read_line_groups, read_lines
from dynamiceval import MovingWeights, weights_of
from evaluate import untempered
from harness.files import Opened
from model import Hidden, detach
from utils import RunError, UserError, not_a_command

BATCH_LINES = 64  # lines scored together
FILLED_SHARE = 0.7  # of a batch: the least share of tokens that are no filling
DIVERGED = "; the model does not learn but diverges: try a lower --lr"
WINDOW = 512  # lines sorted by length before batching
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
    start: (T + 1,), in nats, the log-probability that a new word starts there: of all tokens that begin with a space,
        and `<eos>`, together; 0 after an `<eos>`, and where tokens carry no spaces. Empty unless asked for.
    """

    line: Line
    logprob: Tensor
    entropy: Tensor
    rank: Tensor
    start: Tensor


@torch.no_grad()
def column_figures(
    saved: Opened, columns: list[list[int]], hidden: list[Hidden], detail: Tensor | None
) -> tuple[list[Tensor], list[Hidden]]:
    """The figures of each token of B columns, given the tokens before it; the first token is only read.

    Shorter columns are filled up at their end. That changes none of their figures, but only the longest columns have
    a valid state at the end.

    Args:
        hidden: the states to start from, B columns.
        detail: `Reader.word_starts`, to compute entropy, rank and start too, which need the whole distribution.

    Returns:
        One (1 or 4, length - 1) per column: log-probability, entropy, rank, start; float64 on the CPU; and the state.
    """
    model, criterion = saved.model, saved.criterion
    weight, bias, B = model.decoder.weight, model.decoder.bias, len(columns)
    length = max(map(len, columns))
    filled = [[*column, *[column[0]] * (length - len(column))] for column in columns]
    words, parts = torch.tensor(filled, device=saved.device).T.contiguous(), []  # (T + 1, B)
    rows = max(1, BATCH_TOKENS // B)
    for source, target in zip(words[:-1].split(rows), words[1:].split(rows), strict=True):
        output, hidden = model(source, hidden)  # (N, E)
        if detail is None:
            figures = -criterion(weight, bias, output, target, reduction="none")[None]  # (1, N)
        else:
            figures = distribution_figures(saved, output, target.flatten(), detail)  # (4, N)
        parts.append(figures.cpu().double().view(len(figures), -1, B))
    figures = torch.cat(parts, dim=1)  # (1 or 4, T, B)
    return [figures[:, : len(column) - 1, b] for b, column in enumerate(columns)], hidden


def distribution_figures(saved: Opened, output: Tensor, target: Tensor, word_starts: Tensor) -> Tensor:
    """(N, E), (N,), (V,) -> (4, N): log-probability of the target, entropy, rank of the target, start."""
    decoder, found = saved.model.decoder, []
    rows = max(1, BATCH_DISTRIBUTIONS // getattr(saved.criterion, "n_experts", 1))
    for x, y in zip(output.split(rows), target.split(rows), strict=True):
        logprob = saved.criterion.logprob(decoder.weight, decoder.bias, x)  # (rows, V)
        chosen, scratch = logprob.gather(1, y[:, None]), torch.exp(logprob)
        entropy = -torch.linalg.vecdot(scratch, logprob)
        rank = torch.gt(logprob, chosen, out=scratch).sum(1) + 1
        start = entropy.new_zeros(len(x))
        if len(word_starts):
            start = torch.add(logprob, word_starts, out=scratch).logsumexp(1)
        found.append(torch.stack([chosen[:, 0], entropy, rank, start]))
    return torch.cat(found, dim=1)


def score_apart(saved: Opened, windows: Iterable[list[Line]], detail: Tensor | None) -> Iterator[Scored]:
    """Each line from a fresh state, many side by side."""
    for window in windows:
        scored: dict[int, Scored] = {}
        for batch in batches_of([len(line.before) + len(line.ids) for line in window]):
            columns = [[*window[i].before, *window[i].ids, window[i].before[-1]] for i in batch]
            results, _ = column_figures(saved, columns, saved.model.init_hidden(len(batch)), detail)
            for i, figures in zip(batch, results, strict=True):
                scored[i] = make_scored(window[i], figures[:, len(window[i].before) - 1 :])
        yield from (scored[i] for i in range(len(window)))


def batches_of(lengths: list[int]) -> Iterator[list[int]]:
    """The numbers of lines that are scored together: of similar length, so that little of a batch is filling."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        filled = (tokens + lengths[i]) / ((len(batch) + 1) * lengths[i])
        if batch and (len(batch) == BATCH_LINES or filled < FILLED_SHARE):
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    yield batch


def score_carried(saved: Opened, windows: Iterable[list[Line]], detail: Tensor | None) -> Iterator[Scored]:
    """Line after line, as one text."""
    hidden = saved.model.init_hidden(1)
    for window in windows:
        lines = iter(window)
        while group := take_tokens(lines, BATCH_TOKENS):
            eos = group[0].before
            column = [*eos, *chain.from_iterable([*line.ids, *eos] for line in group)]
            (figures,), hidden = column_figures(saved, [column], hidden, detail)
            for line, part in zip(group, figures.split([len(line.ids) + 1 for line in group], dim=1), strict=True):
                yield make_scored(line, part)


def score_adaptively(
    saved: Opened, windows: Iterable[list[Line]], detail: Tensor | None, carry: bool, moving: MovingWeights, bptt: int
) -> Iterator[Scored]:
    """One line after the other, in segments of `bptt` tokens: each is scored, then the weights move.

    A segment that is shorter moves them by less, in proportion. The context before a line is read only.

    Raises:
        RunError: the model has learned to give a token no probability at all.
    """
    hidden = saved.model.init_hidden(1)
    for line in chain.from_iterable(windows):
        hidden = hidden if carry else saved.model.init_hidden(1)
        if len(line.before) > 1:
            _, hidden = column_figures(saved, [line.before], hidden, None)
        eos, parts = line.before[-1], []
        words = torch.tensor([eos, *line.ids, eos], device=saved.device)[:, None]  # (T + 2, 1)
        for source, target in zip(words[:-1].split(bptt), words[1:].split(bptt), strict=True):
            figures, hidden = learn(saved, source, target, hidden, detail, moving, bptt)
            parts.append(figures.cpu().double())
        scored = make_scored(line, torch.cat(parts, dim=1), DIVERGED)
        if -scored.logprob.mean() > 8 * math.log(saved.model.encoder.num_embeddings):  # 8 times that of a random guess
            raise RunError(f"line {line.number}: its log-probability is {scored.logprob.sum():g}{DIVERGED}")
        yield scored


def learn(
    saved: Opened, source: Tensor, target: Tensor, hidden: list[Hidden], detail: Tensor | None, moving: MovingWeights,
    bptt: int,
) -> tuple[Tensor, list[Hidden]]:  # fmt: skip
    """Scores a segment, (T, 1), then moves the weights. Returns the figures, as `column_figures`, and the state."""
    model, decoder = saved.model.train(), saved.model.decoder  # cuDNN has no backward pass in evaluation mode
    output, hidden = model(source, detach(hidden))
    own = untempered(saved.criterion)  # the weights move as without a temperature
    losses = own(decoder.weight, decoder.bias, output, target, reduction="none")  # (N,)
    figures, words = -losses.detach()[None], target.flatten()
    if detail is not None:
        with torch.no_grad():
            figures = distribution_figures(saved, output.detach(), words, detail)
    elif own is not saved.criterion:
        figures = -saved.criterion(decoder.weight, decoder.bias, output.detach(), words, reduction="none")[None]
    moving.update(torch.autograd.grad(losses.sum() / bptt, weights_of(saved), allow_unused=True))
    model.eval()
    return figures, hidden


def take_tokens(lines: Iterator[Line], count: int) -> list[Line]:
    """The next lines, until they have `count` tokens together."""
    taken: list[Line] = []
    for line in lines:
        taken.append(line)
        count -= len(line.ids) + 1
        if count <= 0:
            break
    return taken


def make_scored(line: Line, figures: Tensor, hint: str = "; the model is damaged, use another copy") -> Scored:
    """The figures of a line. Raises RunError when one of them is not finite."""
    if not figures.isfinite().all():
        raise RunError(f"line {line.number}: its log-probability is {figures[0].sum():g}{hint}")
    logprob, entropy, rank, start = figures if len(figures) == 4 else (figures[0], *torch.empty(3, 0))
    if len(start):
        eos = line.before[-1]
        start = start.masked_fill(torch.tensor([eos, *line.ids]) == eos, 0.0)
    return Scored(line, logprob, entropy, rank, start)


class Reader:
    """Turns lines of text into the ids of a saved model's vocabulary."""

    def __init__(self, saved: Opened, path: str, plain: bool = False) -> None:
        self.codec = make_codec(saved.tokenizer, saved.vocab, f"--save {path}", plain)
        self.encoder = make_encoder(saved.vocab)
        self.eos = self.encoder.token_to_index[EOS]
        self.said_eos = False
        starts = [word == EOS or self.codec.starts_word(word) for word in saved.vocab]
        none = sum(starts) == 1  # `<eos>` alone: tokens carry no spaces
        # (V,): 0 for a token that starts a word, -inf for the others; empty where tokens carry no spaces.
        self.word_starts = torch.tensor([] if none else starts, device=saved.device).log()

    def encode(self, text: str, place: str) -> tuple[list[Token], list[int]]:
        tokens = self.codec.tokens(text)
        return tokens, encode_line(" ".join(token.piece for token in tokens), self.encoder, place)

    def line(self, number: int, text: str, place: str, context: str | None = None) -> Line:
        """Encodes a line. Raises UserError when a word is unknown and the vocabulary has no `<unk>`."""
        text, before = self.clean(text, place).rstrip(), [self.eos]
        if context is not None:
            before = [self.eos, *self.encode(self.clean(context, place).rstrip(), place)[1], self.eos]
        tokens, ids = self.encode(text, place)
        return Line(number, text, tokens, ids, sum(map(self.is_unknown, tokens)), before)

    def clean(self, text: str, place: str) -> str:
        """The text without a literal `<eos>` at its end, as the corpora are read; says so once."""
        clean = without_literal_eos(text)
        if len(clean) < len(text) and not self.said_eos:
            self.said_eos = say_literal_eos(place)
        return clean

    def is_unknown(self, token: Token) -> bool:
        return token.piece not in self.encoder.token_to_index or (token.piece == UNK != token.text)

    def show(self, token: Token) -> str:
        return f"{UNK} {' '.join(token.text.split())}" if self.is_unknown(token) else token.piece

    def windows(self, path: str, context: str | None) -> Iterator[list[Line]]:
        """The lines of a file that are not blank, each with the line of the same number in the file `context`.

        From a pipe, a window has the lines that have arrived.

        Raises:
            UserError: see `read_lines`; or the files differ in their number of lines.
        """
        contexts = read_lines(context) if context else None
        number = 0
        for group in read_line_groups(path):
            window: list[Line] = []
            for text in group:
                number += 1
                before = next(contexts, None) if contexts else None
                if contexts and before is None:
                    raise UserError(f"--context {context}: has no line {number}; give a line for each of {path}")
                if text.strip():
                    window.append(self.line(number, text, f"{path}, line {number}", before))
                if len(window) == WINDOW:
                    yield window
                    window = []
            if window:
                yield window
        if contexts and next(contexts, None) is not None:
            raise UserError(f"--context {context}: has more lines than {path}; give a line for each")


if __name__ == "__main__":
    not_a_command(__file__)
