"""Plain text for a model without a tokenizer: brought into the form of its corpus by what its vocabulary shows.

The Penn Treebank, for example, is in lower case, has numbers as `N`, contractions apart (`do n't`) and no commas;
WikiText keeps case and punctuation, and writes `well @-@ known`. What the vocabulary knows is never changed.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from typing import NamedTuple

NUMBER = re.compile(r"[+-]?\d[\d.,]*(?<![.,])|[.,]\d+")
WHOLE_NUMBER = re.compile(rf"(?<!\w)(?:{NUMBER.pattern})(?!\w)")
CONTRACTIONS = [re.compile(r"(?i)(.+)(n't)"), re.compile(r"(.+)('\w+)"), re.compile(r"(?i)(can)(not)")]
COMPOUND = re.compile(r"\w+(?:[-'’.]+\w+)*")
INNER = re.compile(r"\w+|[^\w\s]")
MARKS = re.compile(r"[^\w\s]+")
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
        self.contractions = bool({"n't", "'t", "'s"} & self.vocab)
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
        if self.numbers and (text == "%" or NUMBER.fullmatch(text)):
            return "N"
        return text.lower() if self.lower else text

    def knows(self, text: str) -> bool:
        return self.piece(text) in self.vocab

    def split(self, word: str) -> list[str]:
        """A word without white space, in parts."""
        if not word or self.knows(word):
            return [word] if word else []
        for contraction in CONTRACTIONS if self.contractions else ():
            parts = contraction.fullmatch(word.translate(QUOTES))
            if parts and self.knows(parts[2]):
                return [*self.split(word[: parts.end(1)]), word[parts.end(1) :]]
        if word.isalnum():
            return [word]
        if not word[0].isalnum():
            cut = self.marks(word)
            return [word[:cut], *self.split(word[cut:])]
        if not word[-1].isalnum():
            cut = len(word) - self.marks(word[::-1])
            return [*self.split(word[:cut]), word[cut:]]
        for mark in self.joints:
            if mark in word:
                first, rest = word.split(mark, 1)
                return [*self.split(first), f"@{mark}@", *self.split(rest)]
        return [word] if COMPOUND.fullmatch(word) else INNER.findall(word)

    def marks(self, word: str) -> int:
        """How many signs at the start of a word are one token: all of them if it knows them so (`...`), or one."""
        run = MARKS.match(word)
        return run.end() if run and run[0] in self.vocab else 1


def byte_tokens(line: str) -> list[Token]:
    """A token for each byte, its number."""
    return [
        Token(str(byte), character, word)
        for word, character in numbered(line)
        for byte in character.encode("utf-8", "surrogateescape")
    ]


def character_tokens(line: str, vocab: Collection[str] = ()) -> list[Token]:
    """A token for each character, `_` for a space.

    vocab: of a corpus whose form the line is brought into. A capital becomes a small letter, a number N, white space
    one `_`, and signs that are no letters are left out, where the vocabulary has no others.
    """
    if not vocab:
        return [Token(character.replace(" ", "_"), character, word) for word, character in numbered(line)]
    penn, found = [piece for piece in vocab if piece.isupper()] == ["N"], []
    for number, word in enumerate(line.split()):
        if penn:  # contractions apart too
            word = WHOLE_NUMBER.sub(
                "N", CONTRACTIONS[0].sub(r"\1 \2", CONTRACTIONS[1].sub(r"\1 \2", word.translate(QUOTES)))
            )
        for character in f" {word}" if number else word:
            options = ("_" if character == " " else character, character.translate(QUOTES), character.lower())
            piece = next((piece for piece in options if piece in vocab), options[0])
            if piece in vocab or character.isalnum():
                found.append(Token(piece, character, number))
    return found


def numbered(line: str) -> Iterator[tuple[int, str]]:
    """The characters of a line, each with the number of its word; a space belongs to the word after it."""
    ends = [match.end() for match in re.finditer(r"\S+", line)]
    for i, character in enumerate(line):
        yield min(bisect_left(ends, i + 1), len(ends) - 1), character
