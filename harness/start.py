"""How a run begins: the processes, the settings, the state or model to go on from, then the corpus.

"Collective": every process has to call the function.
"""

import contextlib
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import harness.files as files
import harness.flags as flags
from corpus.read import read_corpus
from data import EVAL_BATCH_SIZE, Corpus, check_length
from harness.log import RunLog, say, summary_writer, warn
from harness.ranks import ALONE, Ranks, end_with_parent, find_ranks
from optim import TWO_TAILED
from utils import UserError, pick_device, try_lock, use_tf32

PATIENCE_S = 30


@dataclass
class Start:
    """What is known before anything is built.

    script: main.py or finetune.py.
    given: the flags on the command line.
    args: all settings.
    state: that of an earlier run, to go on from; saved: without a state, a model to start from.
    path: the model's file, which lies beside the state; "" when the run starts from nothing.
    began_s: of time.monotonic.
    """

    script: str
    given: dict[str, Any]
    args: Namespace
    state: dict[str, Any] | None
    saved: dict[str, Any] | None
    path: str
    device: torch.device
    ranks: Ranks
    began_s: float

    @property
    def overwrites_start(self) -> bool:
        """Whether the run writes its model to the file that it starts from."""
        return os.path.realpath(self.args.save) == os.path.realpath(self.path)

    @property
    def deadline_s(self) -> float | None:
        """When --max_minutes are over, of time.monotonic; None without a limit."""
        return self.began_s + 60 * self.args.max_minutes if self.args.max_minutes else None


@contextlib.contextmanager
def begin(script: str, given: dict[str, Any]) -> Iterator[Start]:
    """Starts the processes and reads the state or model to go on from; rank 0 reads it for all. Collective.

    While entered, no other run writes the same files.
    """
    began_s, ranks = time.monotonic(), find_ranks()
    device = pick_device(ranks.device_name(given.get("device", "auto")))
    end_with_parent()
    ranks.start(device)
    use_tf32()
    find = find_training if script == "main.py" else find_finetuning
    with contextlib.ExitStack() as stack:
        if ranks.is_main and (script == "finetune.py" or given.get("epochs") != 0):
            stack.enter_context(only_run(find_save(script, given)))
        check_shared(ranks.from_rank_0(find_save(script, given) if given.get("resume") else ""), ranks)
        found = ranks.from_rank_0(find(script, given) if ranks.is_main else {})
        yield Start(script=script, device=device, ranks=ranks, began_s=began_s, **found)


def find_save(script: str, given: dict[str, Any]) -> str:
    """The file that a run will write, as far as its flags say; "": the time becomes its name."""
    resumed = given.get("resume", "").removesuffix(".state")
    resumed = "" if resumed == "auto" else resumed or ("PTB.pt" if script == "finetune.py" else "")
    return given.get("output", given.get("save", resumed))


def check_shared(save: str, ranks: Ranks) -> None:
    """Raises UserError when another machine has the state that rank 0's has not, and would start afresh. Collective.

    `save`: rank 0's; "" if it does not resume.
    """
    there = ranks.each(torch.tensor([save != "" and os.path.exists(f"{save}.state")]))
    if there.any() and not there.flatten()[0]:
        rank = int(there.flatten().int().argmax())
        problem = f"is on the machine of rank {rank} and not on that of rank 0, which would start afresh"
        raise UserError(f"--resume: {save}.state {problem}; use a disk that all machines share")


@contextlib.contextmanager
def only_run(save: str) -> Iterator[None]:
    """Locks the log of --save, so that one run at a time writes it and the model.

    The system drops the lock of a process that has ended. A second run waits for PATIENCE_S seconds, as the first one
    may be about to end.

    Raises:
        UserError: the other run goes on.
    """
    path, end_s, said = f"{os.path.realpath(save)}.log.jsonl", time.monotonic() + PATIENCE_S, False
    if not save or not os.path.isdir(os.path.dirname(path)):  # `check_files` says what is wrong
        yield
        return
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # all runs share /dev/null
        warn(f"{path}: is no file, so it cannot be locked; see to it that no second run has the same --save")
        yield
        return
    with contextlib.ExitStack() as stack:
        while (locked := lock_file(path, stack)) is False:
            if not said:
                say(f"| {save}: another run is writing it; waits for {PATIENCE_S} s for its end")
            said = True
            if time.monotonic() > end_s:
                raise UserError(f"--save {save}: another run is writing it; wait for its end, or give another --save")
            time.sleep(0.1)
        if locked is None:
            warn(f"{path}: cannot be locked here; see to it that no second run has the same --save")
        yield


def lock_file(path: str, stack: contextlib.ExitStack) -> bool | None:
    """As `try_lock`; the lock is kept until `stack` ends, which removes the file if it is empty then."""
    with contextlib.ExitStack() as closing:
        try:
            file = closing.enter_context(open(path, "ab"))
        except OSError as error:
            raise UserError(f"--save: {path}: {error.strerror}; choose a folder that can be written to") from None
        locked = try_lock(file)
        if locked is False or not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return False  # also when the run before has just removed it
        closing.callback(remove_if_empty, path)
        stack.enter_context(closing.pop_all())
    return locked


def remove_if_empty(path: str) -> None:
    with contextlib.suppress(OSError):
        if os.path.isfile(path) and not os.path.getsize(path):  # /dev/null is no file
            os.unlink(path)


def find_state(script: str, given: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The model's path that --resume means ("" without it), and the state beside it, if there is one.

    Raises:
        UserError: see `files.load_state`; or it is the state of another script, which only "auto" takes.
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


def find_training(script: str, given: dict[str, Any]) -> dict[str, Any]:
    """For main.py: the state of --resume, or without one its model for a warm start, or nothing.

    Returns:
        The fields given, args, state, saved and path of `Start`.
    """
    path, state = find_state(script, given)
    auto = given.get("resume") == "auto"
    plan = f"goes on with {path}" if state else f"warm start from {path}, which has no .state"
    plan = f"evaluates {path}" if given.get("epochs") == 0 else plan
    if state and state["script"] != script:
        plan = f"{state['script']} has gone on with {path}, its training is over: evaluates it"
        given, state = {**given, "epochs": 0}, None
    if auto and not state and not os.path.exists(path):
        plan, path = f"no run of {path} yet, starts one", ""
    if auto:
        say(f"| --resume auto: {plan}")
    saved = files.load_model(path, "--resume") if path and not state else None
    contents = state or saved
    stored = contents["args"] if contents else {}
    if path:
        flags.check_shape(given, stored, path)
    args = flags.resolve_args({**given, "resume": path}, stored)
    if args.epochs == 0 and not saved:
        raise UserError("--epochs 0: there is no saved model to evaluate; give --resume MODEL")
    if state:
        leave_behind(state, args, "no_average" in given)
    return {"given": given, "args": args, "state": state, "saved": saved, "path": path}


def leave_behind(state: dict[str, Any], args: Namespace, ends_averaging: bool) -> None:
    """Takes the mean out of a state that another optimizer or kind of averaging goes on with, or none, and says so.

    `checkpoint.restore` does not give an optimizer the moments of another one.
    """
    before = state["args"].get("optimizer", args.optimizer)
    if before != args.optimizer:
        warn(f"--optimizer {args.optimizer}: starts afresh where {before} has come to, at the rate {args.lr:g}")
    two_tailed, mean = args.average == TWO_TAILED, state["mean"]
    if mean is not None and (ends_averaging or before != args.optimizer or two_tailed != ("short" in mean)):
        what = "begins anew" if two_tailed else "ends"
        warn(f"averaging {what}: the run goes on from the weights that are not averaged")
        state["mean"] = None


def find_finetuning(script: str, given: dict[str, Any]) -> dict[str, Any]:
    """The same for finetune.py: the state of --resume, or without one the model of --save."""
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
        stored = flags.inherited_args(saved["args"])
    flags.check_shape(given, stored, path)
    args = flags.resolve_args({**given, "resume": path if state else ""}, stored)
    args.save = given.get("output", given.get("save", path))
    return {"given": given, "args": args, "state": state, "saved": saved, "path": path}


def load_corpus(start: Start) -> Corpus:
    """The corpus of --data on the device; rank 0 reads it first, and leaves a cache for the others. Collective.

    Raises:
        UserError: it cannot be read, is too short for a batch, or differs from the text on rank 0's machine.
    """
    args, stored = start.args, start.state or start.saved
    ranks, batch_size = start.ranks, args.batch_size
    if args.epochs == 0:  # rank 0 evaluates, alone
        ranks, batch_size = ALONE, 1
    if not ranks.is_main:
        ranks.wait()
    vocab, tokenizer = (stored["vocab"], stored["tokenizer"]) if stored else (None, None)
    corpus = read_corpus(args.data, vocab, args.vocab_size, args.min_count, tokenizer)
    check_length(corpus.train, batch_size, args.data)
    check_length(corpus.valid, EVAL_BATCH_SIZE, args.data, "validation")
    if ranks.is_main:
        ranks.wait()
    if ranks.from_rank_0(corpus.digest) != corpus.digest:
        raise UserError(f"--data {args.data}: is another text on this machine than on rank 0's")
    if stored:
        corpus = corpus._replace(tokenizer=stored["tokenizer"])  # the ids are those of its vocabulary
    return corpus.to(start.device)


def check_files(start: Start) -> RunLog:
    """Checks that the model can be written, before the corpus is read; returns the log beside it.

    Raises:
        UserError: it cannot be written; or the ranks cannot share --batch_size.
    """
    args, board = start.args, None
    start.ranks.check_batch_size(args.batch_size)
    if not start.ranks.is_main:
        return RunLog(None)
    files.check_writable(args.save, "--output" if "output" in start.given else "--save")
    if args.tensorboard:
        board = make_board_folder(args, start.script)
    return RunLog(f"{args.save}.log.jsonl", board)


def make_board_folder(args: Namespace, script: str) -> str:
    """The folder of this run's events in `--tensorboard DIR`, named after the model; fine-tuning has another.

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
