"""A run written to disk and put back: its best model, and the state that an exact resume needs.

"Collective": every process has to call the function.

Rank 0 alone writes. If the disk does not take a file, the old file is kept, a warning is printed, and the run goes
on and tries again at the next checkpoint.
"""

import math
import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import harness.files as files
from corpus.files import file_digest
from data import Corpus
from harness.check_state import check_state
from harness.log import figures, ppl, say, warn
from harness.ranks import Ranks
from model import Criterion, Hidden, RNNModel, detach
from optim import OPTIMIZERS, Mean, means_kept
from utils import RunError, UserError, map_tensors, out_of_memory

WRITE_EVERY_S = 60  # on a GPU


@dataclass
class Position:
    """Where a run stands: plain numbers, saved with its state."""

    lr: float  # the base rate, before annealing and the scaling by batch length
    epoch: int = 1
    row: int = 0  # of the batched text, where the next batch starts
    batch: int = 0  # batches of this epoch so far
    step: int = 0  # optimizer steps of the whole run
    loss_sum: float = 0.0  # over the batches since the last log line
    loss_count: int = 0
    epoch_s: float = 0.0  # spent in this epoch, as of `count_time`
    best_loss: float | None = None  # validation, nats per token, of the saved model
    history: list[float] = field(default_factory=list)  # validation loss of every epoch
    initial_save_digest: str = ""  # the sha256 of the file that lay at --save when the run began

    @property
    def mean_loss(self) -> float:
        """Of the batches since the last log line, as far as their losses are known; nan without any."""
        return self.loss_sum / self.loss_count if self.loss_count else math.nan

    def restart_epoch(self) -> None:
        """Goes back to the epoch's first row."""
        self.row = self.batch = self.loss_count = 0
        self.loss_sum = self.epoch_s = 0.0

    def not_finite(self, problem: str, step: int) -> RunError:
        """The error of a run that has diverged by `step`."""
        return RunError(
            f"{problem} at epoch {self.epoch}, step {step}, base rate {self.lr:g}; the saved model is as it was: try "
            "a lower --lr or --clip"
        )


class PendingModel(NamedTuple):
    """A best model that waits on a GPU to be written."""

    contents: dict[str, Any]  # on rank 0
    best_on_disk: float | None  # the validation loss of the file that it is to replace


@dataclass
class Writing:
    """How far the files of a run have been written."""

    failed: dict[str, files.NotWrittenError] = field(default_factory=dict)  # path -> error of the last attempt
    pending: PendingModel | None = None
    state_s: float = -math.inf  # when the state was written, of time.monotonic
    state_is_old: bool = False
    has_state: bool = False  # whether the file of the state is of this run


class SavedRun(Protocol):
    """The parts of `train.Run` that are written and put back."""

    script: str
    args: Namespace
    corpus: Corpus
    device: torch.device
    ranks: Ranks
    weights: nn.ModuleDict
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    mean: Mean | None
    columns: slice
    hidden: list[Hidden]
    offsets: Tensor | None
    length_generator: torch.Generator
    at: Position
    writing: Writing

    def best_weights(self) -> tuple[RNNModel, Criterion]: ...
    def start_averaging(self) -> None: ...
    def read_losses(self) -> None: ...
    def count_time(self) -> None: ...


def try_to_write(run: SavedRun, path: str, write: Callable[[], object]) -> bool:
    """Calls `write()`, which makes `path`; returns whether that went well."""
    try:
        write()
    except files.NotWrittenError as error:
        if path not in run.writing.failed:
            kept = "what was there is kept; the run goes on, and tries again"
            warn(f"{path}: cannot be written ({error.reason}), {kept}")
        run.writing.failed[path] = error
        return False
    run.writing.failed.pop(path, None)
    return True


def waits(run: SavedRun) -> bool:
    """Whether files wait for the clock: on a GPU, where writing them can take as long as an epoch."""
    return run.device.type == "cuda"


def save_model(run: SavedRun, loss: float, partial: bool = False) -> bool:
    """Writes the weights to evaluate with; returns whether that went well. Collective.

    On a GPU a copy of them waits there, until the next state is written.

    `partial`: the epoch is not over; the model of any later validation replaces this one.
    """
    metrics = {
        "script": run.script,
        "fingerprint": run.corpus.digest,
        "valid_loss": loss,
        "partial": partial,
        "epoch": run.at.epoch,
        "step": run.at.step,
        "averaged": run.mean is not None,
        "valid_ppl": ppl(loss),
    }
    corpus, (model, criterion) = run.corpus, run.best_weights()
    contents = files.model_contents(run.args, corpus.vocab, model, criterion, metrics, corpus.tokenizer)
    if partial or not waits(run):
        return write_file(run, run.args.save, contents)
    best_on_disk = run.writing.pending.best_on_disk if run.writing.pending else run.at.best_loss
    run.writing.pending = PendingModel(map_tensors(Tensor.clone, contents) if run.ranks.is_main else {}, best_on_disk)
    return True


def write_file(run: SavedRun, path: str, contents: dict[str, Any]) -> bool:
    """Writes a model or a state; returns whether that went well. Collective."""
    written = False
    if run.ranks.is_main:
        written = try_to_write(run, path, lambda: files.save(path, contents))
    return run.ranks.from_rank_0(written)


def write_pending_model(run: SavedRun) -> None:
    """Writes the model that waits on a GPU. If that fails, the loss to beat is that of the file on disk. Collective."""
    if run.writing.pending:
        if not write_file(run, run.args.save, run.writing.pending.contents):
            run.at.best_loss = run.writing.pending.best_on_disk
        run.writing.pending = None


def copy_model(run: SavedRun, path: str) -> None:
    """Copies the best model so far to `path`. Collective."""
    write_pending_model(run)
    if run.ranks.is_main and os.path.exists(run.args.save):
        try:
            files.copy(run.args.save, path)
        except files.NotWrittenError as error:
            warn(f"{path}: cannot be written ({error.reason}), the run goes on without this copy")


def save_state_in_time(run: SavedRun) -> None:
    """As `save_state`, on a GPU at most once in WRITE_EVERY_S seconds. Collective."""
    due = not waits(run) or time.monotonic() - run.writing.state_s >= WRITE_EVERY_S
    run.writing.state_is_old = True
    if run.ranks.from_rank_0(due) if waits(run) else due:
        save_state(run)


def save_state(run: SavedRun) -> None:
    """Writes the model that waits on a GPU, then the state. Collective.

    Raises:
        RunError: a loss or weight is not finite, so no run could go on from it.
    """
    write_pending_model(run)
    run.read_losses()
    if not all(parameter.isfinite().all() for parameter in run.parameters):
        raise run.at.not_finite("a weight is not finite", run.at.step)
    run.count_time()
    run.writing.has_state |= write_file(run, f"{run.args.save}.state", collect_state(run))
    run.writing.state_s, run.writing.state_is_old = time.monotonic(), False


def collect_state(run: SavedRun) -> dict[str, Any]:
    """The state as plain data and tensors. Collective.

    With several ranks it holds the hidden state of all columns, and one row per rank for the generators.
    """
    generators = {"cpu": run.ranks.each(torch.get_rng_state()), "lengths": run.length_generator.get_state()}
    if run.device.type == "cuda":
        generators["cuda"] = run.ranks.each(torch.cuda.get_rng_state(run.device))
    tensors = {
        "weights": run.weights.state_dict(),
        "mean": run.mean and run.mean.state(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "generators": generators,
        "offsets": run.offsets,
        "hidden": run.ranks.join_columns(detach(run.hidden)),
    }
    return {
        "format": files.STATE_FORMAT,
        "script": run.script,
        "args": vars(run.args),
        "vocab": run.corpus.vocab,
        "tokenizer": run.corpus.tokenizer,
        "fingerprint": run.corpus.digest,
        "at": asdict(run.at),
        **tensors,
    }


def begin_or_resume(run: SavedRun, state: dict[str, Any] | None, given: dict[str, Any]) -> None:
    """Checks that the state can be written, and goes on from `state` if there is one. Collective."""
    args, ranks = run.args, run.ranks
    if ranks.is_main:
        # The state is the largest file: the weights, the optimizer's moments of them, and their means.
        copies = 1 + OPTIMIZERS[args.optimizer].moments + means_kept(args)
        files.check_writable(f"{args.save}.state", "--save", copies * 4 * sum(p.numel() for p in run.parameters))
    if state:
        resume(run, state, given)
    elif ranks.is_main and os.path.exists(args.save):
        run.at.initial_save_digest = file_digest(args.save)


def resume(run: SavedRun, state: dict[str, Any], given: dict[str, Any]) -> None:
    """Goes on from `state`; the flags `given` on the command line win over the stored ones. Collective.

    Raises:
        UserError: the state was made on another text, or a part of it does not fit.
    """
    path = f"{run.args.resume}.state"
    hint = "remove the .state for a warm start from the model alone"
    if state["fingerprint"] != run.corpus.digest:
        raise UserError(f"--data {run.args.data}: is not the text that {path} was made on; give that text, or {hint}")
    try:
        restore(run, state, given)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"--resume {path}: a part of it does not fit this run ({reason}); {hint}") from None
    run.writing.has_state = run.args.save == run.args.resume
    if not run.writing.has_state:  # before the model, which is copied
        save_state(run)
    best_loss = loss_to_beat(run, state["args"].get("resume", "")) if run.ranks.is_main else None
    run.at.best_loss = run.ranks.from_rank_0(best_loss)
    say(f"| resumed at epoch {run.at.epoch}, batch {run.at.batch}")


def restore(run: SavedRun, state: dict[str, Any], given: dict[str, Any]) -> None:
    """Puts each part of a state in its place; raises ValueError and others when one does not fit."""
    check_state(run, state)
    stored, args, samples = state["args"], run.args, run.args.samples
    run.weights.load_state_dict(files.fit_names(state["weights"], run.weights))
    if state["mean"] is not None:
        if not run.mean:
            run.start_averaging()
        assert run.mean
        run.mean.restore(state["mean"], lambda weights: files.fit_names(weights, run.weights))

    position = dict(state["at"])
    position.setdefault("initial_save_digest", position.pop("before", ""))  # its name in older states
    run.at = Position(**position)
    if stored["optimizer"] == args.optimizer:
        names = [name for name, _ in run.weights.named_parameters()]
        moments = files.fit_order(state["optimizer"], state["weights"], names)
        settings = run.optimizer.state_dict()["param_groups"]  # this run's, not the file's
        run.optimizer.load_state_dict({**moments, "param_groups": settings})
    else:
        run.at.lr = args.lr
    if "lr" in given and given["lr"] != stored["lr"]:  # otherwise the rate stays as --when has divided it
        run.at.lr = given["lr"]
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])

    run.offsets = state["offsets"]
    if (stored["batch_size"], stored.get("samples", 1)) == (args.batch_size, samples):
        columns = slice(run.columns.start * samples, run.columns.stop * samples)
        run.hidden = map_tensors(lambda x: x[:, columns].to(run.device, torch.float32), state["hidden"])
    else:  # the text is cut into other columns: this epoch starts again
        run.at.restart_epoch()
    restore_generators(run, state["generators"])


def restore_generators(run: SavedRun, states: dict[str, Tensor]) -> None:
    """Puts the random generators back; with another number of ranks each rank gets a new seed instead."""
    run.length_generator.set_state(states["lengths"])
    masks, rank = torch.atleast_2d(states["cpu"]), run.ranks.rank  # (ranks, ·)
    if len(masks) != run.ranks.size:
        say(f"| {len(masks)} processes before, {run.ranks.size} now: not bit for bit the same run")
        run.ranks.seed(run.args.seed, run.at.step)
        return
    torch.set_rng_state(masks[rank].clone())  # torch (2.13) reads the start of the storage, not of a view
    if "cuda" in states and run.device.type == "cuda":
        torch.cuda.set_rng_state(torch.atleast_2d(states["cuda"])[rank].clone(), run.device)


def loss_to_beat(run: SavedRun, source: str) -> float | None:
    """The validation loss that a model has to beat to replace the one on disk; None: any model replaces it.

    * No model on disk, or one of mid-epoch: None.
    * A file from before the run began: the best loss of the state.
    * A model of this run: its loss. It can be newer than the state, after a kill, or when an older state was copied
      back by hand.

    With another --save the model of --resume is copied to it.
    """
    path, save = run.args.resume, run.args.save
    if not os.path.exists(path) and os.path.exists(source):  # killed before it was copied
        files.copy(source, path)
    if not os.path.exists(path):
        if run.at.best_loss is not None:
            say(f"| {path}: the best model is not there; the next validation saves one, better or not")
        return None
    metrics = files.load_model(path, "--resume")["metrics"]
    of_this_run = file_digest(path) != run.at.initial_save_digest
    if save != path:
        files.copy(path, save)
    if not of_this_run:
        return run.at.best_loss
    loss = metrics.get("valid_loss", torch.inf)
    if metrics.get("step", 0) > run.at.step:
        say(f"| {save} is of step {metrics['step']}: kept until a better one | {figures(loss)}")
    return loss if -torch.inf < loss < torch.inf and not metrics.get("partial") else None
