"""What every script needs and no method depends on: errors, whole files, the device, the run's log."""

import argparse
import atexit
import contextlib
import ctypes
import fcntl
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch

RANK_0_FIRST_S = 3.0


class UserError(Exception):
    """Usage or data that cannot be worked with: one line on stderr, exit status 2."""

    status = 2


class RunError(UserError):
    """A run that began well and failed: one line on stderr, exit status 1."""

    status = 1


class LostRankError(RunError):
    """Another process of a data-parallel run has ended: what went wrong is for that one to say."""


def torchrun_rank_and_size() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun tells them; without torchrun 0 of 1."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
        return int(rank), int(size)
    return 0, 1


def keep_freed_memory(largest: int = 2**25) -> None:
    """Keeps the memory of freed tensors of up to `largest` bytes, and has large tensors in large pages.

    A training step frees and allocates the same sizes again and again. Mapped anew each time, every page of
    them costs a fault: a quarter of all CPU time was spent there. Large pages leave a fifth of that, keeping
    what was freed leaves nothing; but the largest, which rarely fit into each other's places, would double a
    process if kept. 32 MB is the most that glibc takes. Has an effect on Linux with glibc only; large pages
    only when it is called before torch has allocated anything.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, largest)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's free end is kept


def run_script(main: Callable[[], int | None], parallel: bool = False) -> None:
    """Calls `main()` and exits with its status; what a user can cause becomes one line, never a traceback.

    Of several processes started by torchrun rank 0 speaks for all. Another one says only what is its own
    failure: it gives rank 0 some seconds to fail for the same reason, whereupon torchrun ends the others.

    Args:
        parallel: `main` knows how to be one of several processes; else rank 0 does all of the work.
    """
    name, (rank, size) = Path(sys.argv[0]).name, torchrun_rank_and_size()
    if rank and not parallel:
        sys.exit(0)

    def tell(message: str, status: int) -> int:
        if rank:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
            time.sleep(RANK_0_FIRST_S)
            message = f"rank {rank}: {message}"
        with contextlib.suppress(OSError):  # stderr may be full too
            print(f"{name}: {message}", file=sys.stderr, flush=True)
        return status

    keep_freed_memory()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until training has something to save
    try:
        with silence() if rank else contextlib.nullcontext():
            status = main() or 0
    except LostRankError as error:
        status = error.status if rank else tell(f"error: {error}", error.status)
    except UserError as error:
        status = tell(f"error: {' '.join(str(error).split())}", error.status)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        status = tell(f"error: {reason}; try a smaller --batch_size or --bptt", 1)
    except BrokenPipeError:  # `... | head`: nobody reads on
        status = 1
    except OSError as error:
        where = error.filename or (flush_or_drop(sys.stdout) and "stdout")
        reason = error.strerror or error
        status = tell(f"error: {where}: {reason}" if where else f"error: {reason}", 1)
    except KeyboardInterrupt:
        status = 130 if rank else tell("interrupted", 130)
    except SystemExit as end:  # --help, SIGTERM
        status = end.code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler that raises would disturb Python's own exit
    if size > 1:
        # Python's teardown of torch's process group (2.13) aborts now and then, and torchrun would end all.
        atexit._run_exitfuncs()
    lost = flush_or_drop(sys.stdout)
    if lost:
        tell(f"warning: stdout: {lost}; the last lines are not there", 0)
    flush_or_drop(sys.stderr)
    leave = os._exit if size > 1 else sys.exit
    leave(status or 0)


def flush_or_drop(stream: TextIO | None) -> str:
    """Writes out what was printed; a full disk drops it, and the reason is returned, else "".

    Python would try again as it exits, and end with a status of its own (120). A reader that has gone away
    (`| head`) is no reason.
    """
    try:
        if stream is not None:  # as it is when it was closed before the start
            stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return "" if isinstance(error, BrokenPipeError) else error.strerror
    return ""


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Inside nothing is printed."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


class ArgumentParser(argparse.ArgumentParser):
    """argparse's own parser, with the usage left out of error messages: one line says it."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


def number(
    kind: type[int] | type[float], least: float, most: float = math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: an int or float in `[least, most]`, smaller than `below`, and finite."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not (least <= value <= most and value < below and math.isfinite(value)):
            limit = f" and below {below:g}" if below < math.inf else f" and at most {most:g}"
            limit = "" if below == most == math.inf else limit
            raise argparse.ArgumentTypeError(f"{text} is out of range; give at least {least:g}{limit}")
        return value

    return parse


def pick_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name}: there is no such device here; use --device auto or --device cpu"
        ) from None
    return device


def write_whole(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder.

    Raises:
        OSError: the disk is full, the folder read-only, ...; `path` is then as it was before.
    """
    path = Path(path)
    remove_stale(path)
    with temporary_beside(path) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.chmod(file.name, 0o666 & ~current_umask())  # a temporary file has 0600; a model is for sharing
        os.replace(file.name, path)
    sync_folder(path)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[BinaryIO]:
    """An empty file `.NAME.*.tmp` beside `path`, gone at the end unless it was renamed.

    A lock on it, which ends with the process however that ends, tells others that its writer is alive.
    """
    while True:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed below
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        )
        with contextlib.suppress(OSError):  # a file system without locks: nothing is ever taken for stale
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):  # else another process took it for stale before the lock was on it
            break
        file.close()
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        with contextlib.suppress(OSError):  # what is still in the buffer of a full disk is not wanted
            file.close()


def remove_stale(path: Path) -> None:
    """Removes what writers of this file (and of those named after it) left that were killed in mid-write.

    Another run may write under the same name at this moment: it holds a lock on its temporary file.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            if entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp"):
                with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)


def sync_folder(path: Path) -> None:
    """Waits until the folder of `path` is on the disk: a rename or link has to survive a power loss."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def copy_whole(source: str, target: str) -> None:
    """Copies a saved model, whole or not at all: the best one of a rate that ends, say."""
    contents = Path(source).read_bytes()
    write_whole(target, lambda file: file.write(contents))


def current_umask() -> int:
    """The process's umask, which the operating system only tells by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def check_writable(path: str | Path, flag: str) -> None:
    """Raises UserError when no file can be made beside `path`: better now than after the first epoch."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give the name of a file")
    remove_stale(path)
    try:
        with temporary_beside(path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; choose a folder that can be written to") from None


def check_space(path: str | Path, size: int) -> None:
    """Raises RunError when `size` bytes (at least 1) do not fit beside `path`: full disk, quota or limit."""
    try:
        with temporary_beside(Path(path)) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}), what was there is kept; free some space "
            f"({size / 2**20:.0f} MiB are needed) or give another --save"
        ) from None


class JsonLog:
    """A log beside the model, one JSON object a line; losses in nats a token, times in seconds.

    A line that cannot be written (a full disk) is dropped: the log is not worth the run.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = path

    def write(self, kind: str, loss: float, **more: Any) -> None:
        self.line({"kind": kind, **more, "loss": loss, "ppl": ppl(loss), "bpc": loss / math.log(2)})

    def line(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError), open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line before was cut short, by a kill or a full disk
                    file.write(b"\n")
            file.write(json.dumps(entry).encode() + b"\n")


def ppl(loss: float) -> float:
    """Perplexity of a loss in nats a token; infinite rather than an overflow."""
    return math.exp(loss) if loss < 709 else math.inf


def figures(loss: float, prefix: str = "", bpc: bool = True) -> str:
    """The part of a printed line that scripts around the toolkit parse: loss, ppl and bpc (bits a token)."""
    text = f"{prefix}loss {loss:5.2f} | {prefix}ppl {ppl(loss):8.2f}"
    return f"{text} | {prefix}bpc {loss / math.log(2):8.3f}" if bpc else text
