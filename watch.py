"""What a person sees of a run: printed lines, an epoch's progress bar on a terminal, and TensorBoard."""

import atexit
import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from utils import JsonLog, UserError, check_writable, ppl

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BAR = "{desc} |{bar:20}| {percentage:3.0f}% {n_fmt}/{total_fmt} tokens, {rate_fmt}, {remaining} left{postfix}"
# Figures of the log, and what TensorBoard calls them.
TAGS = {"lr": "rate", "grad_norm": "grad_norm", "tokens_per_s": "tokens_per_s", "averaged": "averaging"}


def say(text: str) -> None:
    """Prints lines to stdout, above the progress bar if there is one.

    Redirected into a file on a full disk, they wait in Python's buffer: they are not worth the run.
    """
    try:
        with above_bar():
            print(text, flush=True)
    except OSError as error:
        if error.errno not in FULL:
            raise


def warn(text: str) -> None:
    """Prints one line to stderr, above the progress bar if there is one."""
    with contextlib.suppress(OSError), above_bar():
        print(f"{os.path.basename(sys.argv[0])}: warning: {text}", file=sys.stderr, flush=True)


def above_bar() -> contextlib.AbstractContextManager[None]:
    """While entered, the progress bar makes room."""
    return tqdm.external_write_mode(file=sys.stdout) if sys.stdout.isatty() else contextlib.nullcontext()


class Bar(tqdm):
    """tqdm's bar without its thread, which looks after bars of uneven steps."""

    monitor_interval = 0


class EpochBar:
    """A progress bar over the tokens of an epoch, when stdout is a terminal; else it does nothing.

    Args:
        epoch: counted from 1.
        done, total: tokens trained on before, and in the whole epoch.
    """

    def __init__(self, epoch: int, done: int, total: int) -> None:
        self.bar: Bar | None = None
        if sys.stdout.isatty():
            self.bar = Bar(
                desc=f"epoch {epoch:3d}",
                initial=done,
                total=total,
                unit=" tokens",
                unit_scale=True,
                miniters=1,
                mininterval=0.2,  # seconds: what a step pays is a look at the clock
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
                bar_format=BAR,
            )

    def __enter__(self) -> "EpochBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
            sys.stdout.write("\r\x1b[K")  # what the terminal itself wrote behind the bar: ^C, say
            sys.stdout.flush()

    def show_loss(self, loss: float) -> None:
        """The mean loss since the last log line, as far as it has been read, nats a token."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.2f}, ppl {ppl(loss):.2f}", refresh=False)

    def advance(self, tokens: int) -> None:
        if self.bar is not None:
            self.bar.update(tokens)


class RunLog(JsonLog):
    """The log of a run, and the same figures for TensorBoard when they are wanted there.

    Args:
        path: of the JSON lines; None: no log.
        board: folder of this run's events; None: no TensorBoard.
    """

    def __init__(self, path: str | None, board: str | None = None) -> None:
        super().__init__(path)
        self.board, self.step, self.said = board, 0, False
        self.begin: dict[str, Any] = {}  # the line that is still to be written first
        self.writer: Any = None

    def start(self, script: str, epoch: int, batch: int, step: int) -> None:
        """Where this invocation goes on, told before its first figure: what was logged past it is void."""
        self.begin = {"kind": "start", "script": script, "epoch": epoch, "batch": batch, "step": step}

    def line(self, entry: dict[str, Any]) -> None:
        if self.begin:
            super().line(self.begin)
            if self.board:
                self.open_board(self.begin["step"])
            self.begin = {}
        super().line(entry)
        if self.board:
            self.add_to_board(entry)

    def open_board(self, step: int) -> None:
        """Begins a file of events. A resumed run hides points past `step`, of the invocation before it."""
        # The writer's thread hands its error to the next call; it need not print a traceback too.
        hook = threading.excepthook
        threading.excepthook = lambda args: isinstance(args.exc_value, OSError) or hook(args)
        self.on_board(lambda writer: None, purge_step=step + 1 if step else None)
        atexit.register(self.on_board, lambda writer: writer.close())

    def add_to_board(self, entry: dict[str, Any]) -> None:
        """The figures of a line of the log."""
        kind, self.step = entry["kind"], entry.get("step", self.step)
        if self.writer is None and kind == "train":
            return  # the disk is full: a new file is tried at every validation
        scalars = {f"{name}/{kind}": entry[name] for name in ("loss", "ppl", "bpc")}
        scalars |= {tag: float(entry[name]) for name, tag in TAGS.items() if entry.get(name) is not None}
        self.scalars(scalars)
        if kind == "averaging":
            text = f"epoch {entry['epoch']}, step {self.step}: from here on the mean of the weights counts"
            self.on_board(lambda writer: writer.add_text("averaging starts (NT-ASGD)", text, self.step))
        if kind != "train":
            self.on_board(lambda writer: writer.flush())

    def weight_norms(self, weights: nn.Module) -> None:
        """Euclidean norm of every weight, for TensorBoard: a synchronisation."""
        if self.writer is None:
            return
        names, tensors = zip(*weights.named_parameters(), strict=True)
        norms = torch.stack([torch.linalg.vector_norm(tensor.detach()) for tensor in tensors]).tolist()
        self.scalars({f"weight_norm/{name}": norm for name, norm in zip(names, norms, strict=True)})

    def scalars(self, values: dict[str, float]) -> None:
        """Adds points at the current step."""
        self.on_board(lambda writer: [writer.add_scalar(tag, x, self.step) for tag, x in values.items()])

    def on_board(self, use: Callable[[Any], object], **how: Any) -> None:
        """Calls `use(writer)`, made if there is none. On a full disk the points are dropped."""
        try:
            self.writer = self.writer or summary_writer()(self.board, **how)
            use(self.writer)
        except OSError as error:
            self.writer = None
            if not self.said:
                where = f"--tensorboard {self.board}"
                warn(f"{where}: {error.strerror}; the run goes on, without it while that lasts")
            self.said = True


def summary_writer() -> type:
    """TensorBoard's writer class, imported only when it is asked for.

    Raises:
        UserError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard: the package is not installed; pip install tensorboard, or leave the flag out: "
            "SAVE.log.jsonl has the figures too"
        ) from None
    return SummaryWriter


def board_folder(tensorboard: str | None, save: str, script: str) -> str | None:
    """The folder of this run's events in `--tensorboard DIR`, made if it is missing.

    It is called as the model, its folders included; training and fine-tuning of one model are two curves.

    Raises:
        UserError: it cannot be written, or TensorBoard is not installed.
    """
    if not tensorboard:
        return None
    summary_writer()
    parts = [part for part in os.path.relpath(save).split(os.sep) if part != ".."]
    suffix = "" if script == "main.py" else "." + script.removesuffix(".py")
    folder = os.path.join(tensorboard, *parts) + suffix
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--tensorboard {tensorboard}: {error.strerror}; choose a folder that can be written to"
        ) from None
    check_writable(os.path.join(folder, "events"), "--tensorboard")
    return folder
