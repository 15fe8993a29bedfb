"""The forms of what score.py takes beside lines of text: minimal pairs, lists of hypotheses, tables of a word per row.

All are read by corpus/text.py. The first line that is not blank decides the form, and every other has to have it.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from corpus.text import read_lines
from utils import UserError

# What the good and the bad sentence are called, as fields of JSON lines or in the header of a table.
SENTENCES = [
    ("sentence_good", "sentence_bad"),  # BLiMP and BabyLM
    ("good", "bad"),
    ("good_sentence", "bad_sentence"),
    ("grammatical", "ungrammatical"),
    ("acceptable", "unacceptable"),
    ("good_continuation", "bad_continuation"),  # after a prefix
]
PARADIGMS = ("uid", "paradigm", "phenomenon", "case")
MASK = "***mask***"  # the place of the verb in Goldberg's version of Linzen's sentences
WHAT = "BLiMP's JSON lines, or a good and a bad sentence with a tab between them"
SUFFIXES = (".jsonl", ".json", ".tsv", ".csv")  # of the files that are taken from a folder


class Pair(NamedTuple):
    """A minimal pair: the file and the line that it stands in, and its two sentences.

    prefix: whether the sentences stop in the middle, after the word that is compared.
    """

    path: str
    number: int
    paradigm: str
    good: str
    bad: str
    prefix: bool = False

    @property
    def place(self) -> str:
        return f"{self.path}, line {self.number}"


class Hypothesis(NamedTuple):
    """A text of a list to choose from; `id` is that of the list, `place` its file and line."""

    place: str
    id: str
    scores: list[float]
    text: str


def find_pair_files(sources: Sequence[str]) -> list[str]:
    """The files, and those of the folders.

    Raises:
        UserError: a folder has no file of pairs.
    """
    files: list[str] = []
    for source in sources:
        if not Path(source).is_dir():
            files.append(source)
            continue
        inside = sorted(str(path) for path in Path(source).rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not inside:
            raise UserError(f"--pairs {source}: is a folder without a file of pairs, {' '.join(SUFFIXES)}")
        files += inside
    return files


def read_pairs(path: str) -> Iterator[Pair]:
    """The pairs of a file; a pair without a paradigm has the file's name as its own.

    Raises:
        UserError: see `read_lines`; or a line has another form.
    """
    if path.endswith(".csv"):
        rows: Iterator[tuple[int, list[str] | str]] = csv_rows(path)
    else:
        rows = ((i, line) for i, line in enumerate(read_lines(path), start=1) if line.strip())
    header: list[str] | None = None
    width = 0
    for number, row in rows:
        place, paradigm = f"{path}, line {number}", Path(path).stem
        if isinstance(row, str) and row.lstrip().startswith("{"):
            found = named_pair(read_json(row, place), place)
        else:
            cells = split_cells(row) if isinstance(row, str) else row
            if not width:
                width, header = len(cells), header_of(cells, place)
                if header is not None:
                    continue
            if len(cells) != width:
                raise UserError(f"{place}: has {len(cells)} columns, and the first line {width}; give {WHAT}")
            if header and any(good in header for good, _ in SENTENCES):
                found = named_pair(dict(zip(header, cells, strict=True)), place)
            else:
                found = pair_of_cells(cells, place)
        own, good, bad, prefix = found
        for text in (good, bad, own or ""):
            check_characters(text, place)
        if not (good.strip() and bad.strip()):
            raise UserError(f"{place}: has an empty sentence; give {WHAT}")
        yield Pair(path, number, paradigm if own is None else own, good, bad, prefix)
    if header and not any(good in header for good, _ in SENTENCES):
        print(f"{path}: its first row, {' '.join(header)!r}, is taken as a header, not as a pair", file=sys.stderr)


def header_of(cells: list[str], place: str) -> list[str] | None:
    """The names of the columns, in lower case, if the first row of a table has names."""
    names = [cell.strip().lower() for cell in cells]
    if any(good in names and bad in names for good, bad in SENTENCES):
        return names
    if "verb_index" in names:
        raise UserError(
            f"{place}: Linzen's table has one form of each verb; give a table with both, as Goldberg's lgd_dataset.tsv"
        )
    if len(cells) in (2, 4, 5) and all(len(name.split()) == 1 for name in names) and names[0] not in ("true", "false"):
        return names
    return None


def named_pair(fields: Mapping[str, object], place: str) -> tuple[str | None, str, str, bool]:
    """The paradigm (None without one), good, bad, and whether they follow a prefix, of a JSON line or a named row."""
    fields = {name.lower(): value for name, value in fields.items()}
    for good, bad in SENTENCES:
        if good in fields and bad in fields:
            break
        if good in fields or bad in fields:
            raise UserError(f"{place}: has no {bad if good in fields else good}; give {WHAT}")
    else:
        raise UserError(f"{place}: has no {SENTENCES[0][0]}; give {WHAT}")
    paradigm = next((fields[name] for name in PARADIGMS if name in fields), None)
    prefix = fields.get("prefix", "") if good != SENTENCES[0][0] else ""
    if not all(isinstance(text, str) for text in (fields[good], fields[bad], paradigm or "", prefix)):
        raise UserError(f"{place}: a field is no string; give {WHAT}")
    first, second = (f"{prefix} {fields[name]}".strip() if prefix else str(fields[name]) for name in (good, bad))
    return None if paradigm is None else str(paradigm), first, second, bool(prefix)


def pair_of_cells(cells: list[str], place: str) -> tuple[str | None, str, str, bool]:
    """The same of a row of a table without a header."""
    if cells[0].strip().lower() in ("true", "false"):
        raise UserError(f"{place}: rows of True or False, as in CLAMS, are no pairs; give {WHAT}")
    if len(cells) == 2:
        return None, cells[0], cells[1], False
    if len(cells) == 4:  # Marvin and Linzen: construction, case, good, bad
        return cells[0], cells[2], cells[3], False
    if len(cells) == 5 and MASK in cells[2]:  # Linzen: attractors, sentence, the same with a mask, its verb, the other
        before = cells[2].partition(MASK)[0]
        return f"{cells[0]} attractors", before + cells[3], before + cells[4], True
    raise UserError(f"{place}: has {len(cells)} columns; give {WHAT}, or a header that names the columns good and bad")


def read_json(line: str, place: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UserError(f"{place}: is not JSON; give {WHAT}")
    return entry


def check_characters(text: str, place: str) -> None:
    """Raises UserError for half a character (a lone surrogate), which JSON can hold and UTF-8 cannot."""
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise UserError(f"{place}: has half a character, \\u{ord(half[0]):x}; mend the line or leave it out")


def read_hypotheses(path: str) -> Iterator[Hypothesis]:
    """The texts of lists: an id, scores and a text with tabs between them; or those of Moses and Marian, or of Kaldi.

    Raises:
        UserError: see `read_lines`; or a line has another form.
    """
    split, scores = None, 0
    for number, line in enumerate(read_lines(path), start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        if split is None:
            split = split_moses if "|||" in line else split_tabs if "\t" in line else split_kaldi
            scores = len(split(line, place).scores)
        found = split(line, place)
        if len(found.scores) != scores:
            raise UserError(f"{place}: has {len(found.scores)} scores, and the first line {scores}; give all alike")
        yield found


def split_tabs(line: str, place: str) -> Hypothesis:
    """id, one or more scores, text."""
    id, *scores, text = split_cells(line)
    if not scores:
        raise UserError(f"{place}: has {line.count(chr(9)) + 1} columns; give an id, a score and a text")
    return Hypothesis(place, id, [read_score(score, place) for score in scores], text.strip())


def split_moses(line: str, place: str) -> Hypothesis:
    """id ||| text ||| features ||| score, as Moses, Marian and fairseq write them; without features too."""
    cells = [cell.strip() for cell in line.split("|||")]
    if len(cells) < 3:
        raise UserError(f"{place}: has {len(cells)} parts between |||; give id ||| text ||| features ||| score")
    return Hypothesis(place, cells[0], [read_score(cells[3] if len(cells) > 3 else cells[2], place)], cells[1])


def split_kaldi(line: str, place: str) -> Hypothesis:
    """utterance-n text, as Kaldi writes them, without a score; the text may be empty."""
    name, _, text = line.strip().partition(" ")
    numbered = re.fullmatch(r"(.+)-\d+", name)
    if not numbered:
        raise UserError(
            f"{place}: {name[:40]!r} begins no list; give id<TAB>score<TAB>text, Moses's id ||| text ||| features ||| "
            "score, or Kaldi's utterance-n text"
        )
    return Hypothesis(place, numbered[1], [], text.strip())


def read_score(text: str, place: str) -> float:
    """A score; -inf is one, nan and inf are none."""
    try:
        score = float(text)
    except ValueError:
        raise UserError(f"{place}: the score {text[:40]!r} is no number") from None
    if math.isnan(score) or score == math.inf or (math.isfinite(score) and abs(score) > 1e38):
        raise UserError(f"{place}: the score {text!r} is out of range; give a number or -inf")
    return score


class Table(NamedTuple):
    """A table: its file, delimiter, the names of its columns, and its rows, each with its line in the file."""

    path: str
    delimiter: str
    header: list[str]
    rows: Iterator[tuple[int, list[str]]]

    def column(self, name: str, flag: str) -> int:
        """The place of a column; UserError if there is none of that name."""
        if self.header.count(name) != 1:
            problem = "has several columns of this name" if name in self.header else "has no such column"
            raise UserError(f"{flag} {name}: {self.path} {problem}; its columns are {' '.join(self.header)}")
        return self.header.index(name)


def read_table(path: str) -> Table:
    """A table with a header: separated by commas if its name ends in .csv, else by tabs. Cells can be quoted.

    Raises:
        UserError: see `read_lines`; or a row has another number of columns than the header.
    """
    comma = path.endswith(".csv")
    rows = csv_rows(path) if comma else tab_rows(path)
    _, header = next(rows, (0, []))
    if len(header) < 1 or not any(header):
        raise UserError(f"--table {path}: has no header; give a table whose first row names its columns")

    def checked() -> Iterator[tuple[int, list[str]]]:
        for number, cells in rows:
            if len(cells) != len(header):
                hint = "; in R, write it with row.names = FALSE" if len(cells) == len(header) + 1 else ""
                raise UserError(f"{path}, line {number}: has {len(cells)} columns, and the header {len(header)}{hint}")
            yield number, cells

    return Table(path, "," if comma else "\t", header, checked())


def csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file of comma separated values that are not empty."""
    reader = csv.reader(f"{line}\n" for line in read_lines(path))
    try:
        for cells in reader:
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; give comma separated values") from None


def tab_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file of tab separated values that are not empty; R quotes all text, the header too."""
    all_quoted = None
    for number, line in enumerate(read_lines(path), start=1):
        if all_quoted is None:
            all_quoted = all(is_quoted(cell) for cell in line.split("\t"))
        if line.strip() and all_quoted:  # R writes a quotation mark as \" or as ""
            yield number, next(csv.reader([line.replace('\\"', '""')], delimiter="\t"))
        elif line.strip():
            yield number, split_cells(line)


def is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def split_cells(line: str) -> list[str]:
    """The cells of a line between tabs; one that csv has quoted, with doubled marks inside, is taken out of its quotes.

    A `"` alone is text, and begins no cell that goes on over the next lines, as it would for the module csv.
    """
    cells = []
    for cell in line.split("\t"):
        inner = cell[1:-1] if is_quoted(cell) else ""
        rest = inner.replace('""', "")
        cells.append(inner.replace('""', '"') if '"' not in rest and len(rest) < len(inner) else cell)
    return cells
