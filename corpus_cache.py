"""The cache of an encoded corpus: a header (vocabulary, sizes, which text) and the ids, memory-mapped.

    ls -l data/penn/.cache-*

Two plain files, `.cache-KEY.json` and `.cache-KEY.ids`, beside the text; where that folder cannot be written
to, in `$XDG_CACHE_HOME/awd-lm` (default `~/.cache/awd-lm`). KEY names the rule that made the vocabulary.
Each is written whole or not at all, the header last, and carries a checksum: whatever does not fit together
(a damaged file, another process's half of a newer pair) is no cache, and the text is read again.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utils import write_whole

FORMAT = 1
RACY = 2.0  # seconds; the coarsest clock of a file system in use (FAT) ticks every two


@dataclass
class Entry:
    """An encoded corpus. sizes: tokens a split; ids: (sum(sizes),) int16 or int32, the splits in a row."""

    vocab: list[str]
    sizes: list[int]
    ids: np.ndarray


class TextVersion(NamedTuple):
    """What a text was when it was read: the sha256 of its bytes, and its stamp before."""

    digest: str
    stamp: list[int] | None


def stamp(path: Path) -> list[int] | None:
    """A file's size, times (ns) and inode, by which a change of it is seen without reading it.

    None while the file is so young that one more change might leave the times as they are (git calls such
    a file racy): then only the content tells.
    """
    status = os.stat(path)
    if time.time() - status.st_ctime < RACY:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class Cache:
    """Where the encoded form of `files` (one folder's) under the vocabulary rule `key` is kept."""

    def __init__(self, files: list[Path], key: str) -> None:
        folder = files[0].parent
        home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        self.files, self.key = files, key
        self.places = (folder, home / "awd-lm" / name)

    def load(self, vocab: list[str] | None = None) -> Entry | None:
        """The entry for the text as it is now, or None.

        With `vocab` an entry of any rule that led to the same vocabulary will do: that fixes the ids.
        """
        for place in self.places:
            headers = [place / f".cache-{self.key}.json"]
            if vocab is not None:
                headers = sorted(place.glob(".cache-*.json"))
            for header in headers:
                with contextlib.suppress(
                    OSError, ValueError, KeyError, TypeError
                ):  # damaged, missing, foreign
                    return self._load(header, vocab)
        return None

    def _load(self, path: Path, vocab: list[str] | None) -> Entry:
        """Raises ValueError and the like when the pair of files is not a sound cache of the text."""
        checksum, _, body = path.read_bytes().partition(b"\n")
        header = json.loads(body)
        if hashlib.sha256(body).hexdigest().encode() != checksum or header["format"] != FORMAT:
            raise ValueError
        if vocab is not None and vocab != header["vocab"]:
            raise ValueError
        ids = np.memmap(path.with_suffix(".ids"), header["dtype"], mode="c")
        if len(ids) != sum(header["sizes"]) or zlib.crc32(ids) != header["crc32"]:
            raise ValueError
        stamps = [stamp(file) for file in self.files]
        versions = [TextVersion(*version) for version in header["text"]]
        if None in stamps or stamps != [version.stamp for version in versions]:
            if [_digest(file) for file in self.files] != [version.digest for version in versions]:
                raise ValueError
            header["text"] = [(version.digest, new) for version, new in zip(versions, stamps, strict=True)]
            with contextlib.suppress(OSError):  # only saves the hashing next time
                _write_header(path, header)
        return Entry(header["vocab"], header["sizes"], ids)

    def save(
        self,
        place: Path,
        vocab: list[str],
        sizes: list[int],
        blocks: Iterable[np.ndarray],
        versions: list[TextVersion],
    ) -> Entry:
        """Writes the ids, block after block, and the header; returns the entry with the ids memory-mapped.

        Raises:
            OSError: they cannot be written; an older cache may then be left.
        """
        path = place / f".cache-{self.key}.json"
        header: dict[str, Any] = {"format": FORMAT, "sizes": sizes, "crc32": 0}

        def write(file: BinaryIO) -> None:
            for block in blocks:
                file.write(block)
                header["crc32"] = zlib.crc32(block, header["crc32"])
                header["dtype"] = block.dtype.str

        write_whole(path.with_suffix(".ids"), write)
        ids = np.memmap(path.with_suffix(".ids"), header["dtype"], mode="c")
        _write_header(path, header | {"text": versions, "vocab": vocab})
        return Entry(vocab, sizes, ids)


def _write_header(path: Path, header: dict[str, Any]) -> None:
    body = json.dumps(header, ensure_ascii=False).encode()
    checksum = hashlib.sha256(body).hexdigest().encode()
    write_whole(path, lambda file: file.write(checksum + b"\n" + body))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
