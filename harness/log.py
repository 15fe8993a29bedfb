"""Everything that a run prints and logs: lines, the progress bar of an epoch, the log, TensorBoard.

The log (SAVE.log.jsonl) has one JSON object per line: the printed figures, unrounded. Losses are nats per token.
"""

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from tqdm import tqdm

from corpus.codec import count_units
from utils import UserError

RULE, DOUBLE_RULE = "-" * 89, "=" * 89
BAR = "{desc} |{bar:20}| {percentage:3.0f}% {n_fmt}/{total_fmt} tokens, {rate_fmt}, {remaining} left{postfix}"


def ppl(loss: float) -> float:
    """Perplexity of a loss in nats per token; infinite rather than an overflow."""
    return math.exp(loss) if loss < 709 else math.inf


def figures(loss: float, prefix: str = "", bpc: bool = True) -> str:
    """Loss, ppl and bpc (bits per token) as printed: scripts around the toolkit parse these lines."""
    text = f"{prefix}loss {loss:5.2f} | {prefix}ppl {ppl(loss):8.2f}"
    return f"{text} | {prefix}bpc {loss / math.log(2):8.3f}" if bpc else text


def training_line(epoch: int, batch: int, batches: int, lr: float, ms_per_batch: float, loss: float) -> str:
    """The line that training prints at each log interval."""
    place = f"| epoch {epoch:3d} | {batch:5d}/{batches:5d} batches | lr {lr:05.5f}"
    return f"{place} | ms/batch {ms_per_batch:5.2f} | {figures(loss)}"


def unit_figures(total: float, words: float, characters: float) -> dict[str, float]:
    """The perplexity per word and the bits per character of a text's whole loss, in nats."""
    return {"ppl_per_word": ppl(total / words), "bits_per_character": total / characters / math.log(2)}


def unit_text(units: dict[str, float], prefix: str = "") -> str:
    """These figures as the end of a printed line; "" if there are none."""
    return "".join(f" | {prefix}{name.replace('_', ' ')} {value:.3f}" for name, value in units.items())


@contextlib.contextmanager
def above_bar() -> Iterator[None]:
    """Hides the progress bar while entered."""
    if not sys.stdout.isatty():
        yield
        return
    with tqdm.external_write_mode(file=sys.stdout):
        sys.stdout.write("\r\x1b[K")  # clears what the terminal itself wrote behind the bar, such as ^C
        yield


def say(text: str) -> None:
    """Prints lines to stdout, above the progress bar if there is one."""
    with above_bar():
        print(text, flush=True)


def say_or_drop(text: str) -> None:
    """Like `say`, but where the line cannot be written it is dropped: the disk is full, or stdout is closed.

    In training, SIGPIPE has told the run that stdout is closed.
    """
    with contextlib.suppress(OSError):
        say(text)


def warn(text: str) -> None:
    """Prints one line to stderr, above the progress bar if there is one; when the disk is full it is dropped."""
    with above_bar(), contextlib.suppress(OSError):
        print(f"{os.path.basename(sys.argv[0])}: warning: {text}", file=sys.stderr, flush=True)


class EpochBar(tqdm):
    """A progress bar over the tokens of an epoch if stdout is a terminal; otherwise it does nothing.

    Args:
        epoch: counted from 1.
        done, total: tokens trained on before, and in the whole epoch.
    """

    monitor_interval = 0  # without tqdm's thread for bars with uneven steps

    def __init__(self, epoch: int, done: int, total: int) -> None:
        super().__init__(
            desc=f"epoch {epoch:3d}", initial=done, total=total, unit=" tokens", unit_scale=True, miniters=1,
            mininterval=0.2,  # seconds
            leave=False, dynamic_ncols=True, file=sys.stdout, bar_format=BAR, disable=not sys.stdout.isatty(),
        )  # fmt: skip

    def close(self) -> None:
        super().close()
        if not self.disable:
            sys.stdout.write("\r\x1b[K")  # as in `above_bar`
            sys.stdout.flush()

    def show(self, tokens: int, loss: float) -> None:
        """Moves the bar by `tokens`, and shows the mean loss since the last log line; nan: it is not known."""
        if not math.isnan(loss):
            self.set_postfix_str(f"loss {loss:.2f}, ppl {ppl(loss):.2f}", refresh=False)
        self.update(tokens)


class RunLog:
    """The log beside a model, and with --tensorboard the same figures for TensorBoard.

    When the disk is full, lines are dropped and the run goes on.

    Args:
        path: of the JSON lines; None: no log.
        board: the folder of this run's TensorBoard events; None: no TensorBoard.
    """

    def __init__(self, path: str | None, board: str | None = None) -> None:
        self.path, self.board, self.step = path, board, 0

    def write(self, kind: str, loss: float | None = None, **more: Any) -> None:
        """Writes a line; a loss in nats per token brings its perplexity and bits per token with it."""
        if loss is not None:
            more |= {"loss": loss, "ppl": ppl(loss), "bpc": loss / math.log(2)}
        # JSON has no infinite numbers, and no nan
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in more.items()}
        if self.path:
            with contextlib.suppress(OSError), open(self.path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a kill or a full disk has cut the line before
                        file.write(b"\n")
                file.write(json.dumps({"kind": kind, **finite}).encode() + b"\n")
        if self.board:
            self.write_board(kind, finite)

    def write_board(self, kind: str, entry: dict[str, Any]) -> None:
        """Writes the figures of a line as TensorBoard's scalars. A full disk ends that, with a warning."""
        self.step = entry.pop("step", self.step)
        try:
            if kind == "start":  # purge_step hides what the invocation before logged past the step of its state
                hook = threading.excepthook  # silent: the writer's thread raises its error again in our next call
                threading.excepthook = lambda args: isinstance(args.exc_value, OSError) or hook(args)
                self.writer = summary_writer()(self.board, purge_step=self.step + 1 if self.step else None)
            for name, value in entry.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(f"{kind}/{name}", value, self.step)
            self.writer.flush()
        except OSError as error:
            warn(f"--tensorboard {self.board}: {error.strerror}; the run goes on without it")
            self.board = None


def summary_writer() -> type:
    """TensorBoard's writer, imported only when it is needed; UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard: the package is not installed; pip install tensorboard, or leave the flag out: "
            "SAVE.log.jsonl has the figures too"
        ) from None
    return SummaryWriter


def figures_per_unit(tokenizer: str | None, vocab: list[str], ids: Tensor, loss: float) -> dict[str, float]:
    """The figures per word and per character for a mean loss over the predicted tokens of `ids`; {} if unknown."""
    counted = count_units(tokenizer, vocab, ids[1:].cpu().numpy())  # the first token is not predicted
    return unit_figures(loss * (len(ids) - 1), *counted) if counted and all(counted) else {}
