"""Training and evaluation, shared by main.py and finetune.py: the step, the epoch, the epochs.

Losses are nats a token and leave the regularisation out. Method: Merity, Keskar, Socher, arXiv 1708.02182
("AWD"): section 3 for NT-ASGD, 4.6 for the regularisation of activations (AR, TAR), 5 for batch lengths.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
from batches import EVAL_BATCH_SIZE, TEST_BATCH_SIZE, VariableLengthSampler, eval_batches, get_batch
from model import RNNModel, detach
from parallel import ALONE, Ranks
from run import Run
from splitcross import SplitCrossEntropyLoss
from stop import Stop, StopSignals
from utils import JsonLog, figures
from watch import EpochBar, say

# The settings of `fit`, by name, those of `train_epoch` among them.
FIT_SETTINGS = (
    *("epochs", "when", "nonmono", "max_steps", "max_minutes"),
    *("batch_size", "bptt", "max_seq_len", "alpha", "beta", "clip", "log_interval"),
    *("checkpoint_every", "checkpoint_minutes"),
)
NO_TIME = ("SIGTERM", "--max_minutes")  # a run that ends for these neither validates nor tests
RULE, DOUBLE_RULE = "-" * 89, "=" * 89


def train_step(
    run: Run, ids: Tensor, slices: list[slice], bptt: int, alpha: float, beta: float, clip: float
) -> Tensor:
    """One optimizer step over one batch; returns its loss (a scalar, still on the device, nats a token)."""
    source, target = get_batch(ids, slices)  # (T, B) each
    run.optimizer.zero_grad(set_to_none=True)  # now: what the forward pass needs can take their place

    # Longer batches take longer steps (AWD, section 5), under every optimizer.
    for group in run.optimizer.param_groups:
        group["lr"] = run.progress.lr * len(source) / bptt

    with torch.autocast(ids.device.type, dtype=run.amp, enabled=run.amp is not None):
        output, run.hidden, raw, dropped = run.model(source, detach(run.hidden), return_h=True)
        loss = run.loss(run.model.decoder.weight, run.model.decoder.bias, output, target)

    objective = loss
    if alpha:  # AR (AWD, section 4.6): small activations
        objective = objective + alpha * dropped[-1].float().pow(2).mean()
    if beta and len(source) > 1:  # TAR: small changes from one time step to the next
        objective = objective + beta * (raw[-1][1:].float() - raw[-1][:-1].float()).pow(2).mean()

    del output, raw, dropped  # so that the backward pass frees each layer's as it goes
    # Without fp16 the scaler is disabled, and hands everything through.
    run.scaler.scale(objective).backward()
    run.ranks.average_gradients(run.parameters)
    run.scaler.unscale_(run.optimizer)
    if clip:
        run.grad_norm = nn.utils.clip_grad_norm_(run.parameters, clip)
    elif run.log.board:
        run.grad_norm = nn.utils.get_total_norm([p.grad for p in run.parameters if p.grad is not None])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average:
        run.average.update_parameters(run.weights)
    return loss.detach()


def train_epoch(
    run: Run,
    ids: Tensor,
    *,
    batch_size: int,
    bptt: int,
    max_seq_len: int,
    alpha: float,
    beta: float,
    clip: float,
    log_interval: int,
    checkpoint_every: int,
    checkpoint_minutes: float,
    check_stop: Callable[[], None],
    bar: EpochBar,
) -> None:
    """Trains from where the run stands to the end of the epoch.

    Raises:
        Stop: between two steps, when `check_stop` does.
        RunError: a loss is not finite; neither model nor state is written again.
    """
    progress = run.progress
    sampler = VariableLengthSampler(ids, bptt, batch_size, run.lengths, progress.row, max_seq_len)
    batches = sampler.rows // bptt
    # On a CUDA device reading a loss waits for the device, so losses are read at the log interval only.
    read_every = 1 if ids.device.type == "cpu" else log_interval
    unread: list[Tensor] = []
    start, start_batch, start_row = time.perf_counter(), progress.batch, progress.row
    last_checkpoint = time.monotonic()

    run.model.train()
    if progress.row == 0:
        run.hidden = run.first_hidden()
    check_stop()
    for slices in sampler:
        unread.append(train_step(run, ids, slices[run.columns], bptt, alpha, beta, clip))
        rows = slices[0].stop - slices[0].start
        progress.row += rows
        progress.batch, progress.step = progress.batch + 1, progress.step + 1

        at_log = progress.batch % log_interval == 0
        at_checkpoint = (checkpoint_every and progress.step % checkpoint_every == 0) or (
            checkpoint_minutes
            and run.ranks.any(time.monotonic() - last_checkpoint >= 60 * checkpoint_minutes)
        )
        at_end = progress.row == sampler.rows - 1
        if len(unread) >= read_every or at_log or at_checkpoint or at_end:
            read_losses(run, unread)
            bar.show_loss(progress.loss_sum / progress.loss_count)
        bar.advance(rows * batch_size)
        if at_log:
            now = time.perf_counter()
            tokens_per_s = (progress.row - start_row) * batch_size / (now - start)
            log_interval_figures(
                run, batches, (now - start) * 1000 / (progress.batch - start_batch), tokens_per_s
            )
            start, start_batch, start_row = now, progress.batch, progress.row
        if at_checkpoint:
            run.save_state()
            last_checkpoint = time.monotonic()
        if not at_end:
            try:
                check_stop()
            except Stop:
                read_losses(run, unread)  # they belong to the state that is about to be written
                raise


def read_losses(run: Run, unread: list[Tensor]) -> None:
    """Adds up the last steps' losses, means over ranks, and empties the list: a synchronisation on CUDA.

    Raises:
        RunError: one of them is not finite.
    """
    if not unread:
        return
    progress, losses = run.progress, run.ranks.sum(torch.stack(unread).tolist())
    for i, loss in enumerate((total / run.ranks.size for total in losses), start=1):
        if not math.isfinite(loss):
            raise progress.not_finite(f"the loss is {loss}", progress.step - len(unread) + i)
        progress.loss_sum, progress.loss_count = progress.loss_sum + loss, progress.loss_count + 1
    unread.clear()


def log_interval_figures(run: Run, batches: int, ms_per_batch: float, tokens_per_s: float) -> None:
    """Prints and logs the mean loss since the last line."""
    progress = run.progress
    loss = progress.loss_sum / progress.loss_count
    progress.loss_sum, progress.loss_count = 0.0, 0
    say(
        f"| epoch {progress.epoch:3d} | {progress.batch:5d}/{batches:5d} batches | lr {progress.lr:05.5f} "
        f"| ms/batch {ms_per_batch:5.2f} | {figures(loss)}"
    )
    grad_norm = math.nan if run.grad_norm is None else run.grad_norm.item()
    run.log.write(
        "train",
        loss,
        epoch=progress.epoch,
        batch=progress.batch,
        batches=batches,
        step=progress.step,
        lr=progress.lr,
        ms_per_batch=ms_per_batch,
        tokens_per_s=tokens_per_s,
        grad_norm=grad_norm if math.isfinite(grad_norm) else None,  # JSON has no other numbers
    )
    if run.log.board:
        run.log.weight_norms(run.weights)


@torch.no_grad()
def evaluate(
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    ids: Tensor,
    bptt: int,
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean negative log-likelihood over the predicted tokens, in nats, each counted once.

    Nothing is dropped; the state carries over from segment to segment, so `bptt` changes no figure. A text
    of n rows predicts n - 1 of them: the first one is only read. Columns are dealt out to `ranks`.
    """
    model.eval()
    columns = ranks.columns(batch_size)
    hidden = model.init_hidden(columns.stop - columns.start)
    total, count = 0.0, 0
    for source, target in eval_batches(ids, bptt, batch_size):
        check_stop()
        source, target = source[:, columns], target[:, columns]
        if not target.numel():
            continue  # more ranks than columns
        output, hidden = model(source, hidden)
        total += criterion(
            model.decoder.weight, model.decoder.bias, output, target, reduction="sum"
        ).item()  # a synchronisation, but of a whole segment; summed in float64
        count += target.numel()
    total, count = ranks.sum([total, count])
    return total / count


def fit(
    run: Run,
    train: Tensor,
    valid: Tensor,
    *,
    epochs: int,
    when: list[int],
    nonmono: int,
    max_steps: int,
    max_minutes: float,
    on_stall: str,
    started: float,
    **settings: Any,
) -> str:
    """Trains up to epoch `epochs`: after each one validates, saves the best model and the run's state.

    The validation loss has stalled when it is above the best one older than `nonmono` epochs (AWD,
    algorithm 1). `on_stall` says what happens then: "average" (SGD starts to average its weights), "stop",
    or "nothing". `max_minutes` count from `started`, of `time.monotonic`. The other settings are those of
    `train_epoch`.

    Returns:
        Why it ended: "epochs", "stall", or the reason of a Stop: "SIGINT", "SIGTERM" or a flag.
    """
    progress = run.progress
    tokens = (len(train) // settings["batch_size"] - 1) * settings["batch_size"]  # trained on in an epoch
    run.log.start(run.script, progress.epoch, progress.batch, progress.step)
    run.start_clock()
    with StopSignals(run.ranks) as signals, run.files.last_try():

        def check_time() -> None:
            late = max_minutes and time.monotonic() - started >= 60 * max_minutes
            signals.check("--max_minutes" if late else "")

        def check_stop() -> None:
            check_time()
            if max_steps and progress.step >= max_steps:
                raise Stop("--max_steps")

        def check_sigterm() -> None:
            if signals.terminated():
                raise Stop("SIGTERM")

        reason = "epochs"
        try:
            while progress.epoch <= epochs:
                if on_stall == "stop" and has_stalled(progress.history, nonmono):
                    reason = "stall"
                    break
                with EpochBar(progress.epoch, progress.row * settings["batch_size"], tokens) as bar:
                    train_epoch(run, train, check_stop=check_stop, bar=bar, **settings)
                loss = validate(run, valid, settings["bptt"], check_time)
                progress.history.append(loss)
                if on_stall == "average" and not run.averaging and has_stalled(progress.history, nonmono):
                    say("| switching to averaging (NT-ASGD)")
                    run.start_averaging()
                    run.log.write("averaging", loss, epoch=progress.epoch, step=progress.step)
                if progress.epoch in when:
                    if run.ranks.leads:
                        run.files.copy_model(f"{run.save}.e{progress.epoch}")
                    progress.lr /= 10
                progress.epoch, progress.row, progress.batch, progress.epoch_s = progress.epoch + 1, 0, 0, 0.0
                progress.loss_sum, progress.loss_count = 0.0, 0
                run.save_state()
        except Stop as stop:
            reason, run.files.at_end = stop.reason, True
            run.save_state()
            # Without a model of its own yet (or by --max_steps), the run ends with the weights it has.
            has_new = progress.best_loss is None or (reason == "--max_steps" and progress.row)
            if has_new and reason not in NO_TIME:
                with contextlib.suppress(Stop):
                    validate(run, valid, settings["bptt"], check_sigterm, partial=True)
        # It may have come after the last check: then there is no time for a test either.
        return "SIGTERM" if signals.terminated() else reason


def validate(
    run: Run,
    valid: Tensor,
    bptt: int,
    check_stop: Callable[[], None],
    partial: bool = False,
) -> float:
    """Evaluates the weights that count, prints and logs the figures, saves the model when it is the best.

    `partial`: the epoch is not over, and a resumed run will have to know which model this one replaced.

    Raises:
        Stop: when `check_stop` does.
        RunError: the loss is not finite.
    """
    progress = run.progress
    loss = evaluate(*run.evaluated(), valid, bptt, EVAL_BATCH_SIZE, check_stop, run.ranks)
    run.count_time()
    line = f"| end of epoch {progress.epoch:3d} | time: {progress.epoch_s:5.2f}s | {figures(loss, 'valid ')}"
    say(f"{RULE}\n{line}\n{RULE}")
    if not math.isfinite(loss):
        raise progress.not_finite(f"the validation loss is {loss}", progress.step)
    run.log.write(
        "valid",
        loss,
        epoch=progress.epoch,
        step=progress.step,
        lr=progress.lr,
        epoch_s=progress.epoch_s,
        averaged=run.averaging,
        partial=partial,
    )
    if progress.best_loss is None or loss < progress.best_loss:
        if partial and progress.best_loss is not None:
            kept = run.save_state(displaced=run.files.best_model() if run.ranks.leads else None)
            if not kept:  # nothing would know the model before it: that one stays
                return loss
        run.save_model(loss)
        progress.best_loss = loss
    return loss


def evaluate_start(run: Run, valid: Tensor, bptt: int, what: str) -> float:
    """Evaluates the model that a run starts from, and prints it: only a better one will replace it."""
    loss = evaluate(run.model, run.criterion, valid, bptt, EVAL_BATCH_SIZE, ranks=run.ranks)
    say(f"| {what} | {figures(loss, 'valid ')}")
    run.progress.best_loss = loss if math.isfinite(loss) else None
    return loss


def has_stalled(history: list[float], nonmono: int) -> bool:
    """Whether the last loss is above the best one older than `nonmono` epochs (AWD, algorithm 1)."""
    older = history[: max(0, len(history) - 1 - nonmono)]
    return bool(older) and history[-1] > min(older)


def test(save: str, ids: Tensor, bptt: int, log: JsonLog) -> float:
    """Evaluates the saved model on the test text at batch size 1 and prints the last line of a run."""
    model, criterion = checkpoint.restore(checkpoint.load_model(save, "--save"))
    loss = evaluate(model.to(ids.device), criterion.to(ids.device), ids, bptt, TEST_BATCH_SIZE)
    say(f"{DOUBLE_RULE}\n| End of training | {figures(loss, 'test ')}\n{DOUBLE_RULE}")
    log.write("test", loss)
    return loss


def finish(run: Run, reason: str, ids: Tensor, bptt: int, go_on: str) -> int:
    """After `fit`: tests the best model, unless there is no time for it; returns the exit status.

    A test at batch size 1 is a sequence: rank 0 does it alone.

    Raises:
        RunError: the best model or the state could not be written.
    """
    run.ranks.end()
    run.files.require_written(models_only=True)
    if reason in ("SIGINT", *NO_TIME):
        say(f"| stopped; go on with: {go_on}")
    if reason not in NO_TIME and run.ranks.leads:
        test(run.save, ids, bptt, run.log)
    run.files.require_written()
    return 143 if reason == "SIGTERM" else 0
