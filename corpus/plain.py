"""Plain text for a model without a tokenizer: brought into the form of its corpus by what its vocabulary shows.

The Penn Treebank, for example, is in lower case, has numbers as `N`, contractions apart (`do n't`) and no commas;
WikiText keeps case and punctuation, and writes `well @-@ known`. What the vocabulary knows is never changed.
"""

import re
from bisect import bisect_left
from typing import NamedTuple

NUMBER = re.compile(r"[+-]?\d[\d.,]*(?<![.,])|[.,]\d+")
CONTRACTION = re.compile(r"(?i)(.+?)(n't|'(?:s|re|ve|ll|d|m))")
COMPOUND = re.compile(r"\w+(?:[-'’.]\w+)*")
INNER = re.compile(r"\w+|[^\w\s]")
QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})


class Token(NamedTuple):
    """A token of a line."""

    piece: str  # the token in the vocabulary, or `<unk>`
    text: str  # the characters of the line
    word: int  # the number, from 0, of the word that the token is part of; white space separates words


class PlainForm:
    """The form of a corpus of words, as its vocabulary shows it."""

    def __init__(self, vocab: list[str]) -> None:
        self.vocab = set(vocab)
        words = [word for word in vocab if not re.fullmatch(r"<.+>", word)]
        self.numbers = "N" in self.vocab and not any(word.isdecimal() for word in words)
        self.lower = not any(word != word.lower() for word in words if word != "N")
        self.contractions = bool({"n't", "'s"} & self.vocab)
        self.joints = [mark for mark in "-,." if f"@{mark}@" in self.vocab]
        self.punctuation = bool(set('.,;:!?"') & self.vocab)

    def __str__(self) -> str:
        rules = {
            "in lower case": self.lower,
            "numbers as N": self.numbers,
            "contractions apart": self.contractions,
            f"words joined by {' '.join(f'@{mark}@' for mark in self.joints)}": bool(self.joints),
            "punctuation apart": self.punctuation,
            "without punctuation": not self.punctuation,
        }
        return ", ".join(rule for rule, holds in rules.items() if holds)

    def tokens(self, line: str) -> list[Token]:
        """The tokens of a line of plain text; punctuation that such a corpus does not have is left out."""
        found = []
        for number, word in enumerate(line.split()):
            for text in self.split(word):
                piece = self.piece(text)
                if self.punctuation or piece in self.vocab or any(map(str.isalnum, piece)):
                    found.append(Token(piece, text, number))
        return found

    def piece(self, text: str) -> str:
        """The token that stands for a part of a word."""
        if text in self.vocab:
            return text
        text = text.translate(QUOTES)
        if self.numbers and NUMBER.fullmatch(text):
            return "N"
        return text.lower() if self.lower else text

    def knows(self, text: str) -> bool:
        return self.piece(text) in self.vocab

    def split(self, word: str) -> list[str]:
        """A word without white space, in parts."""
        if not word or self.knows(word) or word.isalnum():
            return [word] if word else []
        contraction = CONTRACTION.fullmatch(word.translate(QUOTES))
        if self.contractions and contraction and self.knows(contraction[2]):
            cut = len(contraction[1])
            return [*self.split(word[:cut]), word[cut:]]
        if not word[0].isalnum():
            return [word[0], *self.split(word[1:])]
        if not word[-1].isalnum():
            return [*self.split(word[:-1]), word[-1]]
        for mark in self.joints:
            if mark in word:
                first, rest = word.split(mark, 1)
                return [*self.split(first), f"@{mark}@", *self.split(rest)]
        return [word] if COMPOUND.fullmatch(word) else INNER.findall(word)


def character_tokens(line: str, as_bytes: bool) -> list[Token]:
    """A token for each character, `_` for a space; or one for each byte, its number."""
    ends = [match.end() for match in re.finditer(r"\S+", line)]
    found = []
    for i, character in enumerate(line):
        word = min(bisect_left(ends, i + 1), len(ends) - 1)
        pieces = map(str, character.encode("utf-8", "surrogateescape")) if as_bytes else [character.replace(" ", "_")]
        found += [Token(piece, character, word) for piece in pieces]
    return found
