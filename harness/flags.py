"""The settings of main.py and finetune.py, one row of `FLAGS` each: type, default, help text, whether it is stored.

A value on the command line wins over one in a file, and that one over the default. A flag that contradicts the shape
of a saved model is an error.
"""

import argparse
import math
import time
from argparse import Namespace
from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

from harness.needs import check_needs
from model import CELLS, LAYERS
from optim import OPTIMIZERS, TWO_TAILED
from utils import UserError


def number(
    kind: type[int] | type[float], least: float, most: float = math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite int or float in [least, most], smaller than `below`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not (least <= value <= most and value < below and math.isfinite(value)):
            limit = f" and below {below:g}" if below < math.inf else f" and at most {most:g}"
            limit = "" if below == most == math.inf else limit
            raise argparse.ArgumentTypeError(f"{text} is out of range; give at least {least:g}{limit}")
        return value

    return parse


def chrono(text: str) -> float:
    """An argparse type: 0, or a number above 2."""
    value: float = number(float, 0, most=1e38)(text)
    if 0 < value <= 2:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give a number above 2, or 0")
    return value


DEPTH = 100  # the most layers and rounds: a model is built to check a file that claims to hold it
PROBABILITY = {"type": number(float, 0, below=1)}
POSITIVE = {"type": number(int, 1, most=10**9)}
FACTOR = {"type": number(float, 0, most=1e38)}  # float32 ends at 3.4e38
COUNT = {"type": number(int, 0, most=10**9)}
SEED = {"type": number(int, 0, most=2**63 - 1)}
SWITCH = {"action": "store_true"}
TOGGLE = {"action": argparse.BooleanOptionalAction}  # with a --no-… that turns off a stored setting
AVERAGE = {"nargs": "?", "const": True, "choices": [TWO_TAILED]}


class Flag(NamedTuple):
    """A setting. `names`: its spellings on the command line; the last one is its name in the namespace."""

    names: str
    options: dict[str, Any]  # further arguments of argparse's `add_argument`
    default: Any
    help: str
    shapes_model: bool = False  # the value of a saved model cannot be changed
    stored: bool = True  # a resumed run takes it from the file
    inherited: bool = True  # finetune.py takes it from the model that it starts from

    @property
    def name(self) -> str:
        return self.options.get("dest") or self.names.split()[-1].lstrip("-")

    def takes(self, value: Any) -> bool:
        """Whether a file may hold this value: one that the command line accepts, or None if that is the default."""
        if value is None:
            return self.default is None
        if self.options in (SWITCH, TOGGLE):
            return isinstance(value, bool)
        if self.options is AVERAGE:
            return isinstance(value, bool) or value == TWO_TAILED
        if isinstance(value, list) != ("nargs" in self.options):
            return False
        parse, choices = self.options.get("type", str), self.options.get("choices")
        try:
            values = value if isinstance(value, list) else [value]
            return all(parse(str(one)) == one and (choices is None or one in choices) for one in values)
        except (argparse.ArgumentTypeError, ValueError):
            return False


NOT_STORED = {"stored": False}
SHAPES_MODEL = {"shapes_model": True}
NOT_INHERITED = {"inherited": False}
PLAIN = Flag(
    "--plain", SWITCH, False, "the text is plain: bring it into the form of the vocabulary (models without a tokenizer)"
)
TEMPERATURE = {"type": number(float, 0.01, most=100)}
TEMPERED = Flag("--temperature", TEMPERATURE, 1.0, "evaluate at T: every distribution p of the model becomes p^(1/T), "
                "renormalised over the vocabulary; 1: the model as it is", **NOT_STORED)  # fmt: skip
SEARCH_TEMPERATURES = Flag("--search_temperatures", {**TEMPERATURE, "nargs": "+"}, None, "the values tried (default: "
                           "that of --temperature)")  # fmt: skip
RUN = "run"
MODEL = "model (read from the saved one if there is one)"
REGULARISATION = "regularisation (dropouts are probabilities in [0, 1))"
OPTIMISATION = "optimisation"
MAIN = "main.py only"
FLAGS: dict[str, list[Flag]] = {
    RUN: [
        Flag("--data", {}, "data/penn", "folder with train.txt, valid.txt, test.txt; or penn_treebank, "
             "wikitext_2 (PyTorch-NLP fetches)"),
        Flag("--device", {}, "auto", "auto, cpu, cuda, cuda:N or mps", **NOT_STORED),
        Flag("--cuda", {"dest": "device", "action": "store_const", "const": "auto"}, None, "as --device auto"),
        Flag("--amp", {"choices": ["none", "bf16", "fp16"]}, "none", "mixed precision, in training only"),
        Flag("--graphs", TOGGLE, False, "on a GPU, start all kernels of a training step at once, by a CUDA graph per "
             "length of batch (one process, without fp16 and --splits)", **NOT_STORED),
        Flag("--padded", TOGGLE, False, "on a GPU, fill up the widths of a QRNN's products to whole 16 bytes by zeros; "
             "changes no value", **NOT_STORED),
        Flag("--persistent", TOGGLE, False, "on a GPU, train each LSTM or GRU layer, and each of Melis's LSTM, by one "
             "kernel launch per direction that keeps the recurrent weights in registers", **NOT_STORED),
        Flag("--save", {}, None, "file of the model; finetune.py starts from it; .state (to resume) and .log.jsonl are "
             "written beside it (default: a time stamp; in finetune.py PTB.pt)", **NOT_STORED),
        Flag("--resume", {}, "", "go on from this model and its .state, or without a .state start from the model; "
             "auto: go on from --save if it exists, otherwise start a new run", **NOT_STORED),
        Flag("--log-interval --log_interval", POSITIVE, None, "batches between two log lines (default: 200, or "
             "a tenth of an epoch if that is less)"),
        Flag("--checkpoint_every", COUNT, 0, "write the .state every N steps too; 0: only after each epoch"),
        Flag("--tensorboard", {"metavar": "DIR"}, None, "write the figures for TensorBoard too, to DIR", **NOT_STORED),
    ],
    MODEL: [
        Flag("--model", {"choices": list(LAYERS)}, "LSTM", "kind of the recurrent layers", **SHAPES_MODEL),
        Flag("--emsize", POSITIVE, 400, "size of the word embeddings", **SHAPES_MODEL),
        Flag("--nhid", POSITIVE, 1150, "hidden units per layer", **SHAPES_MODEL),
        Flag("--nlayers", {"type": number(int, 1, most=DEPTH)}, 3, "number of recurrent layers", **SHAPES_MODEL),
        Flag("--tied", SWITCH, True, "decoder weight = embedding weight", **SHAPES_MODEL),
        Flag("--untied", {"dest": "tied", "action": "store_false"}, None, "a separate decoder weight"),
        Flag("--n_experts", COUNT, 0, "softmaxes in the mixture; 0: one softmax without latents", **SHAPES_MODEL),
        Flag("--nhidlast", COUNT, 0, "hidden units of the last layer; 0: emsize if tied or with --n_experts, "
             "otherwise nhid", **SHAPES_MODEL),
        Flag("--rounds", {"type": number(int, 0, most=DEPTH)}, 5, "Mogrifier: rounds in which input and state "
             "gate each other; 0: Melis's LSTM", **SHAPES_MODEL),
        Flag("--cell", {"choices": list(CELLS)}, "lstm", "Mogrifier: the cell after the rounds, Melis's LSTM or his "
             "RLSTM", **SHAPES_MODEL),
        Flag("--rank", COUNT, 0, "Mogrifier: rank of the rounds' matrices; 0: full rank", **SHAPES_MODEL),
    ],
    REGULARISATION: [
        Flag("--dropout", PROBABILITY, 0.4, "locked dropout after the last layer"),
        Flag("--dropouth", PROBABILITY, 0.3, "locked dropout between layers"),
        Flag("--dropouti", PROBABILITY, 0.65, "locked dropout on the embeddings"),
        Flag("--dropoute", PROBABILITY, 0.1, "dropout of whole word types (Mogrifier: 0 unless given)"),
        Flag("--wdrop", PROBABILITY, 0.5, "weight drop: hidden-to-hidden, or all of a QRNN (Mogrifier: none)"),
        Flag("--dropoutr", PROBABILITY, 0.0, "dropout of a Mogrifier's state, one mask for all steps of a batch"),
        Flag("--drop_state", PROBABILITY, 0.0, "probability that a column of a batch starts from a zero state "
             "(Mogrifier: 0.01 unless given)"),
        Flag("--dropoutl", PROBABILITY, 0.29, "locked dropout on the latents of --n_experts"),
        Flag("--samples", POSITIVE, 1, "train on the mean of the probabilities under N dropout masks, at N times "
             "the cost"),
        Flag("--alpha", FACTOR, 2.0, "activation regularisation (AR); 0: none"),
        Flag("--beta", FACTOR, 1.0, "temporal activation regularisation (TAR); 0: none"),
        Flag("--wdecay", FACTOR, 1.2e-6, "weight decay on all weights"),
    ],
    OPTIMISATION: [
        Flag("--lr", FACTOR, None, f"rate of a batch of length bptt (default: "
             f"{', '.join(f'{name} {row.lr:g}' for name, row in OPTIMIZERS.items())})", **NOT_INHERITED),
        Flag("--clip", FACTOR, 0.25, "clip the gradient to this norm; 0: off"),
        Flag("--epochs", COUNT, 8000, "train up to this epoch", **NOT_INHERITED),
        Flag("--max_steps", COUNT, 0, "stop after this many optimizer steps in all; 0: no limit", **NOT_STORED),
        Flag("--max_minutes", {"type": number(float, 0)}, 0.0, "write the .state and end with status 0 "
             "after N minutes; 0: no limit", **NOT_STORED),
        Flag("--batch_size", POSITIVE, 80, "columns of text side by side, of all processes together"),
        Flag("--bptt", POSITIVE, 70, "base sequence length in tokens; the length of each batch varies around it"),
        Flag("--max_seq_len", COUNT, 0, "longest sequence length, in tokens; 0: no limit"),
        Flag("--shuffle", TOGGLE, False, "rotate each column of the text by a random offset in each epoch"),
        Flag("--nonmono", COUNT, 5, "the validation loss has stalled when it is above the best one of more than N "
             "epochs ago", **NOT_INHERITED),
        Flag("--seed", SEED, 1111, "of all random numbers"),
    ],
    MAIN: [
        Flag("--optimizer", {"choices": list(OPTIMIZERS)}, "sgd", "sgd: NT-ASGD, which averages after a "
             "stall; adam and radam keep two further numbers in memory per weight, radam two more during its step",
             **NOT_INHERITED),
        Flag("--beta1", PROBABILITY, 0.9, "of Adam and RAdam: share of the mean gradient that is kept per step",
             **NOT_INHERITED),
        Flag("--average", AVERAGE, False, "average the weights once the validation loss stalls, not only under SGD; "
             "two-tailed: from the first step on, over the best number of steps so far, at the price of two further "
             "numbers in memory per weight and of a second validation", **NOT_INHERITED),
        Flag("--no-average --no_average", SWITCH, False, "never average the weights, or no longer", **NOT_INHERITED),
        Flag("--when", {"type": int, "nargs": "+"}, [-1], "epochs after which the rate is divided by 10",
             **NOT_INHERITED),
        Flag("--anneal", COUNT, 0, "after this epoch the rate falls in a straight line, to 0 at the end of the "
             "last epoch; 0: it does not fall", **NOT_INHERITED),
        TEMPERED._replace(help=f"with --epochs 0: {TEMPERED.help}"),
        Flag("--splits", {"type": int, "nargs": "*"}, None, "word ids (ranks by frequency) at which the split "
             "softmax's clusters begin (default: by vocabulary size)", **SHAPES_MODEL),
        Flag("--vocab_size", COUNT, 0, "keep the N most frequent words, <unk> and <eos> among them; 0: all",
             **SHAPES_MODEL),
        Flag("--min_count", COUNT, 0, "keep words seen N times or more", **SHAPES_MODEL),
        Flag("--chrono", {"type": chrono}, 0.0, "Mogrifier: the first forget biases are ln U(1, T-1), to remember from "
             "1 to T steps (T above 2); 0: they are 1"),
        Flag("--keep_words", TOGGLE, False, "keep the weights after 1, 2, ... 10, 20, ... 100, 200, ... 1000 million "
             "words of training: SAVE.chck_1M, ... (docs/babylm.md)", **NOT_INHERITED),
    ],
}  # fmt: skip
BY_NAME = {flag.name: flag for group in FLAGS.values() for flag in group if "dest" not in flag.options}
DEFAULTS = {name: flag.default for name, flag in BY_NAME.items()}


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with a script's docstring as its description, and errors of one line.

    A flag that is not given is not in the namespace: its value comes from a file or from the default.
    """

    def __init__(self, doc: str, *groups: str, saved: bool = False) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, argument_default=argparse.SUPPRESS)
        for title in groups:
            self.add_flags(title, FLAGS[title], saved)

    def add_flags(self, title: str, flags: Collection[Flag], saved: bool = False) -> None:
        """Adds a group of flags. The help text tells their defaults, unless a saved model has the values (`saved`)."""
        group = self.add_argument_group(title)
        for flag in flags:
            no_default = flag.default in (None, "", [-1]) or isinstance(flag.default, bool)
            no_default = no_default or (saved and flag.stored and flag.inherited)
            default = "" if no_default else f" (default: {flag.default})"
            group.add_argument(*flag.names.split(), help=(flag.help + default).replace("%", "%%"), **flag.options)

    def parse_all(self, flags: Collection[Flag], **defaults: Any) -> Namespace:
        """The given values, and the defaults of the other flags; UserError if a given one does nothing."""
        known = {flag.name: flag.default for flag in flags}
        args = Namespace(**{**known, **defaults, **vars(self.parse_args())})
        check_needs(args, known, {})
        return args

    def error(self, message: str) -> NoReturn:
        """Raises UserError; for flags that do not exist it names the nearest ones."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        near = [name for flag in flags for name in get_close_matches(flag, self._option_string_actions, n=1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"{message}{hint} (see --help)")


def parse_evaluation(doc: str, *groups: tuple[str, Collection[Flag]]) -> Namespace:
    """The settings of a script that opens a saved model: those of `groups`, --save, --data and --device.

    A setting that shapes the model is there only if it was given.
    """
    saved = [
        Flag("--save --checkpoint", {"required": True, "dest": "save"}, None, "the saved model"),
        Flag("--data", {}, None, "the corpus, if the script reads one (default: that of the model)"),
        *(flag for flag in FLAGS[RUN] if flag.name == "device"),  # --device, --cuda
    ]
    parser = ArgumentParser(doc)
    for title, flags in [("saved model", saved), *groups]:
        parser.add_flags(title, flags)
    parser.add_flags(MODEL, FLAGS[MODEL], saved=True)
    flags = [flag for _, group in groups for flag in group]
    return parser.parse_all(flags, data=None, device="auto")


def resolve_args(given: dict[str, Any], stored: dict[str, Any]) -> Namespace:
    """All settings of a run: given over stored over default; a fresh name for --save, the optimizer's --lr.

    Raises:
        UserError: a given flag does nothing beside the other settings.
    """
    stored = {name: value for name, value in stored.items() if name in BY_NAME and BY_NAME[name].stored}
    kind = LAYERS[given.get("model", stored.get("model", DEFAULTS["model"]))]
    defaults = {**DEFAULTS, **kind.defaults}
    args = Namespace(**{**defaults, **stored, **given})
    changed = "optimizer" in given and given["optimizer"] != stored.get("optimizer")
    if args.lr is None or (changed and "lr" not in given):
        args.lr = OPTIMIZERS[args.optimizer].lr
    if changed and "beta1" not in given:
        args.beta1 = DEFAULTS["beta1"]
    for name, opposite in (("average", "no_average"), ("no_average", "average")):
        if name in given and opposite not in given:
            setattr(args, opposite, False)
    if args.save is None:
        args.save = args.resume or f"{time.time_ns() // 1_000_000}.pt"
    check_needs(args, defaults, stored)
    return args


def inherited_args(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings that finetune.py takes from the model that it starts from."""
    return {name: value for name, value in stored.items() if name not in BY_NAME or BY_NAME[name].inherited}


def check_stored(stored: dict[str, Any], place: str) -> None:
    """Raises UserError when a file has a value that the flag would not accept, or one that no flag has."""
    for name, value in stored.items():
        values = value if isinstance(value, list) else [value]
        plain = all(one is None or isinstance(one, bool | int | float | str) for one in values)
        if not plain or (name in BY_NAME and BY_NAME[name].stored and not BY_NAME[name].takes(value)):
            raise UserError(f"{place}: its args say {name} {value!r}; use another copy")


def check_shape(given: dict[str, Any], stored: dict[str, Any], path: str) -> None:
    """Raises UserError when a flag contradicts the shape of the model in the file."""
    stored = {**DEFAULTS, **stored}  # a setting that is newer than the file has its default
    for name, value in given.items():
        if name in BY_NAME and BY_NAME[name].shapes_model and value != stored[name]:
            flag = f"--{name} {value}" if name != "tied" else "--tied" if value else "--untied"
            raise UserError(
                f"{flag}: contradicts {path}, which has {stored[name]}; leave the flag out, or train a new model"
            )
