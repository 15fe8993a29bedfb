"""A training run: its weights and position, the training step, the epochs. main.py and finetune.py start it.

Losses are nats per token, without the regularisation. Shapes: T time, B batch, N = T·B. "Collective": every process has
to call the function.

Method: Merity, Keskar, Socher, arXiv 1708.02182 ("AWD"): sections 3 (NT-ASGD), 4.6 (AR, TAR), 5 (batch lengths).
"""

import contextlib
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import harness.checkpoint as checkpoint
import harness.files as files
from data import EVAL_BATCH_SIZE, Corpus, VariableLengthSampler, get_batch, rotate_columns
from evaluate import evaluate, test
from harness.graphs import CudaCapture, StepGraphs, StepResult, fits_graphs
from harness.keep import Keeper
from harness.log import RULE, EpochBar, RunLog, figures, say, say_or_drop, training_line, warn
from harness.ranks import ALONE, ENDINGS, NO_TIME, Ranks, Stop, Stopper
from harness.start import Start, check_files, load_corpus
from model import Criterion, Hidden, RNNModel, build, detach, parts_of, start_again
from mos import sampled
from optim import TWO_TAILED, Mean, TwoTailedMean, annealed, averages_after_stall, has_stalled, make_optimizer
from products import autocast_dtype
from utils import RunError, UserError, keep_freed_memory, not_a_command


class Run:
    """Everything that a training step needs and changes.

    Args:
        script: main.py or finetune.py; only the same script can resume the run.
        args: the settings; they are stored in the model.
        corpus: its texts on the device; its digest tells a resumed run that it is the same text.
        saved: a model to start from, as `files.load_model` reads it.
        ranks: the processes that share the work.

    Raises UserError when the settings do not go together.
    """

    def __init__(
        self, script: str, args: Namespace, corpus: Corpus, device: torch.device,
        saved: dict[str, Any] | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.script, self.args, self.corpus, self.device, self.ranks = script, args, corpus, device, ranks
        keep_freed_memory(16 * args.batch_size * args.bptt * args.nhid)  # the gates of all positions, 4 bytes each
        torch.manual_seed(args.seed)
        try:
            self.model, self.criterion = build(vars(args), len(corpus.vocab))
        except ValueError as error:
            raise UserError(str(error)) from None
        self.loss_function = sampled(self.criterion, args.samples) if args.samples > 1 else self.criterion
        args.splits = self.criterion.splits
        self.weights = nn.ModuleDict({"model": self.model, "criterion": self.criterion})  # all that is trained
        if saved:
            files.load_weights(saved, self.model, self.criterion)
        self.weights.to(device)
        self.parameters = list(self.weights.parameters())
        ranks.broadcast_weights(self.parameters)
        if not ranks.is_main:
            ranks.seed(args.seed)  # every rank draws other dropout masks

        self.amp = autocast_dtype(args.amp, device)  # of forward pass and loss; None: float32
        if args.amp != "none" and self.amp is None:
            warn(f"--amp {args.amp}: this processor has no bfloat16; it stays with float32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.optimizer = make_optimizer(self.parameters, args.optimizer, args.lr, args.wdecay, args.beta1)
        self.columns = ranks.columns(args.batch_size)  # this rank's columns of the whole batch
        self.last_row = len(corpus.train) // args.batch_size - 1  # of the text in columns; it is only a target
        self.batches = len(corpus.train) // args.batch_size // args.bptt  # in an epoch, if each has `bptt` rows
        self.log_interval = args.log_interval or min(200, max(1, math.ceil(self.batches / 10)))  # batches
        self.hidden: list[Hidden] = self.first_hidden()
        self.offsets: Tensor | None = None  # with --shuffle: the rows by which this epoch rotates each column
        self.length_generator = torch.Generator().manual_seed(args.seed)  # batch lengths; all ranks draw the same
        self.at = checkpoint.Position(lr=args.lr)
        for layer in self.model.layers:
            layer.padded, layer.persistent = (args.padded, args.persistent) if device.type == "cuda" else (False, False)
        self.mean: Mean | None = TwoTailedMean(self.weights) if args.average == TWO_TAILED else None
        fits = fits_graphs(args, device, ranks.size, self.scaler.is_enabled())
        self.graphs = StepGraphs(partial(gradient_step, self), self.optimizer, device, CudaCapture()) if fits else None
        self.grad_norm: Tensor | None = None  # of the last step, before clipping; still on the device
        self.unread_losses: list[Tensor] = []  # still on the device
        self.writing = checkpoint.Writing()
        self.log = RunLog(None)
        self.keeper = Keeper(self) if args.keep_words and ranks.is_main else None
        self.deadline_s: float | None = None  # of time.monotonic, for --max_minutes
        self.counted_until_s = time.perf_counter()  # as of the last `count_time`

    def first_hidden(self) -> list[Hidden]:
        """The hidden state that an epoch begins with, for this rank's columns."""
        return self.model.init_hidden((self.columns.stop - self.columns.start) * self.args.samples)

    def start_epoch(self) -> None:
        """Training mode; at the epoch's first row a new hidden state and, with --shuffle, new offsets."""
        self.model.train()
        self.criterion.train()
        self.last_log = time.perf_counter(), self.at.batch, self.at.row
        if self.at.row == 0:
            self.hidden, self.offsets, columns = self.first_hidden(), None, self.args.batch_size
            if self.args.shuffle:
                self.offsets = torch.randint(self.last_row + 1, (columns,), generator=self.length_generator)

    def rate(self) -> float:
        """The learning rate of the next batch, if it has `bptt` rows."""
        done = self.at.epoch - 1 + self.at.row / self.last_row  # epochs
        return self.at.lr * annealed(done, self.args.anneal, self.args.epochs)

    def start_averaging(self) -> None:
        """From the next step on the weights enter a running mean; the descent goes on with the raw ones."""
        self.mean = Mean(self.weights)

    def best_weights(self) -> tuple[RNNModel, Criterion]:
        """The weights to evaluate with: the mean once it holds any, else the raw ones."""
        return parts_of(self.mean.weights if self.mean and self.mean.count else self.weights)

    def count_time(self) -> None:
        """Adds the time since the last call to the epoch's seconds."""
        now_s = time.perf_counter()
        self.at.epoch_s += now_s - self.counted_until_s
        self.counted_until_s = now_s

    def count_step(self, loss: Tensor, rows: int) -> None:
        """Moves the position by one step over `rows` rows of text, and keeps its loss."""
        self.at.row, self.at.batch, self.at.step = self.at.row + rows, self.at.batch + 1, self.at.step + 1
        self.unread_losses.append(loss)
        if self.device.type == "cpu":  # elsewhere reading waits for the device: at the log interval only
            self.read_losses()

    def read_losses(self) -> None:
        """Adds up the last steps' losses, means over ranks: a synchronisation on CUDA. Collective.

        Raises RunError when one of them is not finite.
        """
        at, losses = self.at, self.ranks.sum(torch.stack(self.unread_losses).tolist()) if self.unread_losses else []
        for step, loss in enumerate(losses, start=at.step - len(losses) + 1):
            loss /= self.ranks.size
            if not math.isfinite(loss):
                raise at.not_finite(f"the loss is {loss}", step)
            at.loss_sum, at.loss_count = at.loss_sum + loss, at.loss_count + 1
        self.unread_losses.clear()


def start_run(start: Start) -> Run:
    """A run at its first step, or where its state says. Collective."""
    log = check_files(start)
    run = Run(start.script, start.args, load_corpus(start), start.device, start.saved, start.ranks)
    run.log, run.deadline_s = log, start.deadline_s
    say(f"Args: {vars(run.args)}\nModel total parameters: {sum(p.numel() for p in run.parameters)}")
    checkpoint.begin_or_resume(run, start.state, start.given)
    return run


def train_batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Source and target, (T, B) each, of this rank's columns, from where the run stands to the epoch's end."""
    args, ids = run.args, run.corpus.train
    ids = ids if run.offsets is None else rotate_columns(ids, args.batch_size, run.offsets)
    sampler = VariableLengthSampler(ids, args.bptt, args.batch_size, run.length_generator, run.at.row, args.max_seq_len)
    return (get_batch(ids, slices[run.columns]) for slices in sampler)


def train_step(run: Run, source: Tensor, target: Tensor) -> Tensor:
    """One optimizer step over source and target, (T, B) each; returns its loss, still on the device."""
    args = run.args
    if args.drop_state:  # every rank draws for the whole batch, from generators in the same state
        dropped = torch.rand(args.batch_size, generator=run.length_generator) < args.drop_state
        run.hidden = start_again(run.hidden, dropped[run.columns].repeat_interleave(args.samples))
    rate = run.rate() * len(source) / args.bptt  # a longer batch takes a longer step (AWD, section 5)
    scale = run.scaler.get_scale()  # 1 without fp16; with it, a synchronisation on CUDA
    step = run.graphs or partial(gradient_step, run)
    loss, run.hidden, run.grad_norm = step(source, target, run.hidden, rate)
    if run.mean and run.scaler.get_scale() >= scale:  # smaller: the gradients overflowed, and the step was skipped
        run.mean.update(run.weights)
    return loss


def gradient_step(run: Run, source: Tensor, target: Tensor, hidden: list[Hidden], rate: float | Tensor) -> StepResult:
    """Forward pass, backward pass and the optimizer's step.

    Returns the loss, the new hidden state and the norm of the gradient before clipping, all on the device. Without fp16
    and a split softmax it reads no value from the device, so that a CUDA graph can repeat it.
    """
    args, grad_norm = run.args, None
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)  # first: the forward pass can use this memory
    if args.samples > 1:  # dropout masks are per column
        source = source.repeat_interleave(args.samples, dim=1)  # (T, B·samples)
    with torch.autocast(source.device.type, dtype=run.amp, enabled=run.amp is not None):
        output, hidden, raw, dropped = run.model(source, hidden, return_h=True)
        loss = run.loss_function(run.model.decoder.weight, run.model.decoder.bias, output, target)

    objective = loss
    if args.alpha:  # AR (AWD, section 4.6): small activations
        objective = objective + args.alpha * dropped[-1].float().pow(2).mean()
    if args.beta and len(source) > 1:  # TAR: small changes from one time step to the next
        objective = objective + args.beta * (raw[-1][1:].float() - raw[-1][:-1].float()).pow(2).mean()
    del output, raw, dropped  # so that the backward pass frees each layer's as it goes
    run.scaler.scale(objective).backward()  # without fp16 the scaler changes nothing
    run.ranks.average_gradients(run.parameters)
    run.scaler.unscale_(run.optimizer)
    if args.clip:
        grad_norm = nn.utils.clip_grad_norm_(run.parameters, args.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.detach(), detach(hidden), grad_norm


def train_epoch(run: Run, check_stop: Callable[[], None]) -> None:
    """Trains from where the run stands to the epoch's end, or between two steps raises what `check_stop` raises."""
    args, at = run.args, run.at
    run.start_epoch()
    with EpochBar(at.epoch, at.row * args.batch_size, run.last_row * args.batch_size) as bar:
        for source, target in train_batches(run):
            loss = train_step(run, source, target)
            run.count_step(loss, len(source))
            if run.keeper:
                run.keeper.after_step(run, len(source))
            bar.show(len(source) * args.batch_size, at.mean_loss)
            if at.batch % run.log_interval == 0:
                log_training(run)
            if args.checkpoint_every and at.step % args.checkpoint_every == 0:
                checkpoint.save_state(run)
            if at.row < run.last_row:  # at the end of an epoch, validate before stopping
                check_stop()
    run.read_losses()


def fit(run: Run, stop_on_stall: bool = False) -> str:
    """Trains up to the last epoch; after each one validates, saves the best model and the run's state.

    Returns why it ended: "epochs" (done, or the validation loss has stalled), or one of `ranks.REASONS`.
    """
    args, at = run.args, run.at
    run.log.write("start", script=run.script, epoch=at.epoch, batch=at.batch, step=at.step)
    run.counted_until_s = time.perf_counter()
    on_stream = run.graphs.capture.on_stream if run.graphs else contextlib.nullcontext
    with Stopper(run.deadline_s, run.ranks) as stopper, on_stream():

        def check_stop() -> None:
            stopper.check("--max_steps" if args.max_steps and at.step >= args.max_steps else "")

        try:
            while at.epoch <= args.epochs and not (stop_on_stall and has_stalled(at.history, args.nonmono)):
                check_stop()
                train_epoch(run, check_stop)
                if not run.writing.has_state:  # a first model alone would be a warm start
                    checkpoint.save_state(run)
                loss = validate(run, stopper.check)
                if (at.best_loss is None or loss < at.best_loss) and checkpoint.save_model(run, loss):
                    at.best_loss = loss
                at.history.append(loss)
                if averages_after_stall(args) and not run.mean and has_stalled(at.history, args.nonmono):
                    say_or_drop("| switching to averaging (NT-ASGD)")
                    run.start_averaging()
                    run.log.write("averaging", loss, epoch=at.epoch, step=at.step)
                if at.epoch in args.when:
                    checkpoint.copy_model(run, f"{args.save}.e{at.epoch}")
                    at.lr /= 10
                at.epoch += 1
                at.restart_epoch()
                checkpoint.save_state_in_time(run)
            if run.writing.state_is_old:
                checkpoint.save_state(run)
        except Stop as stop:
            checkpoint.save_state(run)
            # A run that has saved no model yet saves the weights that it has.
            validate_first = at.best_loss is None or (stop.reason == "--max_steps" and at.row)
            if validate_first and stop.reason not in NO_TIME:
                with contextlib.suppress(Stop):
                    loss = validate(run, stopper.check_ending, partial=True)
                    if at.best_loss is None:
                        checkpoint.save_model(run, loss, partial=True)
            return stopper.ending() or stop.reason
        except RunError:
            checkpoint.write_pending_model(run)
            raise
        return stopper.ending() or "epochs"


def log_training(run: Run) -> None:
    """Prints and logs the mean loss and the speed since the last log line: a synchronisation on CUDA."""
    run.read_losses()
    at, loss, (since_s, batch, row) = run.at, run.at.mean_loss, run.last_log
    run.last_log = time.perf_counter(), at.batch, at.row
    at.loss_sum, at.loss_count = 0.0, 0
    elapsed_s = run.last_log[0] - since_s
    ms_per_batch = elapsed_s * 1000 / (at.batch - batch)
    say_or_drop(training_line(at.epoch, at.batch, run.batches, run.rate(), ms_per_batch, loss))
    grad_norm = None if run.grad_norm is None else run.grad_norm.item()
    place = {"epoch": at.epoch, "batch": at.batch, "batches": run.batches, "step": at.step, "lr": run.rate()}
    speed = {"ms_per_batch": ms_per_batch, "tokens_per_s": (at.row - row) * run.args.batch_size / elapsed_s}
    run.log.write("train", loss, **place, **speed, grad_norm=grad_norm)


def validate(run: Run, check_stop: Callable[[], None], partial: bool = False) -> float:
    """Evaluates the weights to evaluate with on the validation text; prints and logs the figures.

    `partial`: the epoch is not over. Raises RunError when the loss is not finite.
    """
    at, args = run.at, run.args

    def loss_of(model: RNNModel, criterion: Criterion) -> float:
        return evaluate(model, criterion, run.corpus.valid, args.bptt, EVAL_BATCH_SIZE, check_stop, run.ranks)

    loss = loss_of(*run.best_weights())
    if run.mean:
        loss = run.mean.after_validation(loss, lambda weights: loss_of(*parts_of(weights)))
    run.count_time()
    where = f"in epoch {at.epoch:3d}, step {at.step}" if partial else f"end of epoch {at.epoch:3d}"
    say_or_drop(f"{RULE}\n| {where} | time: {at.epoch_s:5.2f}s | {figures(loss, 'valid ')}\n{RULE}")
    if not math.isfinite(loss):
        raise at.not_finite(f"the validation loss is {loss}", at.step)
    place = {"epoch": at.epoch, "step": at.step, "lr": run.rate(), "epoch_s": at.epoch_s}
    run.log.write("valid", loss, **place, averaged=run.mean is not None, partial=partial)
    return loss


def evaluate_start(run: Run, title: str) -> float:
    """Evaluates the model that a run starts from, and prints it: only a better one will replace it."""
    loss = evaluate(run.model, run.criterion, run.corpus.valid, run.args.bptt, EVAL_BATCH_SIZE, ranks=run.ranks)
    say(f"| {title} | {figures(loss, 'valid ')}")
    run.at.best_loss = loss if math.isfinite(loss) else None
    return loss


def finish(run: Run, why: str) -> int:
    """After `fit`: tests the best model if there is time; returns the exit status. Raises NotWrittenError."""
    # The other ranks end now, with status 0: torchrun stops all as soon as one fails, and rank 0 goes on to test.
    run.ranks.end()
    if why in ("SIGINT", *NO_TIME):
        (warn if why == "SIGPIPE" else say_or_drop)(f"| stopped ({why}); --resume {run.args.save} goes on")
    if why not in NO_TIME and run.ranks.is_main and os.path.exists(run.args.save):
        test(files.load_model(run.args.save, "--save"), run.corpus.test, run.args.bptt, run.log)
    for error in run.writing.failed.values():
        raise error
    return ENDINGS.get(why, 0)


if __name__ == "__main__":
    not_a_command(__file__)
