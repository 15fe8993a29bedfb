"""A language model of another program as a saved model of this toolkit: LSTM, GRU or QRNN.

    python convert.py hidden650.pt vocab.txt --save gulordava.pt  # word_language_model and what came of it
    python convert.py PTB.pt corpus.MD5.data --save ptb.pt  # awd-lstm-lm: its cached corpus
    python convert.py lstm_fwd.pth itos_wt103.pkl --eos xxbos --unk xxunk --save wt103.pt  # fastai
    python convert.py PTB --save PTB.pt  # a folder that export.py wrote
    python score.py --save gulordava.pt sentences.txt

Reads files of torch 0.3 to today, whole pickled modules or weights alone, without running anything of them. The
vocabulary is a text with a word per line, or a pickle: a list, a dictionary, a corpus. Without one, the vocabulary in
OLD is taken. docs/convert.md has the commands for each program, and what is not converted.
"""

import os
from argparse import Namespace
from typing import Any

from bridges.layouts import Converted, convert
from bridges.torchfiles import open_contents
from bridges.vocabulary import find_words, fit_words, near_unknown, read_words
from corpus.read import UNK
from harness.files import MODEL_FORMAT, check_tensors, check_writable, save
from harness.flags import SWITCH, ArgumentParser, Flag
from harness.script import run_script
from hub.folder import read_back
from utils import UserError

FLAGS = [
    Flag("old", {"metavar": "OLD"}, None, "the file of the model"),
    Flag("vocab", {"metavar": "VOCAB", "nargs": "?"}, None, "the file of its vocabulary"),
    Flag("--save", {"required": True, "metavar": "NEW"}, None, "the file to write"),
    Flag("--force", SWITCH, False, "overwrite NEW"),
    Flag("--eos", {"metavar": "WORD"}, None, "the word that stands between two sentences; it becomes <eos>"),
    Flag("--unk", {"metavar": "WORD"}, None, "the word that stands for unknown words; it becomes <unk>"),
]


def check_save(args: Namespace) -> None:
    """Raises UserError if writing NEW would cost another file."""
    place = f"--save {args.save}"
    if any(os.path.exists(path) and os.path.exists(args.save) and os.path.samefile(path, args.save)
           for path in (args.old, args.vocab) if path):  # fmt: skip
        raise UserError(f"{place}: is a file to read; give another name")
    if os.path.exists(args.save) and not args.force:
        raise UserError(f"{place}: exists; give another name, or --force to overwrite it")
    if os.path.exists(f"{args.save}.state"):
        raise UserError(f"{place}: beside it is the state of a run, {args.save}.state; give another name")
    check_writable(args.save, "--save")


def read(args: Namespace) -> tuple[Converted, list[str]]:
    """The model and its words."""
    with open_contents(args.old) as contents:
        converted = convert(contents)
        count = len(converted.model["encoder.weight"])
        if args.vocab:
            return converted, read_words(args.vocab, count)
        words = find_words(contents.value)
    if words is None or len(words) != count:
        raise UserError(f"{args.old}: has no vocabulary in it; give the file of its {count:,} words too (see --help)")
    return converted, words


def convert_folder(args: Namespace) -> None:
    """A folder of export.py becomes the saved model again that it was made of."""
    if args.vocab or args.eos or args.unk:
        raise UserError(f"{args.old}: is a folder, which has its own vocabulary; leave out VOCAB, --eos and --unk")
    contents = read_back(args.old)
    check_tensors(contents, args.old)
    save(args.save, contents)
    print(f"wrote {args.save}")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_flags("files and words", FLAGS)
    args = parser.parse_all(FLAGS)
    check_save(args)
    if os.path.isdir(args.old):
        return convert_folder(args)
    (settings, model, criterion, layout), words = read(args)
    vocab, repeated = fit_words(words, args.eos, args.unk, args.vocab or args.old)
    contents: dict[str, Any] = {"format": MODEL_FORMAT, "args": settings, "vocab": vocab, "tokenizer": None}
    contents |= {"model": model, "criterion": criterion, "metrics": {}}
    check_tensors(contents, args.old)
    save(args.save, contents)

    sizes = f"{settings['nlayers']} x {settings['nhid']}, embedding {settings['emsize']}"
    tied = "tied" if settings["tied"] else "untied"
    split = f", split at {' '.join(map(str, settings['splits']))}" if settings["splits"] else ""
    print(f"{args.old}: {settings['model']} of {layout}, {sizes}, {tied}, {len(vocab):,} words{split}")
    if repeated:
        print(f"{repeated:,} words stand more than once in the vocabulary; the later ones got a number, as in word#7")
    if unknown := near_unknown(vocab):
        print(f"there is no {UNK}; if {unknown} stands for unknown words, convert again with --unk {unknown}")
    print(f"wrote {args.save}")


if __name__ == "__main__":
    run_script(main)
