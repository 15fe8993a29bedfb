"""Text to ids: words, the vocabulary, and the corpus encoded once.

A corpus is a folder with train.txt, valid.txt and test.txt: UTF-8, white space between words. Each line is followed by
one `<eos>`. The encoded text is kept beside the texts and memory-mapped the next time.
"""

import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.files import (
    DATASETS,
    TOKENIZER,
    check_manifest,
    fetch_dataset,
    file_digest,
    find_files,
    load_cache,
    read_tokenizer,
    save_cache,
)
from corpus.text import HashingBar, read_blocks
from data import Corpus
from utils import LabelEncoder, UserError, remove_leftovers

EOS, UNK = "<eos>", "<unk>"
LITERAL_EOS = re.compile(rf"(?<!\S){EOS}[^\S\n]*\n")  # at the end of a line


def read_words(path: str | Path, bar: tqdm | None = None) -> Iterator[list[str]]:
    """Yields the words of a text, with `<eos>` after each line, one block at a time; `bar` counts bytes.

    Words are separated as by `str.split`, lines by newlines. A literal `<eos>` at the end of a line, as corpora for
    other toolkits have it, is the one of that line and counts once. Memory is bounded by the longest word, not by the
    longest line.

    Raises:
        UserError: see `read_blocks`.
    """
    last, unfinished, said = "\n", "", False  # `unfinished`: the start of a word that goes on in the next block
    for text in read_blocks(path, bar):
        last, text = text[-1:] or last, unfinished + text
        if EOS in text:
            text, literal = LITERAL_EOS.subn("\n", text)
            said = said or (literal > 0 and say_literal_eos(path))
        words = text.replace("\n", f" {EOS} ").split()
        unfinished = "" if last.isspace() else words.pop()
        if ends_in_literal_eos(text) and last.isspace():  # the newline may stand in the next block
            unfinished = f"{words.pop()} "
        yield words
    if unfinished.strip() == EOS:
        yield [EOS]
    elif last != "\n":  # the last line ends without a newline
        yield [unfinished, EOS] if unfinished else [EOS]


def ends_in_literal_eos(text: str) -> bool:
    """Whether a text ends in a literal `<eos>` and white space without a newline."""
    return bool(EOS in text[-100:] and re.search(rf"(?<!\S){EOS}[^\S\n]*\Z", text[-100:]))


def without_literal_eos(line: str) -> str:
    """A line without a literal `<eos>` at its end."""
    text = line.rstrip()
    return text[: -len(EOS)] if text == EOS or text.endswith((f" {EOS}", f"\t{EOS}")) else line


def say_literal_eos(path: str | Path) -> bool:
    """Says on stderr that a text has line ends written out; returns True."""
    print(f"{path}: a literal {EOS} at the end of a line is counted once, as the end of that line", file=sys.stderr)
    return True


def read_corpus(
    data: str, vocab: list[str] | None = None, vocab_size: int = 0, min_count: int = 0, tokenizer: str | None = None
) -> Corpus:  # fmt: skip
    """Reads the folder `data`, or torchnlp's dataset of that name: `penn_treebank`, `wikitext_2`.

    The vocabulary has the words of the training text. A word that only valid or test has becomes `<unk>` if the
    training text contains `<unk>`; otherwise it is added in order of first appearance. `vocab_size` (at most
    so many types, with `<unk>` and `<eos>`) and `min_count` (the fewest occurrences) turn rarer words into `<unk>`.
    Every token of a tokenizer.json in the folder is in the vocabulary, even if the training text never uses it.
    `vocab`, `tokenizer`: of a saved model. The text is encoded with exactly this vocabulary. A folder that has another
    tokenizer is refused: it would make other tokens, and `<unk>`, of words that the model knows.

    Raises:
        UserError: a text is missing, too short or not UTF-8; or a word is not in `vocab`, which has no `<unk>`; or the
            folder has another tokenizer.
    """
    if vocab_size == 1:
        raise UserError(f"--vocab_size 1: has no room for {UNK} and {EOS}; give 2 or more")
    files = fetch_dataset(data) if data in DATASETS else find_files(data)
    digests = [file_digest(path) for path in files]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    own, pieces = read_tokenizer(files[0].parent)
    check_manifest(files, digests, own)
    if vocab and own and not same_tokenizer(own, tokenizer):
        model = "the model's tokenizer" if tokenizer else "the form of the model's corpus: the model has no tokenizer"
        raise UserError(
            f"--data {data}: its {TOKENIZER} is not {model}; make the corpus with prepare.py --like MODEL, or remove "
            f"the {TOKENIZER} if its tokens are the model's"
        )
    rule = "\n".join([f"{vocab_size} {min_count}", *(vocab or ()), *([own] if own else ())])
    name = f".cache-{hashlib.sha256(rule.encode()).hexdigest()[:16]}.pt"
    folder = files[0].parent
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "awd-lm")
    places = (folder, home / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16])
    for place in places:
        remove_leftovers(place, r"[.]cache-.*[.]tmp")
        # With `vocab` the cache of any rule will do if it has the same vocabulary: the ids are then the same.
        for path in sorted(place.glob(".cache-*.pt")) if vocab else [place / name]:
            cached = load_cache(path, digest)
            if cached and vocab in (None, cached["vocab"]):
                return Corpus(**cached)
    corpus = encode_files(data, files, digests, vocab, vocab_size, min_count, pieces)
    corpus = corpus._replace(digest=digest, tokenizer=own)
    problem = None
    for place in places:
        try:
            save_cache(place / name, corpus._asdict())
            cached = load_cache(place / name, digest)
            return Corpus(**cached) if cached else corpus
        except OSError as error:
            problem = problem or f"{place}: {error.strerror}"
    print(f"warning: {problem}; no cache was kept, the text is read again next time", file=sys.stderr)
    return corpus


def same_tokenizer(text: str, other: str | None) -> bool:
    """Whether two tokenizers have the same vocabulary and merges; `other` can be damaged."""
    try:
        return other is not None and json.loads(text)["model"] == json.loads(other)["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


class FirstSeen(dict[str, int]):
    """word -> rank of first appearance."""

    place = ""  # the file that is being read

    def __missing__(self, word: str) -> int:
        self[word] = rank = len(self)
        return rank


class KnownWords(dict[str, int]):
    """word -> id in a given vocabulary, the id of `<unk>` for other words; without `<unk>` an error names the word."""

    def __init__(self, vocab: list[str]) -> None:
        super().__init__((word, i) for i, word in enumerate(vocab))
        self.place = "the text given"  # the file that is being read, for the error

    def __missing__(self, word: str) -> int:
        if UNK in self:
            return self[UNK]
        raise unknown_word(word, self.place)


def unknown_word(word: str, place: str) -> UserError:
    return UserError(
        f"{place}: the word {word[:80]!r} is not in the model's vocabulary, which has no {UNK}; "
        "use the text that it was trained on, or train one with --vocab_size or --min_count"
    )


def encode_files(
    data: str, files: list[Path], digests: list[str], vocab: list[str] | None, vocab_size: int, min_count: int,
    pieces: list[str],
) -> Corpus:  # fmt: skip
    """Reads three texts with these sha256, training first; see `read_corpus`.

    Memory: some 8 bytes per token for a moment. The corpus has no digest yet.
    """
    table: KnownWords | FirstSeen = KnownWords(vocab) if vocab else FirstSeen()
    encoded: list[list[np.ndarray]] = []
    types = 0
    with HashingBar(
        total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True,
        desc=f"reading {data}", delay=2, mininterval=0.5, leave=False,
    ) as bar:  # fmt: skip
        for path, digest in zip(files, digests, strict=True):
            table.place, bar.sha256 = str(path), hashlib.sha256()
            blocks = [
                np.fromiter(map(table.__getitem__, words), np.int32, len(words))
                for words in read_words(table.place, bar)
            ]
            if bar.sha256.hexdigest() != digest:
                raise UserError(f"{path}: has changed while it was read; start again when it is complete")
            encoded.append(blocks)
            if (length := sum(map(len, blocks))) < 2:
                problem = "has a single token" if length else "is empty"
                raise UserError(f"{table.place}: {problem}; every text needs two tokens or more")
            if vocab is None and len(encoded) == 1:
                for piece in pieces:
                    table.setdefault(piece, len(table))
                types = len(table)  # those of the training text and of its tokenizer
    if vocab is None:  # block by block: numpy needs 8 bytes per token for counting and indexing
        counts = np.zeros(types, np.int64)
        for block in encoded[0]:
            counts += np.bincount(block, minlength=types)
        vocab, final = by_frequency(list(table), counts, vocab_size, min_count)
        for block in itertools.chain(*encoded):
            block[:] = final[block]
    dtype = np.int16 if len(vocab) <= 1 << 15 else np.int32
    train, valid, test = (torch.from_numpy(np.concatenate(blocks, dtype=dtype)) for blocks in encoded)
    return Corpus(vocab, train, valid, test, "")


def by_frequency(words: list[str], counts: np.ndarray, vocab_size: int, min_count: int) -> tuple[list[str], np.ndarray]:
    """The vocabulary, and a table from a word's rank of first appearance to its final id.

    words: in order of first appearance; the first `len(counts)` belong to the training text, `counts` times each.
    """
    known = dict(zip(words, counts.tolist(), strict=False))  # in order of first appearance
    if vocab_size or min_count:
        frequent = [word for word in sorted(known, key=known.__getitem__, reverse=True) if word not in (EOS, UNK)]
        frequent = [word for word in frequent if known[word] >= min_count]
        keep = {EOS, UNK, *(frequent[: vocab_size - 2] if vocab_size else frequent)}
        rest = sum(count for word, count in known.items() if word not in keep)
        known = {word: count for word, count in known.items() if word in keep}
        known[UNK] = known.get(UNK, 0) + rest
    vocab = sorted(known, key=known.__getitem__, reverse=True)  # stable: ties stay in order of first appearance
    if UNK not in known:
        vocab += words[len(counts) :]
    index = {word: i for i, word in enumerate(vocab)}
    return vocab, np.array([index[word] if word in index else index[UNK] for word in words])


def make_encoder(vocab: list[str]) -> LabelEncoder:
    """torchnlp's encoder over exactly this vocabulary; its `unknown_index` is the id of `<unk>`, or None."""
    # Reserved labels keep their order, and 267,735 of them take 0.05 s; given as a sample they take 0.6 s.
    unknown = vocab.index(UNK) if UNK in vocab else None
    return LabelEncoder([], reserved_labels=vocab, unknown_index=unknown)


def encode_line(line: str, encoder: LabelEncoder, place: str) -> list[int]:
    """The ids of a line's words, without `<eos>`; `place` names the line in errors.

    Raises:
        UserError: a word is not in the vocabulary, which has no `<unk>`.
    """
    ids = []
    for word in line.split():
        ids.append(encoder.token_to_index.get(word, encoder.unknown_index))
        if ids[-1] is None:
            raise unknown_word(word, place)
    return ids
