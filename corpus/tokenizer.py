"""Plain text to the tokens of a corpus, and back: by its tokenizer.json, or else by what its words look like.

    python prepare.py book.txt --out data/book && python main.py --data data/book --save book.pt

`prepare.py` makes the tokenizer, by Hugging Face's package of that name; it travels in the models trained on the
corpus. Training itself only reads its vocabulary, and needs no package.

    words        split from punctuation; rare ones are <unk>
    characters   `▁` for a space
    subwords     byte-level BPE: `Ġ` for a space, other bytes that are no letters likewise (GPT-2's table)
"""

import codecs
import json
import re
from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np

from corpus.read import EOS, UNK
from utils import UserError

SPACE = "▁"  # the token of a space among characters
NO_SPACE_BEFORE = frozenset([*".,;:!?)]}%’”…/—", "..", "...", "--"])
NO_SPACE_AFTER = frozenset("([{$£€“‘#@/—")


class Token(NamedTuple):
    """A piece of a line."""

    piece: str  # as the vocabulary has it; `<unk>` where it does not
    text: str  # as the line has it
    word: int  # number of the word, apart from others by white space, that it is part of, from 0


def byte_table() -> dict[str, int]:
    """The byte behind each character of a byte-level piece, as in GPT-2: what cannot be seen lies from 256 on."""
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in letters]
    return {chr(byte): byte for byte in letters} | {chr(256 + i): byte for i, byte in enumerate(others)}


def count_units(tokenizer: str | None, vocab: list[str], ids: np.ndarray) -> tuple[int, int] | None:
    """Words and characters of a text: of characters or subwords; None where the tokens say nothing of them.

    A word is what white space sets apart; the end of each line counts as a word, as `<eos>` does in a corpus of
    words, and as a character, the newline.
    """
    try:
        decoder = json.loads(tokenizer)["decoder"] if tokenizer else None  # those of words have none
        kind = None if decoder is None else decoder["type"]
    except (ValueError, KeyError, TypeError, RecursionError):  # a damaged one: those who need it say so
        kind = None
    if kind is None:
        return None
    if kind == "ByteLevel":
        table = byte_table()
        special = {EOS: b"\n", UNK: b"?"}
        # A character that is in no piece is of a word that the tokenizer did not make.
        raw = {c: bytes([table[c]]) if c in table else c.encode() for c in set().union(*vocab)}
        pieces = [special.get(piece) or b"".join(map(raw.__getitem__, piece)) for piece in vocab]
        text = b"".join(map(pieces.__getitem__, ids.tolist())).decode("utf-8", "replace")
    else:
        special = {EOS: "\n", UNK: "?", SPACE: " "}
        pieces = [special.get(piece, piece) for piece in vocab]
        text = "".join(map(pieces.__getitem__, ids.tolist()))
    return len(text.split()) + text.count("\n"), len(text)


class CorpusText:
    """A text in the form of a corpus without a tokenizer, words apart by spaces; to running text and back.

    By the look of the vocabulary: numbers from 0 to 255 are bytes (enwik8), single characters have `_` for the
    space (the Penn Treebank's characters).
    """

    pieces = False  # whether its tokens make up words, and show how many characters there are

    def __init__(self, vocab: list[str]) -> None:
        plain = [word for word in vocab if not (len(word) > 2 and word[0] == "<" and word[-1] == ">")]
        self.bytes = len(plain) > 100 and all(word.isdecimal() and int(word) < 256 for word in plain)
        self.characters = not self.bytes and all(len(word) == 1 for word in plain)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.line_start = True

    def tokens(self, line: str) -> list[Token]:
        """The tokens of a line that has the corpus's form."""
        return [Token(word, word, i) for i, word in enumerate(line.split())]

    def encode(self, line: str) -> str:
        """A line of plain text as the corpus has it."""
        if self.bytes:
            return " ".join(map(str, line.encode("utf-8", "surrogateescape")))
        return " ".join("_" if c == " " else c for c in line) if self.characters else line

    def piece(self, word: str) -> str:
        """What the next word adds to the text: a newline for `<eos>`, nothing for part of a character."""
        if self.bytes:
            byte = b"\n" if word == EOS else bytes([int(word)]) if word.isdecimal() else b"\xff"
            piece = self.decoder.decode(byte)  # 0xff, in no UTF-8 text, becomes the replacement character
        elif word == EOS:
            piece = "\n"
        elif self.characters:
            piece = " " if word == "_" else word
        else:
            piece = word if self.line_start else f" {word}"
        self.line_start = piece.endswith("\n") if piece else self.line_start
        return piece

    def shown(self, word: str) -> str:
        """A token by itself."""
        return word

    def end(self) -> str:
        """What is left at the end of the text: a character cut short, and the last newline."""
        rest = self.decoder.decode(b"", final=True)
        return rest if self.line_start and not rest else rest + "\n"


class TokenizerText:
    """Plain text, by a tokenizer; the same calls.

    Raises:
        UserError: the package `tokenizers` is not installed, or it does not know what to make of `tokenizer`.
    """

    def __init__(self, tokenizer: str, place: str) -> None:
        tokenizers = import_tokenizers()
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        except Exception:  # of no narrower class
            raise UserError(f"{place}: holds no tokenizer that can be read; train the model again") from None
        self.new_stream = lambda: tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        self.pieces = self.tokenizer.decoder is not None
        self.start_line()

    def start_line(self) -> None:
        self.line_start, self.before, self.quotes = True, "", 0
        self.stream, self.pending = self.new_stream(), []  # of a character that is not whole yet

    def tokens(self, line: str) -> list[Token]:
        """The tokens of a line of plain text."""
        encoding = self.tokenizer.encode(line)
        ends = [match.end() for match in re.finditer(r"\S+", line)]
        return [
            Token(piece, line[first:last], min(bisect_left(ends, last), len(ends) - 1))
            for piece, (first, last) in zip(encoding.tokens, encoding.offsets, strict=True)
        ]

    def encode(self, line: str) -> str:
        return " ".join(self.tokenizer.encode(line).tokens)

    def piece(self, word: str) -> str:
        if word == EOS:
            return self.end() or "\n"
        self.line_start = False
        if self.pieces:
            token = self.tokenizer.token_to_id(word)
            if token is None:  # `<unk>`, which a model of a shortened vocabulary has beside the tokenizer's
                return word
            self.pending.append(token)
            piece = self.stream.step(self.tokenizer, token) or ""
            if piece:
                self.pending.clear()
            return piece
        space = self.before and not self.joined(word)
        self.before, self.quotes = word, self.quotes + (word == '"')
        return f" {word}" if space else word

    def shown(self, word: str) -> str:
        """A token by itself, as text, with the space before it; a part of a character as the tokenizer has it."""
        token = self.tokenizer.token_to_id(word)
        if not self.pieces or word in (EOS, UNK) or token is None:
            return word
        text = self.tokenizer.decode([token])
        return text if text.isprintable() and "\ufffd" not in text else word

    def joined(self, word: str) -> bool:
        """Whether no space belongs before a word: punctuation is put where English has it."""
        opened = self.quotes % 2 == 1
        if (word == '"' and opened) or (self.before == '"' and opened):
            return True
        return word in NO_SPACE_BEFORE or self.before in NO_SPACE_AFTER

    def end(self) -> str:
        rest = self.tokenizer.decode(self.pending) if self.pending else ""
        rest = "" if self.line_start else rest + "\n"
        self.start_line()
        return rest


def make_text(tokenizer: str | None, vocab: list[str], place: str) -> CorpusText | TokenizerText:
    """The text of a saved model; `place` says in an error where that is from.

    Raises:
        UserError: see `TokenizerText`; or no line of it could end.
    """
    if EOS not in vocab:
        raise UserError(f"{place}: has no {EOS} in its vocabulary; use a model of main.py's")
    return TokenizerText(tokenizer, place) if tokenizer else CorpusText(vocab)


def import_tokenizers() -> Any:
    """The package, imported only when it is needed; UserError where it is not installed."""
    try:
        import tokenizers
        import tokenizers.decoders
    except ImportError:
        raise UserError("tokenizers: the package is not installed; pip install tokenizers") from None
    return tokenizers
