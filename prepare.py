"""Make a corpus of any plain text: words, characters or subword pieces, and the tokenizer for new text.

    python prepare.py book.txt --out data/book                                         # each paragraph is a document
    python prepare.py articles/ --out data/articles --level subword --vocab_size 8000  # each file is a document
    zcat wiki.gz | python prepare.py - --out data/wiki --level char

Every document goes whole to train.txt, valid.txt or test.txt, one line for each line of the text, with spaces between
the tokens; the tokenizer goes to tokenizer.json. The input is UTF-8: files, all files of a folder, or stdin; it is
never changed. The tokenizer is made on the training text. The same text and settings give the same bytes. Memory is
bounded by the longest line and the numbers of documents and of different words. Needs `pip install tokenizers`.
"""

import itertools
import shutil
import sys
import tempfile
from argparse import Namespace
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from corpus.codec import SPACE, import_tokenizers
from corpus.files import SPLITS, TOKENIZER
from corpus.read import UNK
from corpus.text import read_lines
from harness.files import check_writable, write
from harness.flags import COUNT, SEED, SWITCH, ArgumentParser, Flag, number
from harness.log import say
from harness.script import run_script
from utils import UserError, replacing

TRAIN, VALID, TEST = range(3)
BATCH_LINES = 1000  # lines encoded at once
WHITE = r"\s\x1c-\x1f\x85"  # the characters at which Python splits words
# Initials; words with inner apostrophes and hyphens, numbers with inner points; dots, dashes; any other character.
WORD = rf"(?:\p{{L}}\.){{2,}}|\w+(?:['’-]\w+|(?<=\d)[.,:]\d+)*|\.{{2,}}|-{{2,}}|[^\w{WHITE}]"

SHARE = {"type": number(float, 0, below=1)}
PREPARE = [
    Flag("sources", {"nargs": "+", "metavar": "FILE"}, None, "text in UTF-8: files, folders, or - for stdin"),
    Flag("--out", {"required": True}, None, "folder of the corpus"),
    Flag("--level", {"choices": ["word", "char", "subword"]}, "word", "what a token is"),
    Flag("--vocab_size", COUNT, None, "size of the vocabulary at most, with <unk> and <eos>; 0: no limit (default: "
         "subword 8000, otherwise 0)"),
    Flag("--min_count", COUNT, 2, "words or characters that are rarer in the training text become <unk>; a pair of "
         "pieces that is rarer does not become a subword"),
    Flag("--lower", SWITCH, False, "convert to lower case"),
    Flag("--unwrap", SWITCH, False, "join the lines of each paragraph into one; blank lines separate paragraphs"),
    Flag("--documents", {"choices": ["files", "blocks", "lines"]}, None, "the documents: files, blocks between blank "
         "lines, or single lines (default: files; for a single file blocks)"),
    Flag("--valid", SHARE, 0.05, "share of the text that goes to valid.txt"),
    Flag("--test", SHARE, 0.05, "share of the text that goes to test.txt"),
    Flag("--valid_file", {"metavar": "FILE"}, None, "another text for valid.txt, instead of a share"),
    Flag("--test_file", {"metavar": "FILE"}, None, "another text for test.txt, instead of a share"),
    Flag("--seed", SEED, 1111, "of the random order of documents"),
]  # fmt: skip


def find_sources(sources: list[str], spool: Path) -> list[Path]:
    """The files to read; those of a folder sorted by name, without hidden ones.

    The text is read three times, so stdin is first copied into the folder `spool`.

    Raises:
        UserError: a folder holds no file.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if source == "-":
            path = spool / "stdin"
            with open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        visible = (p for p in path.rglob("*") if not any(x.startswith(".") for x in p.relative_to(path).parts))
        inside = sorted(filter(Path.is_file, visible))
        if path.is_dir() and not inside:
            raise UserError(f"{source}: is a folder without a file; give texts")
        files += inside or [path]
    return files


class Source:
    """The lines of all texts, read again in every pass, and the split that each document belongs to.

    Args:
        files: the text whose documents are divided among the splits.
        given: another text for a split (--valid_file, --test_file).
        args: the settings.
    """

    def __init__(self, files: list[Path], given: dict[int, Path], args: Namespace) -> None:
        self.files, self.given, self.unwrap = files, given, args.unwrap
        self.documents = args.documents or ("files" if len(files) > 1 else "blocks")
        # Blank lines are kept for characters and subwords, so that the model can write them; words have none.
        self.blanks = args.level != "word" and not args.unwrap and self.documents != "lines"
        self.size = sum(path.stat().st_size for path in [*files, *given.values()] if path.is_file())
        self.splits: np.ndarray | None = None  # of document after document, once they are dealt

    def read(self, title: str) -> Iterator[tuple[int, str]]:
        """Yields (split, line), the texts to deal out first."""
        with self.progress(title) as bar:
            for document, line in self.read_documents(bar):
                yield TRAIN if self.splits is None else int(self.splits[document]), line
            for split, path in self.given.items():
                for line in self.read_file(path, bar):
                    yield split, line

    def progress(self, title: str) -> tqdm:
        """A bar over the bytes read, where there is a terminal to show it."""
        look = {"unit": "B", "unit_scale": True, "leave": False, "disable": not sys.stderr.isatty()}
        return tqdm(total=self.size, desc=title, **look)

    def read_documents(self, bar: tqdm) -> Iterator[tuple[int, str]]:
        """Yields (number of the document, from 0; one of its lines)."""
        document = 0
        for path in self.files:
            for line in self.read_file(path, bar):
                yield document, line
                document += self.documents == "lines" or (self.documents == "blocks" and not line)
            document += self.documents == "files"

    def read_file(self, path: Path, bar: tqdm) -> Iterator[str]:
        """The lines of a text, with one blank line after each paragraph, or without any."""
        paragraph: list[str] = []
        begun, needed = False, self.blanks or self.documents == "blocks"
        for line in itertools.chain(read_lines(str(path), bar), [""]):
            line = line.rstrip()
            if line and self.unwrap:
                paragraph.append(line.strip())
            elif line:
                yield line
            elif begun:
                if self.unwrap:
                    yield " ".join(paragraph)
                    paragraph.clear()
                if needed:
                    yield ""
            begun = bool(line)

    def deal(self, shares: dict[int, float], seed: int) -> None:
        """Divides the documents in random order: its share of the text to each split of `shares`, the rest to train.

        Raises:
            UserError: there are not enough documents.
        """
        sizes = array("q")
        with self.progress("dealing") as bar:
            for document, line in self.read_documents(bar):
                while document >= len(sizes):
                    sizes.append(0)
                sizes[document] += len(line) + 1
        self.splits = np.zeros(len(sizes), np.int8)
        order = np.random.default_rng(seed).permutation(len(sizes)).tolist()
        order = [document for document in order if sizes[document]]
        if len(order) <= len(shares):
            raise UserError(
                f"{self.files[0]}: too few {self.documents} ({len(order)}) for {len(shares) + 1} texts; give "
                "more, --documents lines, or --valid_file and --test_file"
            )
        for split, share in shares.items():
            room = share * sum(sizes)
            for document in order:
                if self.splits[document] == TRAIN and sizes[document] <= room:
                    self.splits[document] = split
                    room -= sizes[document]
            if split not in self.splits:  # every document is larger than the share: take the smallest
                rest = [document for document in order if self.splits[document] == TRAIN]
                self.splits[min(rest, key=sizes.__getitem__)] = split


def make_tokenizer(level: str, lower: bool) -> Any:
    """A tokenizer of this level, still without a vocabulary."""
    tokenizers = import_tokenizers()
    pre, normal = tokenizers.pre_tokenizers, tokenizers.normalizers
    normalizers = [normal.Lowercase()] if lower else []
    if level == "subword":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNK))
    if level == "char":
        normalizers.append(normal.Replace(tokenizers.Regex(f"[{WHITE}]"), SPACE))
        tokenizer.pre_tokenizer = pre.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        space = tokenizers.decoders.Replace(SPACE, " ")
        tokenizer.decoder = tokenizers.decoders.Sequence([space, tokenizers.decoders.Fuse()])
    elif level == "word":
        tokenizer.pre_tokenizer = pre.Split(tokenizers.Regex(WORD), "removed", invert=True)
    tokenizer.normalizer = normal.Sequence(normalizers)
    return tokenizer


def train_tokenizer(tokenizer: Any, lines: Iterator[str], level: str, vocab_size: int | None, min_count: int) -> None:
    """Gives the tokenizer the vocabulary of the training text.

    Raises:
        UserError: `vocab_size` is too small.
    """
    tokenizers = import_tokenizers()
    least = 257 if level == "subword" else 3
    vocab_size = (8000 if level == "subword" else 0) if vocab_size is None else vocab_size
    if 0 < vocab_size < least:
        why = "every byte is a piece" if level == "subword" else f"it includes {UNK} and <eos>"
        raise UserError(f"--vocab_size {vocab_size}: is too small, {why}; give {least} or more")
    limits = {"vocab_size": (vocab_size or 2**31) - 1, "min_frequency": min_count, "show_progress": False}
    if level == "subword":
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, **limits)
    else:
        trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=[UNK], **limits)
    tokenizer.train_from_iterator(lines, trainer)


def write_corpus(source: Source, tokenizer: Any, out: Path) -> list[Counter[str]]:
    """Writes the three texts and the tokenizer; returns for each text its numbers of lines, words, tokens, unknown."""
    counts: list[Counter[str]] = [Counter() for _ in SPLITS]
    texts = source.read("writing")
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    with ExitStack() as stack:
        files = [stack.enter_context(replacing(out / f"{split}.txt")) for split in SPLITS]
        while batch := list(itertools.islice(texts, BATCH_LINES)):
            encodings = tokenizer.encode_batch_fast([line for _, line in batch])
            for (split, line), encoding in zip(batch, encodings, strict=True):
                if line or source.blanks:
                    tokens = [pieces[i] for i in encoding.ids]
                    files[split].write(f"{' '.join(tokens)}\n".encode())
                    counts[split].update(
                        lines=1, words=len(line.split()) + 1, tokens=len(tokens) + 1, unknown=tokens.count(UNK)
                    )
        for path, count in zip((f"{split}.txt" for split in SPLITS), counts, strict=True):
            if count["tokens"] < 2:
                raise UserError(f"--out {out}: {path} would be empty; give more text or a larger share")
        write(str(out / TOKENIZER), lambda file: file.write(tokenizer.to_str(pretty=False).encode()))
    return counts


def make_corpus(args: Namespace, spool: Path) -> None:
    """Reads the sources, makes the tokenizer, writes the corpus and prints its size. `spool`: a folder for stdin.

    Raises:
        UserError: a source cannot be read or is too small, or the folder cannot be written to.
    """
    out = Path(args.out)
    given = {split: Path(path) for split, path in ((VALID, args.valid_file), (TEST, args.test_file)) if path}
    shares = {split: share for split, share in ((TEST, args.test), (VALID, args.valid)) if split not in given}
    if not all(shares.values()) or sum(shares.values()) >= 1:
        raise UserError(f"--valid {args.valid} --test {args.test}: have to be above 0 and together below 1")
    tokenizer = make_tokenizer(args.level, args.lower)
    files = find_sources(args.sources, spool)
    written = {(out / name).resolve() for name in (TOKENIZER, *(f"{split}.txt" for split in SPLITS))}
    for path in [*files, *given.values()]:
        if path.resolve() in written:
            raise UserError(f"--out {out}: {path} would be written over; give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a folder that can be written to") from None
    check_writable(str(out / TOKENIZER), "--out")
    source = Source(files, given, args)
    if shares:
        source.deal(shares, args.seed)
    training = (line for split, line in source.read("tokenizer") if split == TRAIN)
    train_tokenizer(tokenizer, training, args.level, args.vocab_size, args.min_count)
    counts = write_corpus(source, tokenizer, out)
    for split, count in zip(SPLITS, counts, strict=True):
        lines, words, tokens, unknown = (count[name] for name in ("lines", "words", "tokens", "unknown"))
        say(
            f"| {split:5} | {lines:,} lines | {words:,} words | {tokens:,} tokens | {tokens / words:.3f} tokens "
            f"per word | unknown {unknown / tokens:.2%}"
        )
    say(f"| vocabulary {tokenizer.get_vocab_size() + 1:,} | python main.py --data {out} --save MODEL trains on it")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_flags("corpus", PREPARE)
    args = parser.parse_all(PREPARE)
    with tempfile.TemporaryDirectory() as spool:
        try:
            make_corpus(args, Path(spool))
        except UserError as error:  # the spool is gone by then
            raise UserError(str(error).replace(str(Path(spool, "stdin")), "stdin")) from None


if __name__ == "__main__":
    run_script(main)
