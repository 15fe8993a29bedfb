"""Tables of a word per row, as reading times come: the same rows with the figures of the word added."""

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import NamedTuple

from corpus.forms import Table, read_table
from corpus.plain import Token
from corpus.read import EOS
from scoring.rows import END, Printer, Scorer, Total, Word, words_of
from surprisal import WINDOW, Line, Reader
from utils import UserError, not_a_command


class Story(NamedTuple):
    """Rows that are one text.

    line: their words, with an `<eos>` between sentences.
    counts: how many words (white space separates them) each row has.
    """

    line: Line
    rows: list[list[str]]
    counts: list[int]


def groups_of(rows: Iterable[tuple[int, list[str]]], column: int | None) -> Iterator[list[tuple[int, list[str]]]]:
    """Rows in groups that have the same cell in a column; None: all are one group."""
    for _, group in groupby(rows, key=lambda row: None if column is None else row[1][column]):
        yield list(group)


def read_stories(table: Table, reader: Reader, args: Namespace) -> Iterator[Story]:
    """The stories of a table; without --story each sentence is one, and without --sentence too the whole table.

    Raises:
        UserError: there is no such column; or the rows of a story or of its sentence do not stand together.
    """
    word = table.column(args.word, "--word")
    sentence = table.column(args.sentence, "--sentence") if args.sentence else None
    story = table.column(args.story, "--story") if args.story else None
    seen: set[str] = set()
    for rows in groups_of(table.rows, sentence if story is None else story):
        if story is not None:
            check_new(rows, story, seen, args.table, "story")
        sentences, within = [], set[str]()
        for group in groups_of(rows, sentence):
            if story is not None and sentence is not None:
                check_new(group, sentence, within, args.table, "sentence")
            sentences.append([cells for _, cells in group])
        yield make_story(sentences, word, reader, rows[0][0], f"{args.table}, line {rows[0][0]}")


def check_new(rows: list[tuple[int, list[str]]], column: int, seen: set[str], path: str, what: str) -> None:
    """Raises UserError when rows go on with what has ended before; adds its name to `seen`."""
    number, cells = rows[0]
    if cells[column] in seen:
        cure = f"the rows of a {what} have to stand together, and each of its words once"
        raise UserError(f"{path}, line {number}: the {what} {cells[column][:40]!r} begins again; {cure}")
    seen.add(cells[column])


def make_story(sentences: list[list[list[str]]], word: int, reader: Reader, number: int, place: str) -> Story:
    """A story of sentences of rows; `word`: the column of the words; the story begins in line `number`."""
    tokens: list[Token] = []
    ids: list[int] = []
    texts: list[str] = []
    counts: list[int] = []
    for rows in sentences:
        line = reader.line(number, " ".join(part for cells in rows for part in cells[word].split()), place)
        if ids and line.ids:
            tokens.append(Token(EOS, EOS, END))
            ids.append(reader.eos)
        tokens += [token._replace(word=token.word + sum(counts)) for token in line.tokens]
        ids += line.ids
        texts.append(line.text)
        counts += [len(cells[word].split()) for cells in rows]
    unknown = sum(map(reader.is_unknown, tokens))
    return Story(Line(number, " ".join(texts), tokens, ids, unknown, [reader.eos]), [*chain(*sentences)], counts)


def print_table(score: Scorer, reader: Reader, args: Namespace, closing: bool) -> None:
    """Prints the rows of a table with the figures of `Word` added; empty ones for a row without a token."""
    table, unit, total = read_table(args.table), 1.0 if args.nats else math.log(2), Total(reader, closing)
    stories, printer, names = read_stories(table, reader, args), Printer(delimiter=table.delimiter), Word._fields[1:]
    if twice := [name for name in names if name in table.header]:
        raise UserError(f"--table {args.table}: has a column {twice[0]} already; give it another name")
    printed = False
    while window := list(islice(stories, WINDOW)):
        for scored, story in zip(score([[story.line for story in window]], reader.word_starts), window, strict=True):
            if not printed:
                printer.row(*table.header, *names)
            printed = True
            if story.line.ids:
                total.add(scored)
            words, first = {word.number: word for word in words_of(scored, reader)}, 0
            for cells, count in zip(story.rows, story.counts, strict=True):
                own = [words[i] for i in range(first, first + count) if i in words]
                first += count
                printer.row(*cells, *(figures_of(own, unit) if own else [""] * len(names)))
    if not printed:
        raise UserError(f"--table {args.table}: has no row below its header; give a word per row")
    total.show()


def figures_of(words: list[Word], unit: float) -> list[object]:
    """The figures of a row, which can have several words: their sums, and the entropy before the first."""
    _, pieces, unknown, surprisal, whole, _ = map(sum, zip(*words, strict=True))
    return [pieces, unknown, surprisal / unit, whole / unit, words[0].entropy / unit]


if __name__ == "__main__":
    not_a_command(__file__)
