"""How a run begins: what there is to go on with, the processes, then seed, corpus, model and optimizer."""

import os
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from data import EVAL_BATCH_SIZE, Corpus, check_length, read_corpus
from harness import files
from harness.log import RunLog, say, summary_writer
from harness.ranks import ALONE, Ranks, find_ranks
from harness.run import Run
from utils import UserError, pick_device


class Start(NamedTuple):
    """What is known before anything is built. `state`: to go on from; `saved`: a model to begin with."""

    given: dict[str, Any]  # on the command line
    args: Namespace
    state: dict[str, Any] | None
    saved: dict[str, Any] | None
    device: torch.device
    ranks: Ranks
    began_s: float  # of time.monotonic


def find_state(given: dict[str, Any], script: str) -> tuple[str, dict[str, Any] | None]:
    """The model's path that --resume means ("" without it) and the state beside it, if there is one to go on from.

    Raises:
        UserError: see `files.load_state`; it is another script's, which only "auto" takes.
    """
    path, auto = given.get("resume", "").removesuffix(".state"), given.get("resume") == "auto"
    if auto and "save" not in given:
        raise UserError("--resume auto: needs a name that stays the same; give --save too")
    path = given.get("output", given["save"]) if auto else path
    if not path or given.get("epochs") == 0 or not os.path.exists(f"{path}.state"):
        return path, None
    state = files.load_state(f"{path}.state", f"--resume{' auto' * auto}")
    if state["script"] != script and not auto:
        raise UserError(
            f"--resume {path}.state: is the state of {state['script']}, not of {script}; go on with "
            f"{state['script']} --resume, fine-tune with --output NEW to keep both states, or remove it to "
            "warm-start from the model"
        )
    return path, state


def begin(given: dict[str, Any], find_start: Callable[[dict[str, Any]], tuple]) -> Start:
    """Device, processes, and rank 0's `find_start(given)` (settings, state, model) on all of them."""
    began_s, ranks = time.monotonic(), find_ranks()
    device = pick_device(ranks.device_name(given.get("device", "auto")))
    ranks.start(device)
    return Start(given, *ranks.from_rank_0(find_start(given) if ranks.is_main else None), device, ranks, began_s)


def load_corpus(args: Namespace, vocab: list[str] | None, batch_size: int, ranks: Ranks = ALONE) -> Corpus:
    """The corpus of --data, long enough for a batch; rank 0 reads it first and leaves a cache for the others."""
    if not ranks.is_main:
        ranks.agree("")
    corpus = read_corpus(args.data, vocab, args.vocab_size, args.min_count)
    check_length(corpus.train, batch_size, f"{args.data}: training text")
    check_length(corpus.valid, EVAL_BATCH_SIZE, f"{args.data}: validation text")
    if ranks.is_main:
        ranks.agree("")
    if ranks.from_rank_0(corpus.digest) != corpus.digest:
        raise UserError(f"--data {args.data}: is another text on this machine than on rank 0's")
    return corpus


def start_run(script: str, start: Start) -> Run:
    """Seed, corpus, model, optimizer: a run at its first step, or where its state says."""
    given, args, state, saved, device, ranks, _ = start
    ranks.check_batch_size(args.batch_size)
    board = None
    if ranks.is_main:
        files.check_writable(args.save, "--output" if "output" in given else "--save")
        if args.tensorboard:
            board = make_board_folder(args, script)
    torch.manual_seed(args.seed)
    stored = state or saved
    corpus = load_corpus(args, stored and stored["vocab"], args.batch_size, ranks)
    run = Run(script, args, corpus.to(device), device, saved, ranks)
    say(f"Args: {vars(args)}\nModel total parameters: {sum(p.numel() for p in run.parameters)}")
    if ranks.is_main:
        # The state is the largest file: the weights, and of each Adam's two moments, or the mean under SGD.
        copies = 3 if args.optimizer == "adam" else 2
        files.check_writable(f"{args.save}.state", "--save", copies * 4 * sum(p.numel() for p in run.parameters))
        run.log = RunLog(f"{args.save}.log.jsonl", board)
    if state:
        run.load_state(state, given)
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
