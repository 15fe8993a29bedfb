"""Text to words: UTF-8 files of any size, with lines of any length, in bounded memory.

    python -c "import words; print(next(words.read_words('data/penn/valid.txt'))[:20])"

A word is what `str.split` makes one; a line ends at a newline (a carriage return before it is white space).
"""

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

from utils import UserError

EOS = "<eos>"
UNK = "<unk>"
BLOCK = 1 << 18  # bytes worked on at once: few enough that a block's words stay in the CPU's cache


def read_words(path: str | Path, seen: Callable[[bytes], None] = lambda block: None) -> Iterator[list[str]]:
    """Yields the words of a file, `<eos>` after each line, a block at a time; `seen` gets the raw blocks.

    Memory is bounded by the longest word, whatever the length of a line.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    unfinished: list[str] = []  # pieces of a word that no white space has ended yet
    text = "\n"
    for text in _decoded(path, seen):
        words = text.replace("\n", f" {EOS} ").split()
        if unfinished:
            if text[0].isspace():
                words.insert(0, "".join(unfinished))
            elif len(words) > 1 or text[-1].isspace():
                words[0] = "".join((*unfinished, words[0]))
            else:  # one word fills the block; joined only once it ends, or a long word would cost n² time
                unfinished.append(words[0])
                continue
        unfinished = [] if text[-1].isspace() else [words.pop()]
        if words:
            yield words
    if unfinished:
        yield ["".join(unfinished)]
    if text[-1] != "\n":
        yield [EOS]  # a missing final newline still ends the line


def _decoded(path: str | Path, seen: Callable[[bytes], None]) -> Iterator[str]:
    """Yields a UTF-8 file in non-empty blocks, without the byte order mark at its start."""
    start, line, pending = 0, 1, b""  # `pending` begins at this byte and line of the file
    try:
        with open(path, "rb") as file:
            block = pending = file.read(BLOCK)
            seen(block)
            if pending.startswith(codecs.BOM_UTF8):
                start, pending = len(codecs.BOM_UTF8), pending.removeprefix(codecs.BOM_UTF8)
            while block or pending:
                text, used = codecs.utf_8_decode(pending, "strict", not block)
                if text:
                    yield text
                start, line = start + used, line + pending.count(b"\n", 0, used)
                block = file.read(BLOCK)
                seen(block)
                pending = pending[used:] + block
    except UnicodeDecodeError as error:
        line += pending.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}: not UTF-8 at byte {start + error.start}, line {line}; convert the file, e.g. with iconv"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
