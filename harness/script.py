"""The start and end of every script: an error is one line on stderr, not a traceback.

Exit status 2: wrong usage or data. 1: a run that failed. 130: Ctrl-C twice. Those of signals: `ranks.ENDINGS`.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator

import torch

from harness.ranks import ALONE, ENDINGS, find_ranks, handle_endings, under_torchrun
from utils import UserError, keep_freed_memory, out_of_memory


def run_script(main: Callable[[], int | None], parallel: bool = False) -> None:
    """Calls `main()` and exits with its status. An error that a user or a machine can cause becomes one line on stderr.

    Args:
        parallel: `main` can be one of several processes; otherwise torchrun's rank 0 works alone, and the others end.
    """
    open_closed_streams()
    ranks = find_ranks() if parallel or under_torchrun() else ALONE
    if not (ranks.is_main or parallel):
        sys.exit(0)
    keep_freed_memory()
    handlers = handle_endings(lambda number, _: sys.exit(128 + number))  # while there is nothing to save
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the terminal says; names may be no UTF-8
    message = ""
    try:
        with contextlib.nullcontext() if ranks.is_main else silence():
            status = main() or 0
        sys.stdout.flush()
    except SystemExit as end:  # --help, SIGTERM
        status = end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # `| head`
        status = ENDINGS["SIGPIPE"] if parallel else 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except Exception as error:
        message, status = describe(error), getattr(error, "status", 1)
        if not message and ranks.size == 1:
            raise  # a defect of the toolkit, whose traceback is needed to mend it
        message = message or f"{type(error).__name__}: {error}"
        status = status if ranks.size == 1 else 1
    for number in handlers:  # a handler that raises would disturb Python's own exit
        signal.signal(number, signal.SIG_DFL)
    if message:
        who = f"{os.path.basename(sys.argv[0])}: " + (f"rank {ranks.rank}: " if ranks.size > 1 else "")
        with contextlib.suppress(OSError):
            print(f"{who}{' '.join(message.split())}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk or a closed pipe; Python would try again at its exit, and print an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if ranks.size > 1:
        os._exit(status)  # Python's teardown of torch's process group (2.13) aborts now and then
    sys.exit(status)


def describe(error: Exception) -> str:
    """The line that is printed for an error; "" for a defect of the toolkit."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if out_of_memory(error):
        reason = str(error).partition("DefaultCPUAllocator: ")[2] or str(error) or "out of memory"
        reason = reason.partition(". ")[0].partition("\n")[0]
        reason = reason if "memory" in reason else f"out of memory ({reason})"
        return f"error: {reason}; try a smaller --batch_size, --bptt or model"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror or error}"
    if isinstance(error, torch.AcceleratorError):
        return f"error: the device failed: {str(error).splitlines()[0]}; go on with --resume"
    return ""


def open_closed_streams() -> None:
    """Opens /dev/null as stdin, stdout and stderr where they are closed, so that no other file gets their numbers."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for the process's whole life


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discards everything that is printed while entered, because rank 0 prints for all."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
