"""A process of its own for a piece of work, which sleeps until it is told to do it and answers how long it took."""

import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Hashable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from utils import RunError, UserError

CONTEXT = multiprocessing.get_context("spawn")  # a fresh interpreter, whose memory is its own
Works = dict[Hashable, Callable[[], Any]]  # each call one step, or one pass over a text


def timed_ms(work: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, from an idle device to an idle device.

    Raises:
        RunError: it returns a loss that is not finite: its time would not be that of training.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        loss = work()
        end.record()
        torch.cuda.synchronize()
        elapsed_ms = start.elapsed_time(end)
    else:
        begin = time.perf_counter()
        loss = work()
        elapsed_ms = (time.perf_counter() - begin) * 1000
    if loss is not None and not math.isfinite(loss):
        raise RunError(f"the loss is {float(loss)}: no training to be timed; choose other --settings")
    return elapsed_ms


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    except OSError:  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(pipe: Connection, make: Callable[..., Works], name: str, tiny: bool, device: torch.device) -> None:
    """In the new process: the works that `make` returns, one each time it is named, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends bench.py, and that ends this
    torch.backends.cuda.matmul.allow_tf32 = True  # for all alike: cuDNN's layers have it by torch's default
    try:
        works = make(name, tiny, device)
        pipe.send("ready")
        while (wanted := pipe.recv()) != "peak":
            pipe.send(timed_ms(works[wanted], device))
        pipe.send(peak_bytes(device))
    except UserError as error:
        pipe.send(error)
    except EOFError:
        pass


class Worker:
    """A process that works for this one; use it in a `with`. `make`, `name`, `tiny`, `device`: see `serve`.

    Raises:
        RunError: the process ended; why is on stderr.
        UserError: the process's own.
    """

    def __init__(self, make: Callable[..., Works], name: str, tiny: bool, device: torch.device) -> None:
        self.what = f"{make.__name__} {name}"
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, make, name, tiny, device), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does

    def __enter__(self) -> "Worker":
        try:
            self.reply()  # "ready"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def reply(self) -> Any:
        try:
            found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            status = self.process.exitcode
            raise RunError(f"{self.what}: its process ended with status {status}; see above") from None
        if isinstance(found, UserError):
            raise found
        return found

    def ask(self, work: Hashable) -> Any:
        """Milliseconds of one call; asked for "peak", the process ends with its peak memory in bytes."""
        self.pipe.send(work)
        return self.reply()
