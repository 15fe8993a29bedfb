"""Training and evaluation, shared by main.py and finetune.py: the step, the epochs, the test.

Losses are nats per token and leave the regularisation out. Shapes: T time, B batch, N = T·B.

Method: Merity, Keskar, Socher, arXiv 1708.02182 ("AWD"): section 3 for NT-ASGD, 4.6 for the regularisation of
activations (AR, TAR), 5 for batch lengths.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import harness.files as files
from data import (
    EVAL_BATCH_SIZE,
    TEST_BATCH_SIZE,
    Corpus,
    VariableLengthSampler,
    eval_batches,
    get_batch,
    rotate_columns,
)
from harness.log import DOUBLE_RULE, RULE, EpochBar, RunLog, figures, figures_per_unit, say, tell, unit_text
from harness.ranks import ALONE, Ranks, Stop, Stopper
from harness.run import Run
from model import Criterion, RNNModel, detach
from optim import OPTIMIZERS, has_stalled

EVAL_ROWS = 1024  # positions at once, at least: the matrix products like as many
NO_TIME = ("SIGTERM", "--max_minutes")  # a run that ends for these neither validates nor tests


def train_batches(run: Run, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Source and target, (T, B) each, of this rank's columns, from where the run stands to the epoch's end."""
    args = run.args
    if run.offsets is not None:
        ids = rotate_columns(ids, args.batch_size, run.offsets)
    sampler = VariableLengthSampler(ids, args.bptt, args.batch_size, run.lengths, run.at.row, args.max_seq_len)
    for slices in sampler:
        yield get_batch(ids, slices[run.columns])


def train_step(run: Run, source: Tensor, target: Tensor) -> Tensor:
    """One optimizer step over source and target, (T, B) each; returns its loss, still on the device."""
    args = run.args
    run.optimizer.zero_grad(set_to_none=True)  # now: what the forward pass needs can take their place

    # Longer batches take longer steps (AWD, section 5), under every optimizer.
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate() * len(source) / args.bptt

    if args.drop_state and torch.rand((), generator=run.lengths) < args.drop_state:  # the same on all ranks
        run.hidden = run.first_hidden()
    if args.samples > 1:  # masks of dropout are per column
        source = source.repeat_interleave(args.samples, dim=1)  # (T, B·samples)
    with torch.autocast(source.device.type, dtype=run.amp, enabled=run.amp is not None):
        output, run.hidden, raw, dropped = run.model(source, detach(run.hidden), return_h=True)
        loss = run.loss(run.model.decoder.weight, run.model.decoder.bias, output, target)

    objective = loss
    if args.alpha:  # AR (AWD, section 4.6): small activations
        objective = objective + args.alpha * dropped[-1].float().pow(2).mean()
    if args.beta and len(source) > 1:  # TAR: small changes from one time step to the next
        objective = objective + args.beta * (raw[-1][1:].float() - raw[-1][:-1].float()).pow(2).mean()

    del output, raw, dropped  # so that the backward pass frees each layer's as it goes
    # Without fp16 the scaler is disabled, and hands everything through.
    run.scaler.scale(objective).backward()
    run.ranks.average_gradients(run.parameters)
    run.scaler.unscale_(run.optimizer)
    if args.clip:
        run.grad_norm = nn.utils.clip_grad_norm_(run.parameters, args.clip)

    scale = run.scaler.get_scale()  # 1 without fp16; with it, a synchronisation on CUDA
    run.scaler.step(run.optimizer)
    run.scaler.update()
    skipped = run.scaler.get_scale() < scale  # gradients that overflowed
    if run.mean and not skipped:
        run.mean.update(run.weights)
    return loss.detach()


@torch.no_grad()
def evaluate(
    model: RNNModel,
    criterion: Criterion,
    ids: Tensor,
    bptt: int,
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean negative log-likelihood over the predicted tokens, in nats, each counted once.

    Nothing is dropped; what layers carry goes on from segment to segment, so their length changes no figure. A
    text of n rows predicts n - 1 of them: the first one is only read. Columns are dealt out to `ranks`.
    """
    model.eval()
    criterion.eval()
    columns = ranks.columns(batch_size)
    hidden = model.init_hidden(columns.stop - columns.start)
    total, count = 0.0, 0
    for source, target in eval_batches(ids, max(bptt, EVAL_ROWS // batch_size), batch_size):
        check_stop()
        source, target = source[:, columns], target[:, columns]
        if not target.numel():
            continue  # more ranks than columns
        output, hidden = model(source, hidden)
        weight, bias = model.decoder.weight, model.decoder.bias
        # A synchronisation, but of a whole segment; summed in float64.
        total += criterion(weight, bias, output, target, reduction="sum").item()
        count += target.numel()
    total, count = ranks.sum([total, count])
    return total / count


def fit(run: Run, on_stall: str = "") -> str:
    """Trains up to the last epoch: after each one validates, saves the best model and the run's state.

    `on_stall`: what a stalled validation loss does: "stop", or what the optimizer's row says.

    Returns:
        Why it ended: "epochs", "stall", "SIGINT", "SIGTERM" or the flag that said so.
    """
    args, at, train = run.args, run.at, run.corpus.train
    on_stall = on_stall or ("average" if args.average else OPTIMIZERS[args.optimizer].on_stall)
    last_row = len(train) // args.batch_size - 1  # a target only
    run.log.write("start", script=run.script, epoch=at.epoch, batch=at.batch, step=at.step)
    run.start_clock()
    with Stopper(run.deadline_s, run.ranks) as stopper:

        def check_stop() -> None:
            stopper.check("--max_steps" if args.max_steps and at.step >= args.max_steps else "")

        try:
            while at.epoch <= args.epochs:
                if on_stall == "stop" and has_stalled(at.history, args.nonmono):
                    return "stall"
                check_stop()
                run.start_epoch()
                timer = Timer(run)
                with EpochBar(at.epoch, at.row * args.batch_size, last_row * args.batch_size) as bar:
                    for source, target in train_batches(run, train):
                        loss = train_step(run, source, target)
                        run.count(loss, len(source))
                        bar.show(len(source) * args.batch_size, run.mean_loss())
                        if at.batch % args.log_interval == 0:
                            log_training(run, timer)
                        if args.checkpoint_every and at.step % args.checkpoint_every == 0:
                            run.save_state()
                        if at.row < last_row:  # else the epoch is over, and is validated first
                            check_stop()
                run.read_losses()

                loss = validate(run, stopper.check)
                if (at.best_loss is None or loss < at.best_loss) and run.save_model(loss):
                    at.best_loss = loss
                at.history.append(loss)
                if on_stall == "average" and not run.mean and has_stalled(at.history, args.nonmono):
                    tell("| switching to averaging (NT-ASGD)")
                    run.start_averaging()
                    run.log.write("averaging", loss, epoch=at.epoch, step=at.step)
                if at.epoch in args.when:
                    run.copy_model(f"{args.save}.e{at.epoch}")
                    at.lr /= 10
                run.next_epoch()
                run.save_state()
        except Stop as stop:
            run.save_state()
            # Without a model of its own yet the run ends with the weights it has.
            wanted = at.best_loss is None or (stop.reason == "--max_steps" and at.row)
            if wanted and stop.reason not in NO_TIME:
                with contextlib.suppress(Stop):
                    loss = validate(run, stopper.check_sigterm, partial=True)
                    if at.best_loss is None:
                        run.save_model(loss, partial=True)
            return "SIGTERM" if stopper.terminated() else stop.reason
        return "SIGTERM" if stopper.terminated() else "epochs"


class Timer:
    """Milliseconds per batch and tokens per second since the last log line of this invocation."""

    def __init__(self, run: Run) -> None:
        self.run, self.since = run, (time.perf_counter(), run.at.batch, run.at.row)

    def read(self) -> dict[str, float]:
        (start, batch, row), at = self.since, self.run.at
        self.since = time.perf_counter(), at.batch, at.row
        elapsed_s = self.since[0] - start
        tokens = (at.row - row) * self.run.args.batch_size
        return {"ms_per_batch": elapsed_s * 1000 / (at.batch - batch), "tokens_per_s": tokens / elapsed_s}


def log_training(run: Run, timer: Timer) -> None:
    """Prints and logs the mean loss since the last line: a synchronisation on CUDA."""
    run.read_losses()
    at, loss, speed = run.at, run.mean_loss(), timer.read()
    batches = len(run.corpus.train) // run.args.batch_size // run.args.bptt
    at.loss_sum, at.loss_count = 0.0, 0
    tell(
        f"| epoch {at.epoch:3d} | {at.batch:5d}/{batches:5d} batches | lr {run.rate():05.5f} "
        f"| ms/batch {speed['ms_per_batch']:5.2f} | {figures(loss)}"
    )
    grad_norm = None if run.grad_norm is None else run.grad_norm.item()
    place = {"epoch": at.epoch, "batch": at.batch, "batches": batches, "step": at.step, "lr": run.rate()}
    run.log.write("train", loss, **place, **speed, grad_norm=grad_norm)


def validate(run: Run, check_stop: Callable[[], None], partial: bool = False) -> float:
    """Evaluates the weights that count on the validation text; prints and logs the figures.

    `partial`: the epoch is not over.

    Raises:
        Stop: when `check_stop` does.
        RunError: the loss is not finite.
    """
    at, args = run.at, run.args
    loss = evaluate(*run.evaluated(), run.corpus.valid, args.bptt, EVAL_BATCH_SIZE, check_stop, run.ranks)
    run.count_time()
    where = f"in epoch {at.epoch:3d}, step {at.step}" if partial else f"end of epoch {at.epoch:3d}"
    tell(f"{RULE}\n| {where} | time: {at.epoch_s:5.2f}s | {figures(loss, 'valid ')}\n{RULE}")
    if not math.isfinite(loss):
        raise at.not_finite(f"the validation loss is {loss}", at.step)
    place = {"epoch": at.epoch, "step": at.step, "lr": run.rate(), "epoch_s": at.epoch_s}
    run.log.write("valid", loss, **place, averaged=run.mean is not None, partial=partial)
    return loss


def evaluate_start(run: Run, what: str) -> float:
    """Evaluates the model that a run starts from, and prints it: only a better one will replace it."""
    args = run.args
    loss = evaluate(run.model, run.criterion, run.corpus.valid, args.bptt, EVAL_BATCH_SIZE, ranks=run.ranks)
    say(f"| {what} | {figures(loss, 'valid ')}")
    run.at.best_loss = loss if math.isfinite(loss) else None
    return loss


def test(path: str, ids: Tensor, bptt: int, log: RunLog) -> float:
    """Evaluates a saved model on the test text at batch size 1 and prints the last line of a run."""
    saved = files.to_evaluate(files.load_model(path, "--save"), ids.device)
    loss = evaluate(saved.model, saved.criterion, ids, bptt, TEST_BATCH_SIZE)
    units = figures_per_unit(saved.tokenizer, saved.vocab, ids, loss)
    say(f"{DOUBLE_RULE}\n| End of training | {figures(loss, 'test ')}{unit_text(units, 'test ')}\n{DOUBLE_RULE}")
    log.write("test", loss, **units)
    return loss


def evaluate_only(saved: dict[str, Any], path: str, corpus: Corpus, bptt: int) -> int:
    """`main.py --epochs 0`: a saved model's figures on this text; nothing is trained, no file is written."""
    model, criterion, *_ = files.to_evaluate(saved, corpus.valid.device)
    loss = evaluate(model, criterion, corpus.valid, bptt, EVAL_BATCH_SIZE)
    say(f"| End of evaluation | {figures(loss, 'valid ')}")
    test(path, corpus.test, bptt, RunLog(None))
    return 0


def finish(run: Run, why: str) -> int:
    """After `fit`: tests the best model, unless there is no time for it; returns the exit status.

    A test at batch size 1 is a sequence: rank 0 does it alone.

    Raises:
        NotWrittenError: the last attempt to write the best model or the state failed.
    """
    # The others end now, and well: torchrun ends all once one has failed, and rank 0 has still to say what did.
    run.ranks.end()
    if why in ("SIGINT", *NO_TIME):
        say(f"| stopped ({why}); --resume {run.args.save} goes on")
    if why not in NO_TIME and run.ranks.is_main and os.path.exists(run.args.save):
        test(run.args.save, run.corpus.test, run.args.bptt, run.log)
    for error in run.unwritten.values():
        raise error
    return 143 if why == "SIGTERM" else 0
