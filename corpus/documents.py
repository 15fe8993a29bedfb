"""The texts that prepare.py reads: their documents, and the division of these among train, valid and test.

A document goes whole to one of the three. Documents are files, blocks between blank lines, lines, what a mark
separates, or (position) pieces of one text in their order, so that each of the three is one stretch of it.
"""

import itertools
import shutil
import sys
from argparse import Namespace
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from corpus.read import say_literal_eos, without_literal_eos
from corpus.text import open_text, read_blocks, read_lines, read_pieces
from utils import UserError

TRAIN, VALID, TEST = range(3)
LARGEST = 0.25  # of the text: the largest document that valid or test gets if every document exceeds its share


class Piece(NamedTuple):
    """A line, or a piece of a long one."""

    split: int
    text: str
    ends: bool = True  # whether its line ends with it


class Files:
    """The files that the arguments of the command line stand for.

    spool: a folder for copies of stdin and pipes, because a text is read several times.
    """

    def __init__(self, spool: Path) -> None:
        self.spool = spool
        self.names: dict[str, str] = {}  # a copy's path -> what it is a copy of, for errors
        self.in_folders: set[Path] = set()
        self.paths: list[Path] = []  # of the text that is dealt out

    def find(self, source: str) -> list[Path]:
        """A file, a copy of a pipe or of stdin (`-`), or the files of a folder by name, without hidden ones.

        Raises:
            UserError: a folder holds no file.
        """
        path = Path(source)
        if path.is_dir():
            visible = (p for p in path.rglob("*") if not any(x.startswith(".") for x in p.relative_to(path).parts))
            inside = sorted(filter(Path.is_file, visible))
            if not inside:
                raise UserError(f"{source}: is a folder without a file; give texts")
            self.in_folders.update(inside)
            return inside
        return [self.copy(source) if source == "-" or (path.exists() and not path.is_file()) else path]

    def copy(self, source: str) -> Path:
        """A copy of a text that can be read only once."""
        path = self.spool / str(len(self.names))
        self.names[str(path)] = "stdin" if source == "-" else source
        with open_text(source) as pipe, open(path, "wb") as file:
            shutil.copyfileobj(pipe, file)
        return path

    def named(self, message: str) -> str:
        """A message with the name of a source instead of its copy's."""
        for path, name in self.names.items():
            message = message.replace(path, name)
        return message


class Source:
    """The lines of all texts, read again in every pass, and the split that each document belongs to.

    Args:
        files: the text whose documents are divided among the splits.
        given: another text for a split (--valid_file, --test_file).
        args: the settings.
        words: the tokens are words, so blank lines are left out; characters and subwords keep one after each
            paragraph, so that a model can write it.
    """

    def __init__(self, files: Files, given: dict[int, Path], args: Namespace, words: bool) -> None:
        self.files, self.given, self.unwrap, self.mark = files.paths, given, args.unwrap, args.document_mark
        self.documents = args.documents or ("files" if len(files.paths) > 1 else "blocks")
        if self.mark:
            self.documents = "stories between marks"
        self.may_be_empty = files.in_folders
        self.empty: set[Path] = set()  # of these, those that are
        self.said: set[Path] = set()  # those with a literal `<eos>`
        self.blanks = not (words or args.unwrap or self.documents == "lines")
        self.size = sum(path.stat().st_size for path in [*self.files, *given.values()] if path.is_file())
        self.splits: np.ndarray | None = None  # of document after document, once they are dealt

    def read(self, title: str) -> Iterator[Piece]:
        """Yields what is dealt out first, then what is given."""
        with self.progress(title) as bar:
            before, cut = TRAIN, False  # `cut`: within a line
            for document, text, ends in self.read_documents(bar):
                split = TRAIN if self.splits is None else int(self.splits[document])
                if cut and split != before:  # position: the rest of the line begins another text
                    text = text.lstrip(" ")
                before, cut = split, not ends
                yield Piece(split, text, ends or self.is_last_of_split(document))
            for split, path in self.given.items():
                for line in self.read_file(path, bar):
                    if line is not None:
                        yield Piece(split, line)

    def is_last_of_split(self, document: int) -> bool:
        """Whether the next document belongs to another split, or there is none."""
        if self.splits is None:
            return False
        return document + 1 == len(self.splits) or bool(self.splits[document] != self.splits[document + 1])

    def progress(self, title: str) -> tqdm:
        """A bar over the bytes read, where there is a terminal to show it."""
        look = {"unit": "B", "unit_scale": True, "leave": False, "disable": not sys.stderr.isatty()}
        return tqdm(total=self.size, desc=title, **look)

    def read_documents(self, bar: tqdm) -> Iterator[tuple[int, str, bool]]:
        """Yields (number of the document, from 0; a line or a piece of it; whether the line ends with it)."""
        document = 0
        for path in self.files:
            if self.documents == "position":
                at_start, after_blank = True, True
                for piece in read_pieces(path, bar):
                    ends = piece.endswith("\n")
                    text = self.without_eos(path, piece).rstrip() if ends else piece
                    blank = at_start and ends and not text
                    if not blank or (self.blanks and not after_blank):
                        yield document, text, ends
                        document += 1
                    at_start, after_blank = ends, blank
                continue
            for line in self.read_file(path, bar):
                if line is None:
                    document += 1
                    continue
                yield document, line, True
                document += self.documents == "lines" or (self.documents == "blocks" and not line)
            document += self.documents in ("files", "stories between marks")

    def read_file(self, path: Path, bar: tqdm) -> Iterator[str | None]:
        """The lines of a text, with one blank line after each paragraph, or without any; None for each mark."""
        paragraph: list[str] = []
        begun, needed = False, self.blanks or self.documents == "blocks"
        for line in itertools.chain(self.read_parts(path, bar), [""]):
            text = (line or "").rstrip()
            if text and self.unwrap:
                paragraph.append(text.strip())
            elif text:
                yield text
            elif begun:
                if self.unwrap:
                    yield " ".join(paragraph)
                    paragraph.clear()
                if needed:
                    yield ""
            if line is None:
                yield None
            begun = bool(text)

    def read_parts(self, path: Path, bar: tqdm) -> Iterator[str | None]:
        """The lines of a text; where they hold the mark, what lies beside it, and None for the mark."""
        if path in self.may_be_empty and not any(map(str.strip, read_blocks(path))):
            self.empty.add(path)
            return
        for line in read_lines(path, bar):
            text = self.without_eos(path, line)
            for i, part in enumerate(text.split(self.mark) if self.mark else [text]):
                if i:
                    yield None
                yield part

    def without_eos(self, path: Path, line: str) -> str:
        """A line without a literal `<eos>` at its end, and a line on stderr for the first one of a text."""
        text = without_literal_eos(line)
        if text is not line and path not in self.said:
            self.said.add(path)
            say_literal_eos(path)
        return text

    def deal(self, shares: dict[int, float], seed: int) -> None:
        """Divides the documents: its share of the text to each split of `shares`, the rest to train.

        Raises:
            UserError: there are too few documents, or each has too much of the text.
        """
        sizes = array("q")
        with self.progress("dealing") as bar:
            for document, text, _ in self.read_documents(bar):
                sizes.extend([0] * (document + 1 - len(sizes)))
                sizes[document] += len(text) + 1
        order = np.random.default_rng(seed).permutation(len(sizes)).tolist()
        order = [document for document in order if sizes[document]]
        others = "--documents lines or position, or --valid_file and --test_file"
        if len(order) <= len(shares):
            raise UserError(
                f"{self.files[0]}: too few {self.documents} ({len(order)}) for {len(shares) + 1} texts; give more, "
                f"{others}"
            )
        if self.documents == "position":
            self.splits = deal_by_position(np.array(sizes), shares)
            return
        self.splits = deal_in_turn(sizes, order, shares)
        if any(split not in self.splits for split in shares):  # one took all that is small
            self.splits = deal_to_the_poorest(sizes, order, shares)
        for split in shares:
            if split not in self.splits:  # every document is larger than the share: take the smallest
                smallest = min((d for d in order if self.splits[d] == TRAIN), key=sizes.__getitem__)
                if sizes[smallest] > LARGEST * sum(sizes):
                    raise UserError(
                        f"{self.files[0]}: its {self.documents} are too large to deal out, the smallest one left has "
                        f"{sizes[smallest] / sum(sizes):.0%} of the text; give {others}"
                    )
                self.splits[smallest] = split


def deal_by_position(sizes: np.ndarray, shares: dict[int, float]) -> np.ndarray:
    """Train first, then valid, then test: the split of each document, by where its middle lies."""
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    splits = np.full(len(sizes), TRAIN, np.int8)
    end = 1.0
    for split, share in sorted(shares.items(), reverse=True):
        splits[(middles < end) & (middles >= end - share)] = split
        end -= share
        if split not in splits:  # the text is short
            splits[np.flatnonzero(splits == TRAIN)[-1]] = split
    return splits


def deal_in_turn(sizes: Sequence[int], order: list[int], shares: dict[int, float]) -> np.ndarray:
    """The documents in this order: one split takes all that still fit into its share, then the next one does."""
    splits = np.full(len(sizes), TRAIN, np.int8)
    for split, share in shares.items():
        room = share * sum(sizes)
        for document in order:
            if splits[document] == TRAIN and sizes[document] <= room:
                splits[document] = split
                room -= sizes[document]
    return splits


def deal_to_the_poorest(sizes: Sequence[int], order: list[int], shares: dict[int, float]) -> np.ndarray:
    """The documents in this order, each to the split that lacks most of its share, if it fits there."""
    splits = np.full(len(sizes), TRAIN, np.int8)
    room = {split: share * sum(sizes) for split, share in shares.items()}
    for document in order:
        split = max(room, key=lambda split: room[split] / shares[split])
        if sizes[document] <= room[split]:
            splits[document] = split
            room[split] -= sizes[document]
    return splits
