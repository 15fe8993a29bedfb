"""The vocabulary of a foreign model: a text with a word per line, or a pickle that holds the words in their order."""

import re
from collections.abc import Iterator
from typing import Any

from bridges.pickles import Bag
from bridges.torchfiles import open_contents
from corpus.read import EOS, UNK
from corpus.text import read_lines
from utils import UserError

LISTS = ("idx2word", "itos", "index2word", "id2word", "words")  # attributes that hold the words in their order
TABLES = ("word2idx", "stoi", "word2index", "word2id")  # attributes that hold a word's number
HOLDERS = ("dictionary", "vocab", "vocabulary", "corpus", "dls", "data")  # attributes whose object holds one of those
DEPTH = 4  # of holders in holders
PICKLES = re.compile(
    rb"\x80[\x02-\x05]|PK\x03\x04|\((lp|dp|i)|[\]}]q\0|c?copy_reg\n|ccollections\n"
)  # how pickles begin
ENDS = ("xxbos", "xxeos", "xbos", "_bos_", "_eos_", "</s>", "<s>", "<EOS>", "eos", "[EOS]")  # that --eos may mean
UNKNOWN = ("xxunk", "_unk_", "<UNK>", "unk", "UNK", "[UNK]")  # that --unk may mean


def find_words(value: Any) -> list[str] | None:
    """The words of a list, a table of numbers, a dictionary, a corpus, or a checkpoint that has one of them."""
    seen: set[int] = set()  # a file can hold an object within itself

    def search(value: Any, depth: int) -> list[str] | None:
        if depth > DEPTH or id(value) in seen:
            return None
        seen.add(id(value))
        if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            return value
        if isinstance(value, dict) and (words := words_of_table(value)):
            return words
        return next((words for part in parts_of(value) if (words := search(part, depth + 1))), None)

    return search(value, 0)


def parts_of(value: Any) -> Iterator[Any]:
    """The parts of an object that can hold its words, the most direct first."""
    if isinstance(value, list | tuple):
        yield from (part for part in value[:10] if isinstance(part, dict | Bag))
    if isinstance(value, Bag):
        if value.items or value.entries:
            yield value.items or value.entries
        value = value.state
    if isinstance(value, dict):
        yield from (value[name] for name in (*LISTS, *TABLES, *HOLDERS) if name in value)


def words_of_table(table: dict[Any, Any]) -> list[str] | None:
    """The words of {word: number} or {number: word}, if the numbers are those from 0 on."""
    if all(type(number) is int for number in table):
        table = {word: number for number, word in table.items() if isinstance(word, str)}
    if not table or not all(isinstance(word, str) and type(number) is int for word, number in table.items()):
        return None
    words = sorted(table, key=table.__getitem__)
    return words if [table[word] for word in words] == list(range(len(words))) else None


def read_words(path: str, count: int) -> list[str]:
    """The `count` words of a model's vocabulary file.

    Raises:
        UserError: it cannot be read, holds no words, or another number of words.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the file of the vocabulary") from None
    if not PICKLES.match(start):
        words = split_lines(list(read_lines(path)), count)
    else:
        with open_contents(path) as contents:
            words = find_words(contents.value) or []
        if not words:
            raise UserError(
                f"{path}: is a pickle without a list of words; give the vocabulary as text, a word per line"
            )
    if len(words) != count:
        problem = f"has {len(words):,} words, and the model {count:,}"
        raise UserError(f"{path}: {problem}; give the vocabulary that the model was trained with")
    return words


def split_lines(lines: list[str], count: int) -> list[str]:
    """The words of a text: its lines, or as some of the programs read it, what stands between white space."""
    while len(lines) > count and not lines[-1]:
        lines = lines[:-1]
    if len(lines) != count and len(words := " ".join(lines).split()) == count:
        return words
    return lines


def fit_words(words: list[str], eos: str | None, unk: str | None, place: str) -> tuple[list[str], int]:
    """The vocabulary as a saved model has it: distinct words, with `<eos>` and `<unk>`.

    fastai fills up its vocabulary with the word `xxfake`, again and again. A word that is there already gets its number
    as an ending; it can then not be read from a text.

    Returns:
        The words, and how many got a number.

    Raises:
        UserError: a word that a flag names is not there, or there is no `<eos>`.
    """
    words = [word.encode("utf-8", "replace").decode() for word in words]  # halves of characters
    for flag, word, name in (("--eos", eos, EOS), ("--unk", unk, UNK)):
        if word is None or word == name:
            continue
        if word not in words:
            raise UserError(f"{flag} {word}: is not in the vocabulary, {place}; give a word of it")
        if name in words:
            raise UserError(f"{flag} {word}: {place} has {name} already; leave the flag out")
        words[words.index(word)] = name
    if EOS not in words:
        near = [word for word in ENDS if word in words]
        raise UserError(
            f"{place}: has no {EOS}, the word between two sentences; name the one that plays its part with --eos"
            + (f", here {' or '.join(near)}" if near else "")
        )
    known, repeated = set(words), 0
    seen: set[str] = set()
    for i, word in enumerate(words):
        if word in seen:
            repeated += 1
            words[i] = word = distinct(f"{word}#{i}", known)
            known.add(word)
        seen.add(word)
    return words, repeated


def distinct(word: str, known: set[str]) -> str:
    while word in known:
        word += "#"
    return word


def near_unknown(words: list[str]) -> str | None:
    """The word of a vocabulary without `<unk>` that may stand for unknown words."""
    return None if UNK in words else next((word for word in UNKNOWN if word in words), None)
