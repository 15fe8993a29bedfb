"""Plain text to tokens and back: by the corpus's tokenizer, or without one by rules that the vocabulary shows.

prepare.py makes the tokenizer, with Hugging Face's package `tokenizers`, and writes it to tokenizer.json. Each model
that is trained on the corpus holds a copy. Training reads only its vocabulary, and does not need the package.

    level word      words apart from punctuation; rare words are <unk>
    level char      characters; `▁` stands for a space
    level subword   byte-level BPE; `Ġ` stands for a space, other signs for other bytes that are no letters (GPT-2)
"""

import codecs
import json
import re
import sys
from bisect import bisect_left
from typing import Any

import numpy as np

from corpus.plain import PlainForm, Token, byte_tokens, character_tokens
from corpus.read import EOS, UNK
from utils import UserError

SPACE = "▁"  # the token of a space among characters
BLOCK_CHARACTER = "\ufdd0"  # the token of the character `▁` itself there; in Unicode no text has this one
# Settings that prepare.py leaves empty: with a prefix the package can panic, with dropout it cuts a text by chance.
NOT_IN_OURS = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
WHITE_SPACE = b" \t\n\r\v\f"
NO_SPACE_BEFORE = frozenset([*".,;:!?)]}%’”…/—", "..", "...", "--"])
NO_SPACE_AFTER = frozenset("([{$£€“‘#@/—")


def byte_table() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for, as in GPT-2: invisible ones from 256 on."""
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in letters]
    return {chr(byte): byte for byte in letters} | {chr(256 + i): byte for i, byte in enumerate(others)}


def texts_of_pieces(tokenizer: str | None, vocab: list[str]) -> list[bytes] | None:
    """The UTF-8 text of each piece of the vocabulary, or a part of a character; None when the tokens are words.

    That of `<eos>` is a newline, that of `<unk>` a question mark.
    """
    try:
        decoder = json.loads(tokenizer)["decoder"] if tokenizer else None  # tokenizers of words have none
        kind = None if decoder is None else decoder["type"]
    except (ValueError, KeyError, TypeError, RecursionError):  # damaged: `TokenizerCodec` reports it
        kind = None
    if kind is None:
        return None
    special = {EOS: b"\n", UNK: b"?"}
    if kind == "ByteLevel":
        table = byte_table()
        # A character that the table lacks belongs to a word that does not come from the tokenizer.
        raw = {c: bytes([table[c]]) if c in table else c.encode() for piece in vocab for c in piece}
        return [special[p] if p in special else b"".join(map(raw.__getitem__, p)) for p in vocab]
    special[SPACE] = b" "
    return [special.get(piece, piece.encode()) for piece in vocab]


def count_units(tokenizer: str | None, vocab: list[str], ids: np.ndarray) -> tuple[int, int] | None:
    """The numbers of words and characters in a text of characters or subwords; None when the tokens are words.

    White space separates words. The end of each line counts as one word, as `<eos>` does in a corpus of words, and as
    one character, the newline.
    """
    pieces = texts_of_pieces(tokenizer, vocab)
    if pieces is None:
        return None
    text = b"".join(map(pieces.__getitem__, ids.tolist())).decode("utf-8", "replace")
    return len(text.split()) + text.count("\n"), len(text)


class WordCodec:
    """The codec of a model without a tokenizer: white space separates the tokens.

    If all words of the vocabulary are numbers from 0 to 255, they are bytes (enwik8). If all are single characters, `_`
    stands for a space (the Penn Treebank's characters).

    plain: lines are plain text (--plain), to be brought into this form.
    """

    def __init__(self, vocab: list[str], plain: bool = False) -> None:
        words = [word for word in vocab if not (len(word) > 2 and word[0] == "<" and word[-1] == ">")]
        self.bytes = len(words) > 100 and all(word.isdecimal() and int(word) < 256 for word in words)
        self.characters = not self.bytes and all(len(word) == 1 for word in words)
        self.plain = PlainForm(vocab) if plain else None
        self.splits_words = plain and (self.bytes or self.characters)  # whether words are split, and spaces are tokens
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.line_start = True

    def tokens(self, line: str) -> list[Token]:
        """The tokens of a line in the corpus's form, or with --plain of plain text."""
        if self.plain and self.bytes:
            return byte_tokens(line)
        if self.plain and self.characters:
            return character_tokens(line, self.plain.vocab)
        if self.plain:
            return self.plain.tokens(line)
        return [Token(word, word, i) for i, word in enumerate(line.split())]

    def starts_word(self, piece: str) -> bool:
        """Whether a token begins with a space, so that a new word starts."""
        return self.splits_words and piece == ("32" if self.bytes else "_")

    def encode(self, line: str) -> str:
        """A line of plain text in the corpus's form: tokens with spaces between them. Words are as they are given."""
        if self.plain or self.bytes or self.characters:
            tokens = self.tokens(line) if self.plain else byte_tokens(line) if self.bytes else character_tokens(line)
            return " ".join(token.piece for token in tokens)
        return line

    def piece(self, word: str) -> str:
        """The text that the next token adds: a newline for `<eos>`, nothing for part of a character."""
        if self.bytes:
            byte = b"\n" if word == EOS else bytes([int(word)]) if word.isdecimal() else b"\xff"
            piece = self.decoder.decode(byte)  # 0xff, which is never in UTF-8, becomes the replacement character
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
        """The rest of the text after the last token: an incomplete character, and the last newline."""
        rest = self.decoder.decode(b"", final=True)
        return rest if self.line_start and not rest else rest + "\n"


class TokenizerCodec:
    """The codec of a model with a tokenizer, with the same methods.

    Raises:
        UserError: the package `tokenizers` is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: str, place: str) -> None:
        tokenizers = import_tokenizers()
        try:
            if any(json.loads(tokenizer)["model"].get(setting) for setting in NOT_IN_OURS):
                raise ValueError
            self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        except Exception:  # of no narrower class
            raise UserError(f"{place}: holds no tokenizer that can be read; train the model again") from None
        self.new_stream = lambda: tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        self.splits_words = self.tokenizer.decoder is not None
        byte_level = isinstance(self.tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self.bytes_of_letters = byte_table() if byte_level else {}
        self.start_line()

    def start_line(self) -> None:
        self.line_start, self.before, self.quotes = True, "", 0
        self.stream = self.new_stream()
        self.pending: list[int] = []  # tokens of a character that is not complete yet

    def tokens(self, line: str) -> list[Token]:
        """The tokens of a line of plain text."""
        encoding = self.tokenizer.encode(line)
        ends = [match.end() for match in re.finditer(r"\S+", line)]
        return [
            Token(piece, line[first:last], min(bisect_left(ends, last), len(ends) - 1))
            for piece, (first, last) in zip(encoding.tokens, encoding.offsets, strict=True)
        ]

    def starts_word(self, piece: str) -> bool:
        if self.bytes_of_letters:
            return self.bytes_of_letters.get(piece[0], 0) in WHITE_SPACE
        return self.splits_words and (piece == SPACE or piece.isspace())

    def encode(self, line: str) -> str:
        return " ".join(self.tokenizer.encode(line).tokens)

    def piece(self, word: str) -> str:
        if word == EOS:
            return self.end() or "\n"
        self.line_start = False
        if self.splits_words:
            token = self.tokenizer.token_to_id(word)
            if token is None:  # `<unk>`, which a shortened vocabulary (--vocab_size) has beside the tokenizer's pieces
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
        """A token by itself as text, with the space before it; part of a character as in the vocabulary."""
        token = self.tokenizer.token_to_id(word)
        if not self.splits_words or word in (EOS, UNK) or token is None:
            return word
        text = self.tokenizer.decode([token])
        return text if text.isprintable() and "\ufffd" not in text else word

    def joined(self, word: str) -> bool:
        """Whether no space belongs before a word, by the rules of English punctuation."""
        opened = self.quotes % 2 == 1
        if (word == '"' and opened) or (self.before == '"' and opened):
            return True
        return word in NO_SPACE_BEFORE or self.before in NO_SPACE_AFTER

    def end(self) -> str:
        rest = self.tokenizer.decode(self.pending) if self.pending else ""
        rest = "" if self.line_start else rest + "\n"
        self.start_line()
        return rest


Codec = WordCodec | TokenizerCodec


def make_codec(tokenizer: str | None, vocab: list[str], place: str, plain: bool = False) -> Codec:
    """The codec of a saved model; `place` names the model in errors. `plain`: --plain; its rules go to stderr.

    Raises:
        UserError: see `TokenizerCodec`; or the vocabulary has no `<eos>`, so that no line could end; or `plain` is of
            no use, because the tokenizer takes plain text.
    """
    if EOS not in vocab:
        raise UserError(f"{place}: has no {EOS} in its vocabulary; use a model that main.py trained")
    if tokenizer and plain:
        raise UserError(f"--plain: {place} has a tokenizer, which takes plain text; leave it out")
    if tokenizer:
        return TokenizerCodec(tokenizer, place)
    codec = WordCodec(vocab, plain)
    if codec.plain:
        form = "bytes" if codec.bytes else "characters" if codec.characters else str(codec.plain)
        print(f"--plain: the text is brought into the form of the model's vocabulary: {form}", file=sys.stderr)
    return codec


def import_tokenizers() -> Any:
    """The package `tokenizers`, imported only when it is needed; UserError if it is not installed."""
    try:
        import tokenizers
        import tokenizers.decoders
    except ImportError:
        raise UserError("tokenizers: the package is not installed; pip install tokenizers") from None
    return tokenizers
