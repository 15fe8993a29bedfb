"""Which text is the likelier one: accuracy on minimal pairs, and the best text of each list of hypotheses."""

import io
import math
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from corpus.forms import Hypothesis, Pair, find_pair_files, read_hypotheses, read_pairs
from harness.files import check_writable, write
from harness.log import warn
from scoring.rows import Printer, Scorer
from surprisal import WINDOW, Reader, Scored
from utils import UserError, not_a_command


def sum_of(scored: Scored, closing: bool, prefix: bool = False) -> float:
    """A line's log-probability, in nats, with or without its closing `<eos>`.

    prefix: the line stops after a word; the word's end is then part of it, so that `is` is not also the start of `isn`.
    """
    if closing:
        return scored.logprob.sum().item()
    return scored.logprob[:-1].sum().item() + (scored.start[-1].item() if prefix else 0.0)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, right / count
    middle, width = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, (middle - width) / (1 + z * z / count)), min(1.0, (middle + width) / (1 + z * z / count))


class Judged(NamedTuple):
    """A pair and the log-probabilities of its sentences, in nats. The same tokens twice are a tie, and never right."""

    pair: Pair
    good: float
    bad: float
    tie: bool

    @property
    def right(self) -> bool:
        return not self.tie and self.good > self.bad


def judge_pairs(score: Scorer, reader: Reader, path: str, closing: bool) -> Iterator[Judged]:
    """The pairs of a file, many side by side."""
    found = read_pairs(path)
    while window := list(islice(found, WINDOW // 2)):
        lines = [reader.line(pair.number, text, pair.place) for pair in window for text in (pair.good, pair.bad)]
        scored = score([lines], reader.word_starts if any(pair.prefix for pair in window) else None)
        for pair, first, second in zip(window, scored, scored, strict=True):
            good, bad = (sum_of(x, closing, pair.prefix) for x in (first, second))
            yield Judged(pair, good, bad, first.line.ids == second.line.ids or good == bad)


def print_pairs(score: Scorer, reader: Reader, args: Namespace, closing: bool) -> None:
    """Prints the share of pairs whose good sentence has the higher log-probability, per paradigm and of all pairs."""
    paths = find_pair_files(args.pairs)
    if args.rows:
        check_writable(args.rows, "--rows")
        if os.path.realpath(args.rows) in map(os.path.realpath, [args.save, *paths]):
            raise UserError(f"--rows {args.rows}: is a file that is read; give another name")
    file = io.StringIO()
    rows = Printer(file)
    rows.row("path", "line", "paradigm", "good", "bad", "logprob_good", "logprob_bad", "right", "tie")
    pairs, right, ties = Counter[str](), Counter[str](), Counter[str]()
    for path in paths:
        for judged in judge_pairs(score, reader, path, closing):
            for name in {judged.pair.paradigm, "all"}:
                pairs[name] += 1
                right[name] += judged.right
                ties[name] += judged.tie
            rows.row(*judged.pair[:5], judged.good, judged.bad, int(judged.right), int(judged.tie))
    if not pairs:
        raise UserError(f"--pairs {' '.join(args.pairs)}: has no pair; give BLiMP's lines, or two columns")
    printer = Printer()
    printer.row("paradigm", "pairs", "accuracy", "low", "high", "ties")
    for name in [*(name for name in pairs if name != "all"), "all"]:
        printer.row(name, pairs[name], right[name] / pairs[name], *wilson(right[name], pairs[name]), ties[name])
    if ties["all"]:
        reason = "have the same tokens twice, as unknown words have; they do not count as right"
        warn(f"{ties['all']} of {pairs['all']} pairs {reason}")
    if args.rows:
        write(args.rows, lambda out: out.write(file.getvalue().encode()))


def print_hypotheses(score: Scorer, reader: Reader, args: Namespace, closing: bool) -> None:
    """Prints for each id the text with the highest total, or with --all every text.

    The total is the score (with several, their sum, weighted) + weight · ln p(text) + bonus · words.
    """
    best: dict[str, tuple[float, float, float, str]] = {}
    found, printer, header = read_hypotheses(args.nbest), Printer(), ("id", "total", "score", "logprob", "text")
    for hypothesis, scored in score_hypotheses(score, reader, found):
        weights = args.score_weights or [1.0] * len(hypothesis.scores)
        if len(weights) != len(hypothesis.scores):
            problem = f"has {len(hypothesis.scores)} scores, and --score_weights {len(weights)}"
            raise UserError(f"{hypothesis.place}: {problem}; give a weight for each")
        impossible = -math.inf in hypothesis.scores  # whatever its weight: 0 · -inf is no number
        own = -math.inf if impossible else math.fsum(w * x for w, x in zip(weights, hypothesis.scores, strict=True))
        logprob, words = sum_of(scored, closing), len(hypothesis.text.split())
        total = own + args.weight * logprob + args.length_bonus * words
        row = total, own, logprob, hypothesis.text
        if args.all:
            more = hypothesis.scores if len(hypothesis.scores) > 1 else []
            if not best:
                printer.row(*header, *(f"score{i}" for i in range(1, len(more) + 1)))
            printer.row(hypothesis.id, *row, *more)
        if hypothesis.id not in best or total > best[hypothesis.id][0]:
            best[hypothesis.id] = row
    if not best:
        raise UserError(f"{args.nbest}: has no text; give lines of an id, a score and a text")
    if not args.all:
        printer.row(*header)
        for id, row in best.items():
            printer.row(id, *row)


def score_hypotheses(score: Scorer, reader: Reader, found: Iterator[Hypothesis]) -> Iterator[tuple[Hypothesis, Scored]]:
    while window := list(islice(found, WINDOW)):
        lines = [reader.line(i, hypothesis.text, hypothesis.place) for i, hypothesis in enumerate(window)]
        yield from zip(window, score([lines], None), strict=True)


if __name__ == "__main__":
    not_a_command(__file__)
