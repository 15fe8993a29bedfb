"""How a run begins: what there is to go on with, the processes, then seed, corpus, model and optimizer."""

import os
import time
from argparse import Namespace
from typing import Any, NamedTuple

import torch

import harness.files as files
import harness.flags as flags
from corpus.files import file_digest
from corpus.read import read_corpus
from data import EVAL_BATCH_SIZE, Corpus, check_length
from harness.log import RunLog, say, summary_writer
from harness.ranks import ALONE, Ranks, find_ranks
from harness.run import Run
from optim import OPTIMIZERS
from utils import UserError, pick_device, use_tf32


class Found(NamedTuple):
    """What there is to begin with: the settings, and a state to go on from or else a model, if there is one."""

    args: Namespace
    state: dict[str, Any] | None
    saved: dict[str, Any] | None
    path: str  # of that model; "" without one


class Start(NamedTuple):
    """What is known before anything is built."""

    script: str
    given: dict[str, Any]  # on the command line
    found: Found
    device: torch.device
    ranks: Ranks
    began_s: float  # of time.monotonic

    @property
    def replaces(self) -> bool:
        """Whether the run writes its model to the file that it starts from."""
        return os.path.realpath(self.found.args.save) == os.path.realpath(self.found.path)


def begin(script: str, given: dict[str, Any]) -> Start:
    """Device and processes, and what rank 0 finds to begin with, on all of them."""
    began_s, ranks = time.monotonic(), find_ranks()
    device = pick_device(ranks.device_name(given.get("device", "auto")))
    ranks.start(device)
    use_tf32()
    find = find_training if script == "main.py" else find_finetuning
    given, *found = ranks.from_rank_0([given, *find(script, given)] if ranks.is_main else None)
    return Start(script, given, Found(*found), device, ranks, began_s)


def find_state(script: str, given: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The model's path that --resume means ("" without it), and the state beside it, if there is one.

    Raises:
        UserError: see `files.load_state`; it is another script's, which only "auto" takes.
    """
    path, auto = given.get("resume", "").removesuffix(".state"), given.get("resume") == "auto"
    if auto and "save" not in given:
        raise UserError("--resume auto: needs a name that stays the same; give --save too")
    path = given.get("output", given["save"]) if auto else path
    evaluates = script == "main.py" and given.get("epochs") == 0
    if not path or evaluates or not os.path.exists(f"{path}.state"):
        return path, None
    state = files.load_state(f"{path}.state", f"--resume{' auto' * auto}")
    if state["script"] != script and not auto:
        raise UserError(
            f"--resume {path}.state: is the state of {state['script']}, not of {script}; go on with "
            f"{state['script']} --resume, fine-tune with --output NEW to keep both states, or remove it to "
            "warm-start from the model"
        )
    return path, state


def find_training(script: str, given: dict[str, Any]) -> Found:
    """For main.py: the state beside --resume, or its model for a warm start, or nothing."""
    path, state = find_state(script, given)
    auto = given.get("resume") == "auto"
    what = f"goes on with {path}" if state else f"warm start from {path}, which has no .state"
    what = f"evaluates {path}" if given.get("epochs") == 0 else what
    if state and state["script"] != script:
        what = f"{state['script']} has gone on with {path}, its training is over: evaluates it"
        given["epochs"], state = 0, None
    if auto and not state and not os.path.exists(path):
        what, path = f"no run of {path} yet, starts one", ""
    if auto:
        say(f"| --resume auto: {what}")
    saved = files.load_model(path, "--resume") if path and not state else None
    stored = (state or saved)["args"] if path else {}
    if path:
        flags.check_shape(given, stored, path)
    args = flags.resolve_args({**given, "resume": path}, stored)
    if args.epochs == 0 and not saved:
        raise UserError("--epochs 0: there is no saved model to evaluate; give --resume MODEL")
    if {"anneal", "epochs"} & given.keys() and args.anneal >= args.epochs > 0:
        raise UserError(
            f"--anneal {args.anneal}: has to lie before the last epoch, --epochs {args.epochs}; 0 leaves it out"
        )
    return Found(args, state, saved, path)


def find_finetuning(script: str, given: dict[str, Any]) -> Found:
    """For finetune.py: the state beside --resume, or else the model of --save."""
    path, state = find_state(script, given)
    auto, saved = given.get("resume") == "auto", None
    if path and not auto and not state:
        raise UserError(f"--resume {path}.state: there is no such file; fine-tune with --save {path}")
    if state and state["script"] != script:
        state = None
    if auto:
        say(f"| --resume auto: {f'goes on with {path}' if state else f'no run of {path} yet, starts one'}")
    if state:
        stored = state["args"]
    else:
        path = given.get("save", "PTB.pt")
        saved = files.load_model(path, "--save")
        own = {name for name, flag in flags.BY_NAME.items() if flag.own}
        stored = {name: value for name, value in saved["args"].items() if name not in own}
    flags.check_shape(given, stored, path)
    args = flags.resolve_args({**given, "resume": path if state else ""}, stored)
    args.save = given.get("output", given.get("save", path))
    return Found(args, state, saved, path)


def load_corpus(start: Start) -> Corpus:
    """The corpus of --data on the device; rank 0 reads it first, and leaves a cache for the others.

    Raises:
        UserError: it cannot be read, is too short for a batch, or another one on another machine.
    """
    args, state, saved, _ = start.found
    stored = state or saved
    ranks, batch_size = (start.ranks, args.batch_size) if args.epochs else (ALONE, 1)  # else nothing is trained
    if not ranks.is_main:
        ranks.agree("")
    corpus = read_corpus(args.data, stored and stored["vocab"], args.vocab_size, args.min_count)
    check_length(corpus.train, batch_size, f"{args.data}: training text")
    check_length(corpus.valid, EVAL_BATCH_SIZE, f"{args.data}: validation text")
    if ranks.is_main:
        ranks.agree("")
    if ranks.from_rank_0(corpus.digest) != corpus.digest:
        raise UserError(f"--data {args.data}: is another text on this machine than on rank 0's")
    if stored:
        corpus = corpus._replace(tokenizer=stored["tokenizer"])  # the ids are those of its vocabulary
    return corpus.to(start.device)


def start_run(start: Start) -> Run:
    """Seed, corpus, model, optimizer: a run at its first step, or where its state says."""
    given, (args, state, saved, _), ranks = start.given, start.found, start.ranks
    ranks.check_batch_size(args.batch_size)
    board = None
    if ranks.is_main:
        files.check_writable(args.save, "--output" if "output" in given else "--save")
        board = make_board_folder(args, start.script) if args.tensorboard else None
    torch.manual_seed(args.seed)
    run = Run(start.script, args, load_corpus(start), start.device, saved, ranks)
    run.deadline_s = start.began_s + 60 * args.max_minutes if args.max_minutes else None
    say(f"Args: {vars(args)}\nModel total parameters: {sum(p.numel() for p in run.parameters)}")
    if ranks.is_main:
        # The state is the largest file: the weights, the optimizer's moments of them, and their mean.
        optimizer = OPTIMIZERS[args.optimizer]
        copies = 1 + optimizer.moments + (args.average or optimizer.on_stall == "average")
        files.check_writable(f"{args.save}.state", "--save", copies * 4 * sum(p.numel() for p in run.parameters))
        run.log = RunLog(f"{args.save}.log.jsonl", board)
    if state:
        run.load_state(state, given)
    elif ranks.is_main and os.path.exists(args.save):
        run.at.before = file_digest(args.save)
    return run


def make_board_folder(args: Namespace, script: str) -> str:
    """The folder of this run's events in `--tensorboard DIR`, called as the model; fine-tuning has its own.

    Raises:
        UserError: it cannot be made, or TensorBoard is not installed.
    """
    summary_writer()
    name = os.path.relpath(args.save).replace(f"..{os.sep}", "")
    board = os.path.join(args.tensorboard, name if script == "main.py" else f"{name}.finetune")
    try:
        os.makedirs(board, exist_ok=True)
    except OSError as error:
        hint = "choose a folder that can be written to"
        raise UserError(f"--tensorboard {args.tensorboard}: {error.strerror}; {hint}") from None
    return board
