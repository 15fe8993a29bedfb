"""The three texts of --data on disk, and their encoded copy, so that they are read and counted only once.

    ls -l data/penn/.cache-*

The texts lie in a folder, or in one of PyTorch-NLP's datasets, which it fetches. The copy is memory-mapped. It is
named after the rule that made the vocabulary, and holds the sha256 of the texts: of changed ones it is no copy.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor
from tqdm import tqdm

from corpus.corpora import CORPORA, SPLITS
from utils import UserError, penn_treebank_dataset, replacing, wikitext_2_dataset

TOKENIZER = "tokenizer.json"  # beside the texts, where prepare.py has made them


def find_files(data: str) -> list[Path]:
    """The paths of the three texts of a folder, once they are there."""
    what_to_do = f"give a folder with {'.txt, '.join(SPLITS)}.txt"
    if Path(data).name in CORPORA:
        what_to_do = f"run ./getdata.sh {Path(data).name}"
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: there is no such folder; {what_to_do}")
    files = [Path(data, f"{split}.txt") for split in SPLITS]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: is missing; {what_to_do}")
    return files


# name: torchnlp's function, its folder and file names, the corpus of getdata.sh that is the same
DATASETS = {
    "penn_treebank": (penn_treebank_dataset, "data/penn-treebank", "ptb.{}.txt", "penn"),
    "wikitext_2": (wikitext_2_dataset, "data/wikitext-2", "wiki.{}.tokens", "wikitext-2"),
}


def fetch_dataset(name: str) -> list[Path]:
    """The texts of one of torchnlp's datasets, which torchnlp fetches unless they, or getdata.sh's, are there.

    It would take what an interrupted download left for the whole, so it fetches into a folder beside.
    """
    fetch, default, pattern, corpus = DATASETS[name]
    folder = Path(default)
    for place, names in ((folder, pattern), (Path("data", corpus), "{}.txt")):
        files = [place / names.format(split) for split in SPLITS]
        if all(path.is_file() for path in files):
            return files
    files = [folder / pattern.format(split) for split in SPLITS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as fetched:
            fetch(directory=fetched)
            for path in reversed(files):  # the training text last: with it the folder is complete
                os.replace(next(Path(fetched).rglob(path.name)), path)
    except (OSError, ValueError, EOFError, StopIteration, HTTPException, BadZipFile) as error:
        raise UserError(
            f"--data {name}: could not be fetched ({error}); run ./getdata.sh {corpus}, then try again"
        ) from None
    return files


def file_digest(path: str | Path) -> str:
    """The sha256 of a file: 0.3 s for WikiText-103's 540 MB."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_tokenizer(folder: Path) -> tuple[str | None, list[str]]:
    """The text of a folder's tokenizer.json and the pieces that it makes, by its own ids; None without one.

    Raises:
        UserError: it cannot be read, or is none.
    """
    path = folder / TOKENIZER
    try:
        text = path.read_text("utf-8") if path.exists() else None
        vocab = json.loads(text)["model"]["vocab"] if text is not None else {}
        return text, sorted(vocab, key=vocab.__getitem__)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: is no tokenizer of prepare.py's; make the corpus again, or remove it") from None


def read_lines(path: str, bar: tqdm | None = None) -> Iterator[str]:
    """The lines of a UTF-8 text, `-` for stdin, without their ends: newlines, also Windows's. `bar` counts bytes.

    Raises:
        UserError: it cannot be read, is empty, binary or not UTF-8.
    """
    number = 0
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if b"\0" in line:
                    raise UserError(f"{path}: is binary data (line {number}); give a text")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if bar is not None:
                    bar.update(len(line))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 in line {number}; convert the file, e.g. with iconv") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a text file") from None
    if not number:
        raise UserError(f"{path}: is empty; give a text with at least one line")


def save_cache(path: Path, corpus: dict[str, Any]) -> None:
    """Writes an encoded corpus, whole or not at all. Raises OSError when the disk does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The words as one string: torch's reader, written in Python, would take a second for a list of 267,735.
    contents = {**corpus, "vocab": json.dumps(corpus["vocab"]), "check": checksum(corpus)}
    with replacing(path, suffix=f".{os.getpid()}.tmp") as file:  # several processes may write it at once
        torch.save(contents, file)


def load_cache(path: Path, digest: str) -> dict[str, Any] | None:
    """The encoded corpus of the texts that `digest` names, memory-mapped; None if there is none, or damaged."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):  # damaged files raise anything
        found = torch.load(path, weights_only=True, mmap=True)
        found["vocab"] = json.loads(found["vocab"])
        if found["digest"] == digest and found.pop("check") == checksum(found):
            return found
    return None


def checksum(corpus: dict[str, Any]) -> str:
    """Of all that it holds: torch reads a file without looking at the checksums in it."""
    found = hashlib.sha256()
    for name, part in corpus.items():
        found.update(name.encode())
        found.update(part.numpy() if isinstance(part, Tensor) else json.dumps(part).encode())
    return found.hexdigest()
