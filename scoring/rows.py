"""The rows that score.py prints of lines: one per line, per token or per word; and their totals."""

import csv
import io
import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from corpus.read import EOS
from harness.log import ppl, unit_figures, unit_text, warn
from surprisal import Line, Reader, Scored
from utils import UserError, not_a_command

END = -1  # as the word of a token: an `<eos>` between two sentences of a story
Rows = Iterator[tuple[object, ...]]
Scorer = Callable[[Iterable[list[Line]], Tensor | None], Iterator[Scored]]  # of windows of lines, and `detail`


class Printer:
    """Writes rows as csv does, with tabs: to stdout, or into a text in memory."""

    def __init__(self, file: io.StringIO | None = None, delimiter: str = "\t") -> None:
        self.writer = csv.writer(file or sys.stdout, delimiter=delimiter, lineterminator="\n")

    def row(self, *cells: object) -> None:
        # `+ 0.0`: -0.0 is written as 0
        self.writer.writerow([f"{round(cell, 6) + 0.0:.6f}" if isinstance(cell, float) else cell for cell in cells])


class Word(NamedTuple):
    """A word's figures, in nats; `number` as in `Token`.

    whole: the surprisal with the space counted to the word that it ends (Oh and Schuler 2024; Pimentel and Meister
        2024): of its tokens, given that a word starts there, and of a new word's start after them.
    entropy: before its first token.
    """

    number: int
    pieces: int
    unknown: int
    surprisal: float
    whole: float
    entropy: float


def words_of(scored: Scored, reader: Reader) -> Iterator[Word]:
    """The words of a line that have tokens, without `<eos>`."""
    logprob, entropy, start = scored.logprob.tolist(), scored.entropy.tolist(), scored.start.tolist()
    last = 0
    for number, pieces in groupby(scored.line.tokens, key=lambda token: token.word):
        tokens, first = list(pieces), last
        last = first + len(tokens)
        surprisal = -sum(logprob[first:last])
        whole = surprisal + start[first] - start[last]
        unknown = sum(map(reader.is_unknown, tokens))
        if number != END:
            yield Word(number, len(tokens), unknown, surprisal, whole, entropy[first])


def line_rows(scored: Scored, reader: Reader, unit: float, closing: bool) -> Rows:
    line, counted = scored.line, scored.logprob if closing else scored.logprob[:-1]
    logprob, tokens = counted.sum().item(), len(counted)
    yield line.number, tokens, line.unknown, f"{logprob:.4f}", f"{ppl(-logprob / max(1, tokens)):.2f}"


def token_rows(scored: Scored, reader: Reader, unit: float, closing: bool) -> Rows:
    names = [*map(reader.show, scored.line.tokens), *([EOS] if closing else [])]
    surprisal, entropy = -scored.logprob / unit, scored.entropy / unit
    figures = zip(names, surprisal.tolist(), entropy.tolist(), scored.rank.long().tolist(), strict=False)
    for position, row in enumerate(figures, start=1):
        yield scored.line.number, position, *row


def word_rows(scored: Scored, reader: Reader, unit: float, closing: bool) -> Rows:
    line, words, position = scored.line, scored.line.text.split(), 0
    for position, word in enumerate(words_of(scored, reader), start=1):
        figures = (x / unit for x in word[3:])
        yield line.number, position, words[word.number], word.pieces, word.unknown, *figures
    if closing:
        surprisal, whole = -scored.logprob[-1], scored.start[-1] - scored.logprob[-1]
        figures = ((x / unit).item() for x in (surprisal, whole, scored.entropy[-1]))
        yield line.number, position + 1, EOS, 1, 0, *figures


# mode: its header, the function that makes a line's rows
ROWS_OF = {
    "lines": (("line", "tokens", "unknown", "logprob", "ppl"), line_rows),
    "tokens": (("line", "position", "token", "surprisal", "entropy", "rank"), token_rows),
    "words": (("line", "position", "word", "pieces", "unknown", "surprisal", "whole", "entropy"), word_rows),
}


class Total:
    """The sums over all lines; `closing`: whether the `<eos>` at a line's end counts."""

    def __init__(self, reader: Reader, closing: bool) -> None:
        self.reader, self.closing = reader, closing
        self.counts: Counter[str] = Counter()
        self.loss = self.eos_loss = 0.0  # in nats

    def add(self, scored: Scored) -> None:
        line = scored.line
        ends = [i for i, token in enumerate(line.tokens) if token.word == END] + [len(line.tokens)]
        eos_loss = -scored.logprob[ends].sum().item()
        self.eos_loss += eos_loss
        self.loss -= scored.logprob.sum().item() + (0.0 if self.closing else eos_loss)
        lines = len(ends)
        self.counts.update(lines=lines, tokens=len(scored.logprob) - lines, unknown=line.unknown)
        self.counts.update(words=len(line.text.split()), characters=len(line.text) - (lines - 1))

    def show(self) -> None:
        """Prints the totals on stderr, and what the `<eos>` cost if that is a lot."""
        counts, vocabulary = self.counts, len(self.reader.encoder.token_to_index)
        eos = self.eos_loss / max(1, counts["lines"])
        if eos > math.log(16 * vocabulary):  # far from chance, which an untrained model is near
            reason = "the model has hardly seen it, or these lines are none of its kind"
            cure = "--eos skip leaves it out" if self.closing else "it is left out, but each line is read after one"
            warn(f"{EOS} costs {eos / math.log(2):.1f} bits, far more than a random token: {reason}; {cure}")
        if self.closing:
            counts.update(dict.fromkeys(("tokens", "words", "characters"), counts["lines"]))
        sizes = " | ".join(f"{name} {counts[name]}" for name in ("lines", "tokens", "unknown"))
        figures = f"logprob {-self.loss:.4f} | ppl {ppl(self.loss / max(1, counts['tokens'])):.2f}"
        if self.reader.codec.splits_words and counts["words"]:
            figures += unit_text(unit_figures(self.loss, counts["words"], counts["characters"]))
        print(f"| total | {sizes} | {figures}", file=sys.stderr)


def print_lines(score: Scorer, reader: Reader, args: Namespace, closing: bool) -> None:
    """Prints the rows of all lines as they are scored, and on stderr their totals."""
    mode = "tokens" if args.tokens else "words" if args.words else "lines"
    detail = {"lines": None, "tokens": reader.word_starts[:0], "words": reader.word_starts}[mode]
    (header, rows_of), total = ROWS_OF[mode], Total(reader, closing)
    printer, unit = Printer(), 1.0 if args.nats else math.log(2)
    for scored in score(reader.windows(args.text, args.context), detail):
        if not total.counts:  # not earlier: now the file is known to be readable
            printer.row(*header)
        total.add(scored)
        for row in rows_of(scored, reader, unit, closing):
            printer.row(*row)
        if args.text == "-":  # somebody may be waiting for the answer
            sys.stdout.flush()
    if not total.counts:
        raise UserError(f"{args.text}: has blank lines only; give a text")
    total.show()


if __name__ == "__main__":
    not_a_command(__file__)
