"""What a person sees of a run: printed lines, the progress bar of an epoch, the log, TensorBoard.

    tail -f PTB.pt.log.jsonl

The log has one JSON object per line: the printed figures, unrounded. Losses are nats per token, times seconds.
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

from corpus.tokenizer import count_units
from utils import UserError

RULE, DOUBLE_RULE = "-" * 89, "=" * 89
BAR = "{desc} |{bar:20}| {percentage:3.0f}% {n_fmt}/{total_fmt} tokens, {rate_fmt}, {remaining} left{postfix}"


def ppl(loss: float) -> float:
    """Perplexity of a loss in nats per token; infinite rather than an overflow."""
    return math.exp(loss) if loss < 709 else math.inf


def figures(loss: float, prefix: str = "", bpc: bool = True) -> str:
    """The part of a printed line that scripts around the toolkit parse: loss, ppl and bpc (bits per token)."""
    text = f"{prefix}loss {loss:5.2f} | {prefix}ppl {ppl(loss):8.2f}"
    return f"{text} | {prefix}bpc {loss / math.log(2):8.3f}" if bpc else text


def unit_figures(total: float, words: int, characters: int) -> dict[str, float]:
    """Of the loss of a whole text, in nats: what it comes to per word and per character, as it is logged."""
    return {"ppl_per_word": ppl(total / words), "bits_per_character": total / characters / math.log(2)}


def unit_text(units: dict[str, float], prefix: str = "") -> str:
    """The end of a printed line that tells them; nothing where there are none."""
    return "".join(f" | {prefix}{name.replace('_', ' ')} {value:.3f}" for name, value in units.items())


@contextlib.contextmanager
def above_bar() -> Iterator[None]:
    """While entered, the progress bar makes room."""
    if not sys.stdout.isatty():
        yield
        return
    with tqdm.external_write_mode(file=sys.stdout):
        sys.stdout.write("\r\x1b[K")  # what the terminal itself wrote behind the bar: ^C, say
        yield


def say(text: str) -> None:
    """Prints lines to stdout, above the progress bar if there is one."""
    with above_bar():
        print(text, flush=True)


def say_or_drop(text: str) -> None:
    """Like `say`, but when the disk is full the line is dropped and the run goes on."""
    try:
        say(text)
    except BrokenPipeError:  # nobody reads on
        raise
    except OSError:
        pass


def warn(text: str) -> None:
    """Prints one line to stderr, above the progress bar if there is one; on a full disk it is dropped."""
    with above_bar(), contextlib.suppress(OSError):
        print(f"{os.path.basename(sys.argv[0])}: warning: {text}", file=sys.stderr, flush=True)


class EpochBar(tqdm):
    """A progress bar over the tokens of an epoch, when stdout is a terminal; else it does nothing.

    Args:
        epoch: counted from 1.
        done, total: tokens trained on before, and in the whole epoch.
    """

    monitor_interval = 0  # no thread: it looks after bars of uneven steps

    def __init__(self, epoch: int, done: int, total: int) -> None:
        super().__init__(
            desc=f"epoch {epoch:3d}", initial=done, total=total, unit=" tokens", unit_scale=True, miniters=1,
            mininterval=0.2,  # seconds: what a step pays is a look at the clock
            leave=False, dynamic_ncols=True, file=sys.stdout, bar_format=BAR, disable=not sys.stdout.isatty(),
        )  # fmt: skip

    def close(self) -> None:
        super().close()
        if not self.disable:
            sys.stdout.write("\r\x1b[K")  # likewise
            sys.stdout.flush()

    def show(self, tokens: int, loss: float | None) -> None:
        """So many tokens more, and the mean loss since the last log line, as far as it has been read."""
        if loss is not None:
            self.set_postfix_str(f"loss {loss:.2f}, ppl {ppl(loss):.2f}", refresh=False)
        self.update(tokens)


class RunLog:
    """The log beside a model, and the same figures for TensorBoard when they are wanted there.

    A line that cannot be written (a full disk) is dropped: the log is not worth the run.

    Args:
        path: of the JSON lines; None: no log.
        board: the folder of this run's TensorBoard events; None: no TensorBoard.
    """

    def __init__(self, path: str | None, board: str | None = None) -> None:
        self.path, self.board, self.step = path, board, 0

    def write(self, kind: str, loss: float | None = None, **more: Any) -> None:
        """Writes a line; with a loss in nats per token come its perplexity and bits per token."""
        if loss is not None:
            more |= {"loss": loss, "ppl": ppl(loss), "bpc": loss / math.log(2)}
        # JSON has no infinite numbers, and no nan
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in more.items()}
        if self.path:
            with contextlib.suppress(OSError), open(self.path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # the line before was cut short, by a kill or a full disk
                        file.write(b"\n")
                file.write(json.dumps({"kind": kind, **finite}).encode() + b"\n")
        if self.board:
            self.write_board(kind, finite)

    def write_board(self, kind: str, entry: dict[str, Any]) -> None:
        """The figures of a line, as TensorBoard's scalars. On a full disk it is given up, with a warning."""
        self.step = entry.pop("step", self.step)
        try:
            if kind == "start":  # a resumed run hides points past this step, of the invocation before it
                hook = threading.excepthook  # the writer's thread hands its error to the next call of ours
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
    """TensorBoard's writer, imported only when it is asked for; UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard: the package is not installed; pip install tensorboard, or leave the flag out: "
            "SAVE.log.jsonl has the figures too"
        ) from None
    return SummaryWriter


def figures_per_unit(tokenizer: str | None, vocab: list[str], ids: Tensor, loss: float) -> dict[str, float]:
    """A mean loss over the predicted tokens of `ids`, per word and per character; {} where there are none."""
    counted = count_units(tokenizer, vocab, ids[1:].cpu().numpy())  # the first one is only read
    return unit_figures(loss * (len(ids) - 1), *counted) if counted and all(counted) else {}
