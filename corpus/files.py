"""The three texts of --data on disk, and the cache of their ids, so that they are read and counted only once.

The texts lie in a folder, or are one of PyTorch-NLP's datasets, which it fetches. The cache (.cache-*.pt) is memory-
mapped. Its name is a digest of the rule that made the vocabulary. It holds the sha256 of the texts, so that a cache of
texts that have changed since is not used.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from corpus.corpora import CORPORA, SPLITS
from corpus.reader import open_file, read_tensors
from utils import UserError, penn_treebank_dataset, replacing, wikitext_2_dataset

TOKENIZER, MANIFEST = "tokenizer.json", "manifest.json"  # beside texts that prepare.py has made


def find_files(data: str) -> list[Path]:
    """The paths of the three texts of a folder; UserError if one is missing."""
    hint = f"give a folder with {'.txt, '.join(SPLITS)}.txt"
    if Path(data).name in CORPORA:
        hint = f"run ./getdata.sh {Path(data).name}"
    if Path(data).is_file():
        raise UserError(f"--data {data}: is a file, not a folder; make a corpus of it with prepare.py")
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: there is no such folder; {hint}")
    files = [Path(data, f"{split}.txt") for split in SPLITS]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: {'is no file' if path.exists() else 'is missing'}; {hint}")
    return files


# name: torchnlp's function, its folder and file names, the corpus of getdata.sh with the same text
DATASETS = {
    "penn_treebank": (penn_treebank_dataset, "data/penn-treebank", "ptb.{}.txt", "penn"),
    "wikitext_2": (wikitext_2_dataset, "data/wikitext-2", "wiki.{}.tokens", "wikitext-2"),
}


def fetch_dataset(name: str) -> list[Path]:
    """The texts of one of torchnlp's datasets: its copy, or getdata.sh's, or else torchnlp fetches them.

    torchnlp would take the rest of an interrupted download for the whole text, so it fetches into a temporary folder.
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
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def text_digest(text: str) -> str:
    """The sha256 of a text without white space around it, such as an editor's newline."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


def check_manifest(files: list[Path], digests: list[str], tokenizer: str | None) -> None:
    """Raises UserError when texts and tokenizer are not those that prepare.py wrote together into their folder.

    A folder without a list of checksums is taken as it is, and the tokenizer may have been removed. `digests`: the
    sha256 of each text.
    """
    folder = files[0].parent
    path, found = folder / MANIFEST, dict(zip((file.name for file in files), digests, strict=True))
    if not path.is_file():
        return
    try:
        written = json.loads(path.read_text("utf-8"))
        found[TOKENIZER] = text_digest(tokenizer) if tokenizer else written.get(TOKENIZER)
        changed = [name for name in written if written[name] != found.get(name)]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        changed = [MANIFEST]
    if changed:
        reason = "prepare.py was stopped while it wrote, or the file has changed since"
        cure = f"run prepare.py again, or remove {MANIFEST} to take the folder as it is"
        raise UserError(f"{folder / changed[0]}: does not belong to the other files ({reason}); {cure}")


def read_tokenizer(folder: Path) -> tuple[str | None, list[str]]:
    """The contents of a folder's tokenizer.json and its pieces in the order of its ids; (None, []) without one.

    Raises:
        UserError: the file cannot be read, or is no tokenizer.
    """
    path = folder / TOKENIZER
    try:
        if not path.exists():
            return None, []
        with open_file(path) as file:
            text = file.read().decode()
        vocab = json.loads(text)["model"]["vocab"]
        "".join(vocab).encode()  # raises ValueError for half a character
        if not all(type(number) is int for number in vocab.values()) or len({*vocab.values()}) != len(vocab):
            raise ValueError
        return text, sorted(vocab, key=vocab.__getitem__)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: is no tokenizer that prepare.py made; make the corpus again, or remove the file"
        ) from None


def save_cache(path: Path, corpus: dict[str, Any]) -> None:
    """Writes an encoded corpus, whole or not at all. Raises OSError when the disk does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The words as one string: for a list of 267,735 torch's reader, written in Python, would take a second.
    contents = {**corpus, "vocab": json.dumps(corpus["vocab"]), "check": checksum(corpus)}
    with replacing(path) as file:
        torch.save(contents, file)


def load_cache(path: Path, digest: str) -> dict[str, Any] | None:
    """The cached ids of the texts with this digest, memory-mapped; None if there are none, or if they are damaged."""
    with contextlib.suppress(Exception), open_file(path) as file:  # what is no cache raises anything
        cached = read_tensors(file, mmap=True)
        cached["vocab"] = json.loads(cached["vocab"])
        if cached["digest"] == digest and cached.pop("check") == checksum(cached) and holds_ids(cached):
            return cached
    return None


def holds_ids(cached: dict[str, Any]) -> bool:
    """Whether a cache has words, three texts of their ids, and nothing else."""
    vocab, tokenizer = cached["vocab"], cached.get("tokenizer")
    return (
        cached.keys() - {"tokenizer"} == {"vocab", "digest", *SPLITS}
        and isinstance(vocab, list)
        and all(isinstance(word, str) for word in vocab)
        and len({*vocab}) == len(vocab)
        and bool("".join(vocab).encode())  # raises UnicodeEncodeError for half a character
        and (tokenizer is None or isinstance(tokenizer, str))
        and all(
            cached[split].dtype in (torch.int16, torch.int32)
            and cached[split].dim() == 1
            and len(cached[split]) > 1
            and cached[split].min() >= 0
            and cached[split].max() < len(vocab)
            for split in SPLITS
        )
    )


def checksum(corpus: dict[str, Any]) -> str:
    """The sha256 of everything in a cache; a memory-mapped file is not read for the zip's own checksums."""
    digest = hashlib.sha256()
    for name, part in corpus.items():
        digest.update(name.encode())
        digest.update(part.numpy().data if isinstance(part, Tensor) else json.dumps(part).encode())
    return digest.hexdigest()
