"""The surprisal of text under a saved model, by line, token or word; minimal pairs and n-best lists.

    python score.py --save PTB.pt sentences.txt                   # a row per line
    python score.py --save PTB.pt sentences.txt --tokens          # a row per token
    python score.py --save PTB.pt article.txt --carry             # line after line, as one text
    python score.py --save PTB.pt sentences.txt --adaptive        # the model learns from each line after scoring it
    python score.py --save PTB.pt --pairs blimp.jsonl             # accuracy on minimal pairs, by paradigm
    python score.py --save PTB.pt --nbest lists.tsv --weight 0.5  # the best one of each list

A model with a tokenizer takes plain text. A model without one takes the form of its corpus: words with spaces between
them (in a character model of the Penn Treebank, characters with spaces between them and `_` for a space). A line is
scored after an `<eos>`, and the `<eos>` at its end is one of its tokens. Output: tab separated rows below a header;
the totals go to stderr. A token that is not in the vocabulary counts as unknown; --tokens shows it as `<unk> token`.

Surprisal is -log2 p, in bits. Entropy is that of the distribution before the token. Rank 1 is the likeliest token.
"""

import json
import math
import sys
from argparse import ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby

from corpus.read import EOS, read_corpus
from corpus.text import read_lines
from dynamiceval import DYNAMIC, MovingWeights, fill_in, find_statistics, weights_of
from harness.files import Opened, open_model
from harness.flags import PLAIN, SWITCH, Flag, number, parse_evaluation
from harness.log import ppl, unit_figures, unit_text, warn
from harness.script import run_script
from surprisal import Line, Reader, Scored, score_adaptively, score_apart, score_carried
from utils import UserError

Rows = Iterator[tuple[object, ...]]


def print_row(*cells: object) -> None:
    print(*(f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells), sep="\t")


def line_rows(scored: Scored, reader: Reader, unit: float) -> Rows:
    line, logprob = scored.line, scored.logprob.sum().item()
    tokens = len(line.ids) + 1
    yield line.number, tokens, line.unknown, f"{logprob:.4f}", f"{ppl(-logprob / tokens):.2f}"


def token_rows(scored: Scored, reader: Reader, unit: float) -> Rows:
    names = [*map(reader.show, scored.line.tokens), EOS]
    surprisal, entropy = -scored.logprob / unit, scored.entropy / unit
    figures = zip(names, surprisal.tolist(), entropy.tolist(), scored.rank.long().tolist(), strict=True)
    for position, row in enumerate(figures, start=1):
        yield scored.line.number, position, *row


def word_rows(scored: Scored, reader: Reader, unit: float) -> Rows:
    line, surprisal, first = scored.line, (-scored.logprob / unit).tolist(), 0
    words, position = line.text.split(), 0
    for position, (word, pieces) in enumerate(groupby(line.tokens, lambda token: token.word), start=1):
        last = first + len(list(pieces))
        yield line.number, position, words[word], last - first, sum(surprisal[first:last])
        first = last
    yield line.number, position + 1, EOS, 1, surprisal[first]


# mode: its header, the function that makes a line's rows, whether it needs entropy and rank
ROWS_OF = {
    "lines": (("line", "tokens", "unknown", "logprob", "ppl"), line_rows, False),
    "tokens": (("line", "position", "token", "surprisal", "entropy", "rank"), token_rows, True),
    "words": (("line", "position", "word", "pieces", "surprisal"), word_rows, False),
}


def print_lines(scored: Iterable[Scored], reader: Reader, mode: str, unit: float) -> None:
    """Prints the rows of all lines, and on stderr their totals."""
    header, rows_of, _ = ROWS_OF[mode]
    total: dict[str, float] = defaultdict(int)
    for line in scored:
        if not total:  # not earlier: now the file is known to be readable
            print_row(*header)
        total["loss"] -= line.logprob.sum().item()
        counts = {"lines": 1, "tokens": len(line.logprob), "unknown": line.line.unknown}
        counts |= {"words": len(line.line.text.split()) + 1, "characters": len(line.line.text) + 1}
        for name, count in counts.items():
            total[name] += count
        for row in rows_of(line, reader, unit):
            print_row(*row)
    sizes = " | ".join(f"{name} {total[name]}" for name in ("lines", "tokens", "unknown"))
    figures = f"logprob {-total['loss']:.4f} | ppl {ppl(total['loss'] / total['tokens']):.2f}"
    if reader.codec.splits_words:
        units = unit_figures(total["loss"], total["words"], total["characters"])
        figures += unit_text(units)
    print(f"| total | {sizes} | {figures}", file=sys.stderr)


HEADERS = [("good", "bad"), ("sentence_good", "sentence_bad")]  # header rows of two columns that are skipped


def read_pairs(path: str) -> Iterator[tuple[int, str, str, str]]:
    """Yields (number of the line, paradigm, good, bad) from BLiMP's JSON lines, or from two columns.

    Raises:
        UserError: see `read_lines`; or a line has neither form.
    """
    for i, line in enumerate(read_lines(path), start=1):
        if not line.strip() or (i == 1 and tuple(line.lower().split("\t")) in HEADERS):
            continue
        if not line.lstrip().startswith("{"):
            cells = line.split("\t")
            if len(cells) != 2:
                raise UserError(f"{path}, line {i}: has {len(cells)} columns; give a good and a bad sentence")
            yield i, "all", cells[0], cells[1]
            continue
        try:
            entry = json.loads(line)
            fields = tuple(entry[name] for name in ("UID", "sentence_good", "sentence_bad"))
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {i}: is not JSON; give BLiMP's lines, or two columns") from None
        except KeyError as error:
            raise UserError(f"{path}, line {i}: has no {error}; give BLiMP's fields") from None
        if not all(isinstance(cell, str) for cell in fields):
            raise UserError(f"{path}, line {i}: a field is no string; give BLiMP's fields")
        paradigm, good, bad = fields
        yield i, paradigm, good, bad


def print_pairs(saved: Opened, reader: Reader, path: str) -> None:
    """Prints the share of pairs whose good sentence has the higher probability, per paradigm and of all pairs."""
    paradigms: list[str] = []

    def lines() -> Iterator[Line]:
        for i, paradigm, *pair in read_pairs(path):
            paradigms.append(paradigm)
            for text in pair:
                yield reader.line(i, text, f"{path}, line {i}")

    right: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    alike = 0
    scored = score_apart(saved, lines(), False)
    for i, (good, bad) in enumerate(zip(scored, scored, strict=True)):
        names = {paradigms[i], "all"}
        pairs.update(names)
        alike += good.line.ids == bad.line.ids
        right.update(names if good.logprob.sum() > bad.logprob.sum() else ())
    if not pairs:
        raise UserError(f"{path}: has no pair; give BLiMP's lines, or two columns")
    print_row("paradigm", "pairs", "accuracy")
    for name in [*(name for name in dict.fromkeys(paradigms) if name != "all"), "all"]:
        print_row(name, pairs[name], right[name] / pairs[name])
    if alike:
        reason = "have the same tokens twice, as unknown words have, and count as wrong"
        warn(f"{path}: {alike} of {pairs['all']} pairs {reason}")


def print_best(saved: Opened, reader: Reader, path: str, weight: float) -> None:
    """Prints for each id the text with the highest score + weight · ln p(text).

    Raises:
        UserError: see `read_lines`; or a line is not an id, a number and a text.
    """
    given: list[tuple[str, float]] = []

    def lines() -> Iterator[Line]:
        for i, row in enumerate(read_lines(path), start=1):
            if not row.strip():
                continue
            cells = row.split("\t")
            if len(cells) != 3:
                raise UserError(f"{path}, line {i}: has {len(cells)} columns; give an id, a score and a text")
            try:
                given.append((cells[0], number(float, -1e38)(cells[1])))
            except ArgumentTypeError:
                raise UserError(f"{path}, line {i}: the score {cells[1]!r} is no number") from None
            yield reader.line(i, cells[2], f"{path}, line {i}")

    best: dict[str, tuple[str, float, float, float, str]] = {}
    for i, scored in enumerate(score_apart(saved, lines(), False)):
        (id, score), logprob = given[i], scored.logprob.sum().item()
        total = score + weight * logprob
        if id not in best or total > best[id][1]:
            best[id] = id, total, score, logprob, scored.line.text
    if not best:
        raise UserError(f"{path}: has no text; give lines of an id, a score and a text")
    print_row("id", "total", "score", "logprob", "text")
    for row in best.values():
        print_row(*row)


SCORES = [
    Flag("text", {"nargs": "?", "metavar": "FILE"}, None, "the text, - for stdin: one sentence per line"),
    Flag("--tokens", SWITCH, False, "a row per token: surprisal, entropy, rank"),
    Flag("--words", SWITCH, False, "a row per word (white space separates words): its tokens' summed surprisal"),
    PLAIN,
    Flag("--nats", SWITCH, False, "surprisal and entropy in nats (default: in bits)"),
    Flag("--carry", SWITCH, False, "line after line, as one text (default: each line from a fresh state)"),
    Flag("--context", {"metavar": "FILE"}, None, "read the line of the same number in FILE before each line"),
    Flag("--adaptive", SWITCH, False, "learn from each line after it was scored"),
    Flag("--pairs", {"metavar": "FILE"}, None, "minimal pairs: BLiMP's JSON lines, or a good and a bad column"),
    Flag("--nbest", {"metavar": "FILE"}, None, "lists to choose from: id, score, text"),
    Flag("--weight", {"type": number(float, -1e9, most=1e9)}, 1.0, "of the log-probability, beside the score"),
]


def check_uses(args: Namespace) -> None:
    """Raises UserError unless the flags go together."""
    outputs = [f"--{name}" for name in ("tokens", "words", "pairs", "nbest") if getattr(args, name)]
    ways = [f"--{name}" for name in ("carry", "adaptive", "context") if getattr(args, name)]
    if len(outputs) > 1:
        raise UserError(f"{' '.join(outputs)}: print different tables; give one of them")
    if bool(args.text) == bool(args.pairs or args.nbest):
        raise UserError("FILE, --pairs or --nbest: give one of them, the text to score")
    if (ways and not args.text) or (args.carry and args.context):
        raise UserError(f"{' '.join(outputs + ways)}: do not go together; leave one out")


def main() -> None:
    args = parse_evaluation(__doc__, ("scores", SCORES), ("with --adaptive", DYNAMIC))
    check_uses(args)
    saved = open_model(args)
    reader = Reader(saved, args.save, args.plain)
    if args.pairs:
        return print_pairs(saved, reader, args.pairs)
    if args.nbest:
        return print_best(saved, reader, args.nbest, args.weight)
    mode = "tokens" if args.tokens else "words" if args.words else "lines"
    with_entropy, lines = ROWS_OF[mode][2], reader.lines(args.text, args.context)
    if args.adaptive:
        fill_in(args, saved)
        corpus = read_corpus(args.data or saved.args.data, saved.vocab, tokenizer=saved.tokenizer)
        ms = find_statistics(saved, f"{args.save}.stats", corpus, args)
        moving = MovingWeights(weights_of(saved), ms, args.lr, args.lamb, args.epsilon)
        scored = score_adaptively(saved, lines, with_entropy, args.carry, moving, args.bptt)
    else:
        scored = (score_carried if args.carry else score_apart)(saved, lines, with_entropy)
    print_lines(scored, reader, mode, 1.0 if args.nats else math.log(2))


if __name__ == "__main__":
    run_script(main)
