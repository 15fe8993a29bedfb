"""The flags that scripts share, their defaults, and how a stored run's settings join those given now.

A flag given on the command line wins over what a file says, and that over the default; a flag that
contradicts the shape of a saved model is an error.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from typing import Any

import checkpoint
from utils import ArgumentParser, UserError, number

DEFAULTS: dict[str, Any] = {
    "data": "data/penn",
    "vocab_size": 0,
    "min_count": 0,
    "model": "LSTM",
    "emsize": 400,
    "nhid": 1150,
    "nlayers": 3,
    "tied": True,
    "splits": None,
    "dropout": 0.4,
    "dropouth": 0.3,
    "dropouti": 0.65,
    "dropoute": 0.1,
    "wdrop": 0.5,
    "optimizer": "sgd",
    "lr": None,
    "clip": 0.25,
    "epochs": 8000,
    "batch_size": 80,
    "bptt": 70,
    "max_seq_len": 0,
    "alpha": 2.0,
    "beta": 1.0,
    "wdecay": 1.2e-6,
    "nonmono": 5,
    "when": [-1],
    "max_steps": 0,
    "seed": 1111,
    "amp": "none",
    "compile": False,
    "device": "auto",
    "save": None,
    "resume": "",
    "log_interval": 200,
    "checkpoint_every": 0,
    "checkpoint_minutes": 0.0,
    "keep_last": 0,
    "max_minutes": 0.0,
    "tensorboard": None,
}
DEFAULT_RATES = {"sgd": 30.0, "adam": 1e-3}
# How a run is carried out rather than what it computes: not taken over from a stored run.
NOT_STORED = ("device", "save", "resume", "max_steps", "max_minutes", "tensorboard")

probability = number(float, 0, below=1)
positive = number(int, 1)
factor = number(float, 0, most=1e38)  # float32 ends at 3.4e38
minutes = number(float, 0)
count = number(int, 0)


def make_parser(description: str) -> ArgumentParser:
    """A parser that leaves out what is not given, so that defaults can come from elsewhere."""
    return ArgumentParser(
        description=description,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def flag(group: argparse._ArgumentGroup, *names: str, help: str, **settings: Any) -> None:
    """Adds a flag, its default told in its help text."""
    default = DEFAULTS.get(names[0].lstrip("-").replace("-", "_"))
    if default not in (None, "", [-1], False):
        help = f"{help} (default: {default})"
    group.add_argument(*names, help=help, **settings)


def add_model_flags(parser: ArgumentParser, title: str = "model (a saved one answers this itself)") -> None:
    """The architecture."""
    group = parser.add_argument_group(title)
    flag(group, "--model", choices=["LSTM", "GRU", "QRNN"], help="kind of the recurrent layers")
    flag(group, "--emsize", type=positive, help="size of the word embeddings")
    flag(group, "--nhid", type=positive, help="hidden units a layer")
    flag(group, "--nlayers", type=positive, help="number of recurrent layers")
    flag(group, "--tied", action="store_true", help="decoder weight = embedding weight")
    group.add_argument("--untied", dest="tied", action="store_false", help="a decoder weight of its own")


def add_training_flags(parser: ArgumentParser) -> None:
    """Data, regularisation, optimisation: what main.py and finetune.py share."""
    group = parser.add_argument_group("regularisation (probabilities in [0, 1))")
    flag(group, "--dropout", type=probability, help="locked dropout after the last layer")
    flag(group, "--dropouth", type=probability, help="locked dropout between layers")
    flag(group, "--dropouti", type=probability, help="locked dropout on the embeddings")
    flag(group, "--dropoute", type=probability, help="dropout of whole word types")
    flag(group, "--wdrop", type=probability, help="weight drop: hidden-to-hidden, or all of a QRNN")
    flag(group, "--alpha", type=factor, help="activation regularisation (AR); 0: none")
    flag(group, "--beta", type=factor, help="temporal activation regularisation (TAR); 0: none")
    flag(group, "--wdecay", type=factor, help="weight decay on all weights")
    group = parser.add_argument_group("optimisation")
    flag(group, "--lr", type=factor, help="rate of a batch of length bptt (sgd: 30, adam: 1e-3)")
    flag(group, "--clip", type=factor, help="clip the gradient to this norm; 0: do not")
    flag(group, "--epochs", type=count, help="train up to this epoch")
    flag(group, "--max_steps", type=count, help="stop after this many optimizer steps in all; 0: do not")
    flag(
        group,
        "--max_minutes",
        type=minutes,
        help="write the .state and end, status 0, so many minutes after the script was loaded; 0: do not",
    )
    flag(group, "--batch_size", type=positive, help="columns of text side by side, of all processes together")
    flag(group, "--bptt", type=positive, help="mean sequence length, in tokens")
    flag(group, "--max_seq_len", type=count, help="longest sequence length, in tokens; 0: no limit")
    flag(group, "--nonmono", type=count, help="epochs that the validation loss may fail to improve")
    flag(group, "--seed", type=count, help="of all random numbers")


def add_run_flags(parser: ArgumentParser) -> None:
    """Where it runs and what it writes."""
    group = parser.add_argument_group("run")
    flag(
        group,
        "--data",
        help="folder with train.txt, valid.txt, test.txt; or penn_treebank, wikitext_2 (PyTorch-NLP fetches)",
    )
    flag(group, "--device", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument(
        "--cuda", dest="device", action="store_const", const="auto", help="a GPU when there is one (as auto)"
    )
    flag(
        group,
        "--amp",
        choices=["none", "bf16", "fp16"],
        help="training in mixed precision; evaluation is not",
    )
    flag(group, "--compile", action="store_true", help="torch.compile the loss: slow to start, then faster")
    flag(group, "--save", help="file of the model; beside it .state (to resume) and .log.jsonl")
    flag(
        group,
        "--resume",
        help="go on from this model and its .state, or a numbered .state.STEP, or warm-start from the model "
        "alone; auto: from --save if it is there, else start afresh",
    )
    flag(group, "--log-interval", "--log_interval", type=positive, help="batches between two log lines")
    flag(group, "--checkpoint_every", type=count, help="also write the .state every N steps; 0: do not")
    flag(group, "--checkpoint_minutes", type=minutes, help="also write it every M minutes; 0: do not")
    flag(
        group, "--keep_last", type=count, help="keep the newest K states, as .state.STEP; 0: only the .state"
    )
    flag(group, "--tensorboard", metavar="DIR", help="figures for TensorBoard, in DIR/SAVE (SAVE.finetune)")


def resolve_auto(given: dict[str, Any], script: str, from_model: bool) -> dict[str, Any]:
    """The flags with `--resume auto` replaced by what there is to go on with, and a line that says which.

    `from_model`: a model without a state is something to start from, and one that another script has gone on
    with is at its end here: nothing is left but to evaluate it.

    Raises:
        UserError: --save is not given, or its state cannot be read.
    """
    if given.get("resume") != "auto":
        return given
    if "save" not in given:
        raise UserError("--resume auto: needs a name that stays the same; give --save too")
    save = given.get("output", given["save"])
    found_script = checkpoint.state_script(save)
    found: dict[str, Any] = {"resume": save}
    if found_script in (script, None):
        what = f"goes on with {save}"
    elif from_model and found_script:
        what = f"{found_script} has gone on with {save}, its training is over: evaluates it"
        found["epochs"] = 0
    elif from_model and os.path.exists(save):
        what = f"warm start from {save}, which has no .state"
    else:
        what, found["resume"] = f"no run of {save} yet, starts one", ""
    print(f"| --resume auto: {what}")
    return {**given, **found}


def go_on_command(save: str, given: dict[str, Any], processes: int = 1) -> str:
    """The shell command that goes on with the stopped run of `save`, in the same folder.

    What else was given lies in its state, but for how this invocation was carried out.
    """
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    save = f"./{save}" if save.startswith("-") or save == "auto" else save
    start = [python]
    if processes > 1:
        torchrun = ["torchrun"] if python == "python" else [python, "-m", "torch.distributed.run"]
        start = [*torchrun, f"--nproc_per_node={processes}"]
    command = [*start, sys.argv[0], "--resume", save]
    for name in ("device", "max_steps", "max_minutes", "tensorboard"):
        if name in given:
            command += [f"--{name}", str(given[name])]
    return shlex.join(command)


def settle(given: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run: given over stored over default; a fresh name and the optimizer's own rate."""
    stored = {name: value for name, value in stored.items() if name in DEFAULTS and name not in NOT_STORED}
    args = {**DEFAULTS, **stored, **given}
    if "optimizer" in given and given["optimizer"] != stored.get("optimizer") and "lr" not in given:
        args["lr"] = None
    if args["lr"] is None:
        args["lr"] = DEFAULT_RATES[args["optimizer"]]
    if args["save"] is None:
        args["save"] = checkpoint.resume_paths(args["resume"])[0] or f"{time.time_ns() // 1_000_000}.pt"
    return args
