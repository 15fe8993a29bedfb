"""Files to text: the only place where bytes become characters, so that all scripts read a file alike.

A text is UTF-8. A byte order mark is left out at the start of any line, as joined files have it in the middle. A line
ends at a newline, and at nothing else. What would become another text than its author sees is refused, and named.
"""

import codecs
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from utils import UserError

BLOCK = 1 << 18  # bytes read at once; the words of one block fit the CPU's cache
PIECE = 1000  # characters of a long line at once
MARK = "\ufeff"  # the byte order mark
# How files begin that are no UTF-8, longer signatures first; and what to do.
SIGNATURES = {
    b"\xff\xfe\0\0": ("UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    b"\xff\xfe": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\x1f\x8b": ("compressed by gzip", "pipe it in: zcat FILE"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "pipe it in: zstdcat FILE"),
    b"\xfd7zXZ\0": ("compressed by xz", "pipe it in: xzcat FILE"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"%PDF-": ("a PDF", "extract its text, e.g. with pdftotext"),
}


class HashingBar(tqdm):
    """A bar over the bytes of texts that also takes the sha256 of the text that is being read."""

    sha256: Any  # set before each text


def open_text(path: str | Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file's bytes; `-` is stdin, which stays open."""
    return contextlib.nullcontext(sys.stdin.buffer) if str(path) == "-" else open(path, "rb")


def read_blocks(path: str | Path, bar: tqdm | None = None) -> Iterator[str]:
    """The text of a file in blocks; from a pipe each one is what has arrived. `bar` counts bytes, and can hash them.

    Raises:
        UserError: the file cannot be read, is not UTF-8, has a NUL, or has lines that end in a carriage return alone.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, before, lines, returns = 1, "", False, False  # `before`: the last character so far
    try:
        with open_text(path) as file:
            while block := file.read1(BLOCK) if hasattr(file, "read1") else file.read(BLOCK):
                if isinstance(bar, HashingBar):
                    bar.sha256.update(block)
                if line == 1 and not before:
                    refuse_signature(path, block)
                if b"\0" in block:
                    line += block.count(b"\n", 0, block.index(b"\0"))
                    raise UserError(f"{path}: has a NUL byte in line {line}; give a text in UTF-8, without binary data")
                text = decoder.decode(block)
                line += block.count(b"\n")
                if not lines:
                    lines = "\n" in text
                    returns = returns or bool(re.search(r"\r[^\n]", text))
                start, before = before in ("", "\n"), text[-1:] or before
                if MARK in text:
                    text = text.replace(f"\n{MARK}", "\n").removeprefix(MARK if start else "")
                yield text
                if bar is not None:
                    bar.update(len(block))
            decoder.decode(b"", final=True)  # raises when the last character is incomplete
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        byte = f"the byte 0x{error.object[error.start]:02x} stands there"
        raise UserError(
            f"{path}: not UTF-8 in line {line}; {byte}; convert the file, e.g. with iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a text file") from None
    if returns and not lines:
        raise UserError(f"{path}: its lines end in a carriage return (CR) alone; convert it: tr '\\r' '\\n'")


def refuse_signature(path: str | Path, block: bytes) -> None:
    """Raises UserError for a file that begins as no text does."""
    for signature, (what, hint) in SIGNATURES.items():
        if block.startswith(signature):
            raise UserError(f"{path}: is {what}, not a text in UTF-8; {hint}")


def read_lines(path: str | Path, bar: tqdm | None = None) -> Iterator[str]:
    """The lines of a text without their ends, newlines or Windows's.

    Raises:
        UserError: see `read_blocks`; or the text is empty.
    """
    for lines in read_line_groups(path, bar):
        yield from lines


def read_line_groups(path: str | Path, bar: tqdm | None = None) -> Iterator[list[str]]:
    """As `read_lines`, the lines that are there at the same time together: from a pipe, those that have arrived."""
    parts: list[str] = []  # of a line that goes on in the next block
    empty = True
    for text in read_blocks(path, bar):
        empty = empty and not text
        *lines, rest = text.split("\n")
        if lines:
            lines[0] = "".join([*parts, lines[0]])
            parts.clear()
            yield [line.rstrip("\r") for line in lines]
        if rest:
            parts.append(rest)
    if empty:
        raise UserError(f"{path}: is empty; give a text with at least one line")
    if parts:
        yield ["".join(parts).rstrip("\r")]


def read_pieces(path: str | Path, bar: tqdm | None = None) -> Iterator[str]:
    """The text in pieces of at most PIECE characters. A line's last piece ends in a newline, the others before a space.

    Memory does not grow with the length of a line.
    """
    rest = ""
    for text in read_blocks(path, bar):
        text, start = rest + text, 0
        while True:
            end = text.find("\n", start, start + PIECE) + 1
            if not end and len(text) - start <= PIECE:
                break
            if not end:
                end = text.rfind(" ", start + 1, start + PIECE)
                end = start + PIECE if end < 0 else end
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest
