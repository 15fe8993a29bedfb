"""Make a corpus of any plain text: words, characters or subword pieces, and the tokenizer for new text.

    python prepare.py book.txt --out data/book                                         # each paragraph is a document
    python prepare.py articles/ --out data/articles --level subword --vocab_size 8000  # each file is a document
    python prepare.py text8 --out data/text8 --level char --documents position         # one text, cut into three
    zcat wiki.gz | python prepare.py - --out data/wiki --like MODEL.pt                 # by a model's tokenizer

Every document goes whole to train.txt, valid.txt or test.txt, one line for each line of the text, with spaces between
the tokens; the tokenizer goes to tokenizer.json, and the checksums of all four to manifest.json. The input is UTF-8:
files, all files of a folder, pipes, or stdin; it is never changed. The tokenizer is made on the training text. The same
text and settings give the same bytes. Memory is bounded by the longest line (with position by nothing) and the numbers
of documents and of different words. Needs `pip install tokenizers`.
"""

import itertools
import json
import os
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from corpus.codec import BLOCK_CHARACTER, SPACE, TokenizerCodec, import_tokenizers
from corpus.documents import TEST, TRAIN, VALID, Files, Source
from corpus.files import MANIFEST, SPLITS, TOKENIZER, file_digest, read_tokenizer, text_digest
from corpus.read import UNK
from harness.files import check_writable, load_model, write
from harness.flags import COUNT, SEED, SWITCH, ArgumentParser, Flag, number
from harness.log import say
from harness.script import run_script
from utils import UserError, replacing

BATCH_LINES = 1000  # lines encoded at once
WHITE = r"\s\x1c-\x1f\x85"  # the characters at which Python splits words
# <unk> and WikiText's @-@; initials; words with inner apostrophes and hyphens, numbers with inner points; dots, dashes;
# any other character.
WORD = rf"<unk>|@[-,.]@|(?:\p{{L}}\.){{2,}}|\w+(?:['’-]\w+|(?<=\d)[.,:]\d+)*|\.{{2,}}|-{{2,}}|[^\w{WHITE}]"

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
    Flag("--normalize", {"choices": ["nfc", "nfkc", "none"]}, "none", "Unicode form of the text; nfc: accents are one "
         "character with their letter; nfkc: also ligatures, full-width letters and the like become plain"),
    Flag("--like", {"metavar": "MODEL.pt|FOLDER"}, None, "use the tokenizer of this model or corpus"),
    Flag("--unwrap", SWITCH, False, "join the lines of each paragraph into one; blank lines separate paragraphs"),
    Flag("--documents", {"choices": ["files", "blocks", "lines", "position"]}, None, "the documents: files, blocks "
         "between blank lines, single lines; position: the text is cut in three, train, valid, test (default: files; "
         "for a single file blocks)"),
    Flag("--document_mark", {"metavar": "MARK"}, None, "documents are what this text separates, e.g. "
         "'<|endoftext|>'; it is left out"),
    Flag("--valid", SHARE, 0.05, "share of the text that goes to valid.txt"),
    Flag("--test", SHARE, 0.05, "share of the text that goes to test.txt"),
    Flag("--valid_file", {"metavar": "FILE"}, None, "another text for valid.txt, instead of a share"),
    Flag("--test_file", {"metavar": "FILE"}, None, "another text for test.txt, instead of a share"),
    Flag("--seed", SEED, 1111, "of the random order of documents"),
]  # fmt: skip


def read_like(path: str) -> str:
    """The tokenizer of a saved model or of a corpus's folder, as it stands there.

    Raises:
        UserError: there is none.
    """
    if Path(path).is_dir():
        tokenizer, hint = read_tokenizer(Path(path))[0], f"has no {TOKENIZER}; give a corpus that prepare.py made"
    else:
        tokenizer = load_model(path, "--like")["tokenizer"]
        hint = "has no tokenizer; give its texts in the form of its corpus, tokens with spaces between them"
    if tokenizer is None:
        raise UserError(f"--like {path}: {hint}")
    return tokenizer


def make_tokenizer(level: str, lower: bool, normalize: str) -> Any:
    """A tokenizer of this level, still without a vocabulary."""
    tokenizers = import_tokenizers()
    pre, normal = tokenizers.pre_tokenizers, tokenizers.normalizers
    normalizers = {"none": [], "nfc": [normal.NFC()], "nfkc": [normal.NFKC()]}[normalize]
    normalizers += [normal.Lowercase()] if lower else []
    if level == "subword":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNK))
    if level == "char":
        normalizers.append(normal.Replace(SPACE, BLOCK_CHARACTER))
        normalizers.append(normal.Replace(tokenizers.Regex(f"[{WHITE}]"), SPACE))
        tokenizer.pre_tokenizer = pre.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        decode = tokenizers.decoders
        spaces = [decode.Replace(SPACE, " "), decode.Replace(BLOCK_CHARACTER, SPACE)]
        tokenizer.decoder = decode.Sequence([*spaces, decode.Fuse()])
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
    if vocab_size < least and (vocab_size or level == "subword"):
        why = "every byte is a piece" if level == "subword" else f"it includes {UNK} and <eos>"
        raise UserError(f"--vocab_size {vocab_size}: is too small, {why}; give {least} or more")
    limits = {"vocab_size": (vocab_size or 2**31) - 1, "min_frequency": min_count, "show_progress": False}
    if level == "subword":
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, **limits)
    else:
        trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=[UNK], **limits)
    if level == "word":  # the trainer would give an <unk> of the text an id of its own
        lines = (line.replace(UNK, " ") for line in lines)
    tokenizer.train_from_iterator(lines, trainer)


def write_corpus(source: Source, tokenizer: Any, contents: str, out: Path) -> list[Counter[str]]:
    """Writes three texts, the tokenizer and a list of their checksums.

    Returns for each text its numbers of lines, words, tokens, unknown.

    contents: of tokenizer.json.
    """
    counts: list[Counter[str]] = [Counter() for _ in SPLITS]
    texts = source.read("writing")
    within = [False] * len(SPLITS)  # whether a text stands within a line
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    with ExitStack() as stack:
        files = [stack.enter_context(replacing(out / f"{split}.txt")) for split in SPLITS]
        while batch := list(itertools.islice(texts, BATCH_LINES)):
            encodings = tokenizer.encode_batch_fast([piece.text for piece in batch])
            for (split, text, ends), encoding in zip(batch, encodings, strict=True):
                if text or source.blanks or within[split]:
                    tokens = [pieces[i] for i in encoding.ids]
                    space = " " if within[split] and tokens else ""
                    files[split].write(f"{space}{' '.join(tokens)}{chr(10) * ends}".encode())
                    counts[split].update(
                        lines=ends, words=len(text.split()) + ends, tokens=len(tokens) + ends, unknown=tokens.count(UNK)
                    )
                    within[split] = not ends
        for path, count in zip((f"{split}.txt" for split in SPLITS), counts, strict=True):
            if count["tokens"] < 2:
                raise UserError(f"--out {out}: {path} would be empty; give more text or a larger share")
        digests = {TOKENIZER: text_digest(contents)}
        for name, file in zip(SPLITS, files, strict=True):
            file.flush()
            digests[f"{name}.txt"] = file_digest(file.name)
        # First, so that what a kill leaves of old and new files is no corpus: it does not fit the list.
        write(str(out / MANIFEST), lambda file: file.write(json.dumps(digests, indent=1).encode()))
        write(str(out / TOKENIZER), lambda file: file.write(contents.encode()))
    return counts


def make_corpus(args: Namespace, files: Files) -> None:
    """Reads the sources, makes the tokenizer or takes that of --like, writes the corpus and prints its size.

    Raises:
        UserError: a source cannot be read or is too small, or the folder cannot be written to.
    """
    out = Path(args.out)
    if args.unwrap and args.documents == "position":
        raise UserError("--unwrap: does not go together with --documents position; leave one of them out")
    if args.document_mark and args.documents:
        raise UserError(f"--document_mark: says what the documents are; leave out --documents {args.documents}")
    given = {split: path for split, path in ((VALID, args.valid_file), (TEST, args.test_file)) if path}
    shares = {split: share for split, share in ((TEST, args.test), (VALID, args.valid)) if split not in given}
    if not all(shares.values()) or sum(shares.values()) >= 1:
        raise UserError(f"--valid {args.valid} --test {args.test}: have to be above 0 and together below 1")
    contents = read_like(args.like) if args.like else ""
    if contents:
        tokenizer = TokenizerCodec(contents, f"--like {args.like}").tokenizer
    else:
        tokenizer = make_tokenizer(args.level, args.lower, args.normalize)
    given_files = {split: files.find(path)[0] for split, path in given.items()}
    written = {os.path.realpath(out / name) for name in (MANIFEST, TOKENIZER, *(f"{split}.txt" for split in SPLITS))}
    for path in [*files.paths, *given_files.values()]:
        if os.path.realpath(path) in written:
            raise UserError(f"--out {out}: {path} would be written over; give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a folder that can be written to") from None
    check_writable(str(out / TOKENIZER), "--out")
    source = Source(files, given_files, args, words=tokenizer.decoder is None)
    if shares:
        source.deal(shares, args.seed)
    if not contents:
        training = (piece.text for piece in source.read("tokenizer") if piece.split == TRAIN)
        train_tokenizer(tokenizer, training, args.level, args.vocab_size, args.min_count)
        contents = tokenizer.to_str(pretty=False)
    counts = write_corpus(source, tokenizer, contents, out)
    if source.empty:
        say(f"| {len(source.empty)} of {len(files.paths)} files are empty and were passed over")
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
    given = vars(parser.parse_args())
    args = Namespace(**{**{flag.name: flag.default for flag in PREPARE}, **given})
    for name in ("level", "vocab_size", "min_count", "lower", "normalize"):
        if args.like and name in given:
            raise UserError(f"--{name}: is settled by the tokenizer of --like {args.like}; leave it out")
    with tempfile.TemporaryDirectory() as spool:
        files = Files(Path(spool))
        try:
            for source in args.sources:
                files.paths += files.find(source)
            make_corpus(args, files)
        except UserError as error:
            raise UserError(files.named(str(error))) from None


if __name__ == "__main__":
    run_script(main)
