"""Corpora: text of any size to token ids, cached beside the text and memory-mapped afterwards.

    ./getdata.sh penn
    python -c "import data; c = data.read_corpus('data/penn'); print(len(c.vocab), len(c.train))"

A corpus is a folder with train.txt, valid.txt and test.txt: UTF-8, words apart by white space, one `<eos>`
after each line. The text is read once: a word's first id is its rank of first appearance; the ids are
counted, and one table turns them into ranks of frequency, which the split softmax assumes.
"""

import hashlib
import http.client
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

import compat
from corpus_cache import Cache, Entry, TextVersion, stamp
from utils import UserError
from words import EOS, UNK, read_words

SPLITS = ("train", "valid", "test")
FETCHABLE = ("penn", "wikitext-2", "wikitext-103", "pennchar", "enwik8", "pydocs")  # by getdata.sh
BLOCK = 1 << 18  # ids worked on at once


@dataclass
class Corpus:
    """Three splits as token ids, and the words behind the ids (N tokens a split, `<eos>` counted).

    vocab: id -> word, sorted by frequency in the training text, ties in order of first appearance.
    train, valid, test: (N,) int16 where the ids fit, else int32; memory-mapped from the cache.
    encoder: torchnlp's LabelEncoder over exactly `vocab`; its `unknown_index` is `<unk>`'s id or None.
    """

    vocab: list[str]
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    encoder: compat.LabelEncoder


def read_corpus(data: str, vocab: list[str] | None = None, vocab_size: int = 0, min_count: int = 0) -> Corpus:
    """Reads the folder `data`, or torchnlp's dataset of that name: `penn_treebank`, `wikitext_2`.

    The vocabulary is the training text's. A word that only valid or test has becomes `<unk>` where the
    training text knows `<unk>`; otherwise it is appended in order of first appearance. `vocab_size` (so many
    types at most, `<unk>` and `<eos>` included) and `min_count` (words seen less often go) turn the rest into
    `<unk>`. With `vocab`, a saved model's, the text is encoded with exactly that.

    Raises:
        UserError: a split is missing, too short or not UTF-8; a word that `vocab` has neither an id nor an
            `<unk>` for.
    """
    if vocab_size == 1:
        raise UserError(f"--vocab_size 1: leaves no room for {UNK} and {EOS}; give 2 or more")
    rule = VocabRule(vocab, vocab_size, min_count)
    if data in DATASETS:
        return _corpus(_in_memory({f"{data}, {split}": [words] for split, words in _torchnlp(data)}, rule))
    files = _check_folder(data)
    cache = Cache(files, rule.key())
    return _corpus(cache.load(vocab) or _read_folder(data, files, rule, cache))


def make_encoder(vocab: list[str]) -> compat.LabelEncoder:
    """torchnlp's encoder over exactly this vocabulary; its `unknown_index` is `<unk>`'s id or None."""
    # All labels reserved: they keep their order, and 267,735 of them take 0.05 s where a sample takes 0.6.
    unknown = vocab.index(UNK) if UNK in vocab else None
    return compat.LabelEncoder([], reserved_labels=vocab, unknown_index=unknown)


def encode_line(line: str, encoder: compat.LabelEncoder, place: str = "the text given") -> list[int]:
    """The ids of a line's words, without `<eos>`; `place` says in an error where the line is from.

    Raises:
        UserError: a word that the vocabulary lacks, when it has no `<unk>`.
    """
    ids = []
    for word in line.split():
        ids.append(encoder.token_to_index.get(word, encoder.unknown_index))
        if ids[-1] is None:
            raise _unknown_word(word, place)
    return ids


def encode_file(path: str | Path, encoder: compat.LabelEncoder) -> torch.Tensor:
    """The ids of a text file, streamed, one `<eos>` a line: (N,) int16 or int32, in memory.

    Raises:
        UserError: the file cannot be read, is empty or not UTF-8; an unknown word, as in `encode_line`.
    """
    table, dtype = KnownWords(encoder.vocab, str(path)), _dtype(encoder.vocab)
    blocks = [_ids(words, table).astype(dtype) for words in read_words(path)]
    if not blocks:
        raise UserError(f"{path}: is empty; give a text with at least one line")
    return torch.from_numpy(np.concatenate(blocks))


class FirstSeen(dict):
    """word -> rank of first appearance."""

    def __missing__(self, word: str) -> int:
        self[word] = rank = len(self)
        return rank


class KnownWords(dict):
    """word -> id in a given vocabulary, `<unk>`'s for the rest; without `<unk>` an error names the word."""

    def __init__(self, vocab: list[str], place: str) -> None:
        super().__init__((word, i) for i, word in enumerate(vocab))
        self.unknown, self.place = self.get(UNK), place

    def __missing__(self, word: str) -> int:
        if self.unknown is None:
            raise _unknown_word(word, self.place)
        return self.unknown


def _unknown_word(word: str, place: str) -> UserError:
    return UserError(
        f"{place}: the word {word[:80]!r} is not in the model's vocabulary, which has no {UNK}; "
        "use the text that it was trained on, or train one with --vocab_size or --min_count"
    )


@dataclass
class VocabRule:
    """Where the vocabulary comes from: a given one, or the training text within these limits."""

    vocab: list[str] | None
    vocab_size: int
    min_count: int

    def key(self) -> str:
        """A short name of the rule, for the cache's file."""
        parts = [f"{self.vocab_size} {self.min_count}", *(self.vocab or ())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _encode(
    texts: dict[str, Iterable[list[str]]], rule: VocabRule, found: BinaryIO
) -> tuple[list[str], list[int], Iterator[np.ndarray]]:
    """Encodes three texts, training first, named for messages; `found` holds the first ids, 4 bytes a token.

    Returns the vocabulary, the sizes, and the final ids of all three in blocks, read from `found` on demand.
    """
    table = FirstSeen() if rule.vocab is None else KnownWords(rule.vocab, "")
    sizes, types = [], 0
    for table.place, text in texts.items():
        sizes.append(0)
        for words in text:
            found.write(_ids(words, table))
            sizes[-1] += len(words)
        if sizes[-1] < 2:
            problem = "has a single token" if sizes[-1] else "is empty"
            raise UserError(f"{table.place}: {problem}; every split needs two tokens or more")
        types = types or len(table)  # the training text's
    if rule.vocab is None:
        found.seek(0)
        counts = sum(np.bincount(ids, minlength=types) for ids in _blocks(found, sizes[0]))
        vocab, final = _by_frequency(list(table), counts, rule)
    else:
        vocab, final = rule.vocab, np.arange(types)
    found.seek(0)
    final = final.astype(_dtype(vocab))
    return vocab, sizes, (final[ids] for ids in _blocks(found, sum(sizes)))


def _by_frequency(words: list[str], counts: np.ndarray, rule: VocabRule) -> tuple[list[str], np.ndarray]:
    """The vocabulary, and the table from a word's rank of first appearance to its final id.

    words: in order of first appearance; the first `len(counts)` are the training text's, counted.
    """
    known = dict(zip(words, counts.tolist(), strict=False))  # in order of first appearance
    if rule.vocab_size or rule.min_count:
        frequent = [word for word in sorted(known, key=known.get, reverse=True) if word not in (EOS, UNK)]
        frequent = [word for word in frequent if known[word] >= rule.min_count]
        keep = {EOS, UNK, *(frequent[: rule.vocab_size - 2] if rule.vocab_size else frequent)}
        rest = sum(count for word, count in known.items() if word not in keep)
        known = {word: count for word, count in known.items() if word in keep}
        known[UNK] = known.get(UNK, 0) + rest
    vocab = sorted(known, key=known.get, reverse=True)  # stable: ties stay in order of first appearance
    if UNK not in known:
        vocab += words[len(counts) :]
    index = {word: i for i, word in enumerate(vocab)}
    return vocab, np.array([index[word] if word in index else index[UNK] for word in words])


def _ids(words: list[str], table: dict[str, int]) -> np.ndarray:
    return np.fromiter(map(table.__getitem__, words), np.int32, len(words))


def _blocks(file: BinaryIO, size: int) -> Iterator[np.ndarray]:
    """Yields the next `size` int32 ids of a file, BLOCK at a time."""
    for start in range(0, size, BLOCK):
        yield np.frombuffer(file.read(4 * min(BLOCK, size - start)), np.int32)


def _dtype(vocab: list[str]) -> type[np.signedinteger]:
    return np.int16 if len(vocab) <= 1 << 15 else np.int32


def _corpus(entry: Entry) -> Corpus:
    splits = torch.from_numpy(entry.ids).split(entry.sizes)
    return Corpus(entry.vocab, *splits, make_encoder(entry.vocab))


class _Text:
    """A file as blocks of words; remembers what the cache has to know about the bytes that were read."""

    def __init__(self, path: Path, bar: tqdm) -> None:
        self.path, self.bar = path, bar

    def __iter__(self) -> Iterator[list[str]]:
        before, digest = stamp(self.path), hashlib.sha256()

        def seen(block: bytes) -> None:
            digest.update(block)
            self.bar.update(len(block))

        yield from read_words(self.path, seen)
        self.version = TextVersion(digest.hexdigest(), before)


def _read_folder(data: str, files: list[Path], rule: VocabRule, cache: Cache) -> Entry:
    """Reads the text and leaves a cache of it; where none can be written, the ids stay in memory."""
    problem = ""
    for place in cache.places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with _progress(data, files) as bar, tempfile.TemporaryFile(dir=place) as found:
                texts = {str(path): _Text(path, bar) for path in files}
                encoded = _encode(texts, rule, found)
                return cache.save(place, *encoded, [text.version for text in texts.values()])
        except OSError as error:  # the cache's: what is wrong with the text is a UserError
            problem = problem or f"{place}: {error.strerror}"
    with _progress(data, files) as bar:
        entry = _in_memory({str(path): _Text(path, bar) for path in files}, rule)
    print(f"warning: {problem}; no cache was kept, the text is read again next time", file=sys.stderr)
    return entry


def _in_memory(texts: dict[str, Iterable[list[str]]], rule: VocabRule) -> Entry:
    vocab, sizes, blocks = _encode(texts, rule, io.BytesIO())
    return Entry(vocab, sizes, np.concatenate(list(blocks)))


def _progress(data: str, files: list[Path]) -> tqdm:
    """A bar over the bytes of text, shown when they take more than two seconds."""
    size = sum(path.stat().st_size for path in files)
    return tqdm(
        total=size, unit="B", unit_scale=True, desc=f"reading {data}", delay=2, mininterval=0.5, leave=False
    )


def _check_folder(data: str) -> list[Path]:
    """The paths of the three splits, once they are there."""
    name = Path(data).name
    what_to_do = (
        f"run ./getdata.sh {name}"
        if name in FETCHABLE
        else "give a folder with train.txt, valid.txt, test.txt"
    )
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: there is no such folder; {what_to_do}")
    files = [Path(data, f"{split}.txt") for split in SPLITS]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: is missing; {what_to_do}")
    return files


# name: torchnlp's function, its folder, its file names, and the corpus of getdata.sh that is the same
DATASETS = {
    "penn_treebank": (compat.penn_treebank_dataset, "data/penn-treebank", "ptb.{}.txt", "penn"),
    "wikitext_2": (compat.wikitext_2_dataset, "data/wikitext-2", "wiki.{}.tokens", "wikitext-2"),
}


def _torchnlp(name: str) -> Iterable[tuple[str, list[str]]]:
    """(split, its words) of one of torchnlp's datasets, which torchnlp fetches unless it is there.

    It would take what an interrupted download left for the whole: so it fetches into a folder that is
    renamed once all three splits are read. The files of `getdata.sh` do as well.
    """
    function, default, pattern, corpus = DATASETS[name]

    def read(folder: Path, pattern: str) -> Iterable[tuple[str, list[str]]]:
        names = [pattern.format(split) for split in SPLITS]
        files = dict(zip(("train_filename", "dev_filename", "test_filename"), names, strict=True))
        if name == "wikitext_2":
            files |= {
                "extracted_name": folder.name,
                "check_files": [f"{folder.name}/{file}" for file in names],
            }
            folder = folder.parent
        else:
            files |= {"check_files": names}
        words = function(
            str(folder), train=True, dev=True, test=True, eos_token=EOS, unknown_token=UNK, **files
        )
        return zip(SPLITS, words, strict=True)

    folder = Path(default)
    for there, names in ((folder, pattern), (Path("data", corpus), "{}.txt")):
        if all((there / names.format(split)).is_file() for split in SPLITS):
            return read(there, names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
            fetched = Path(temporary, folder.name)
            splits = read(fetched, pattern)
            for split in reversed(SPLITS):
                os.replace(fetched / pattern.format(split), folder / pattern.format(split))
        return splits
    except (OSError, ValueError, EOFError, http.client.HTTPException, zipfile.BadZipFile) as error:
        raise UserError(
            f"--data {name}: could not be fetched ({error}); run ./getdata.sh {corpus}, then try again"
        ) from None
