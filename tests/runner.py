"""Scripts run as from a shell, each in a process of its own, without paying torch's import every time.

A fork server imports the dependencies once; a script then starts in a fraction of a second, and is a real
process: its own exit status, output, and signals that kill it. It has one thread, so that results repeat.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# When a run counts as hung. It takes a few seconds of processor time, and any number of seconds on a busy machine.
PROCESSOR_S = 100  # the kernel ends it
WALL_S = 500  # for one that waits for ever; pytest gives a test somewhat longer

PRELUDE = "tests/prelude.py"  # a script: the code that it is given, then another script

_started: list["Running"] = []
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch", "torch._dynamo", "utils"])  # what torch.optim imports


class Result(NamedTuple):
    """The end of a run: exit status (negative: the signal that killed it), stdout and stderr."""

    status: int
    out: str
    err: str


def assert_refused(result: Result, status: int, *named: str) -> None:
    """The status, and one line on stderr that contains all of `named`."""
    assert result.status == status, result
    assert len(result.err.splitlines()) == 1, result.err
    assert "Traceback" not in result.out + result.err
    for name in named:
        assert name in result.err, result.err


class Running:
    """A script that runs; its outputs go to two files, which can be read while it does."""

    def __init__(self, process: multiprocessing.Process, out: Path, err: Path) -> None:
        self.process, self.out, self.err = process, out, err

    def wait_for(self, seen: Callable[[str], object]) -> None:
        """Returns once `seen(stdout so far)` is true; fails when the script ends before that."""
        end = time.monotonic() + WALL_S
        while not seen(self.out.read_text()):
            alive = self.process.is_alive() and time.monotonic() < end
            assert alive or seen(self.out.read_text()), self.out.read_text() + self.err.read_text()
            time.sleep(0.002)

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended, and nobody waits for it any more
            if self.process.is_alive():  # else another process may have its number
                os.kill(self.process.pid, number)

    def result(self) -> Result:
        self.process.join(WALL_S)
        hung = f"no end after {WALL_S} s" if self.process.is_alive() else ""
        if hung:
            self.process.kill()
            self.process.join()
        elif self.process.exitcode == -signal.SIGXCPU:
            hung = f"no end after {PROCESSOR_S} s of processor time"
        assert not hung, f"{hung}:\n{self.out.read_text()}"
        return Result(self.process.exitcode, self.out.read_text(), self.err.read_text())


def start(
    *argv: object,
    cwd: Path,
    script: str = "main.py",
    file_limit: int = 0,
    memory_limit: int = 0,
    permissions: bool = False,
    environment: dict[str, str] | None = None,
) -> Running:
    """Starts `python script argv` in `cwd`.

    file_limit: bytes that fit into a file, as on a disk that is nearly full; 0: no limit.
    memory_limit: bytes of memory that it may take beside what its imports did; 0: no limit.
    permissions: file permissions stop this process, even root's.
    environment: variables of its own.
    """
    logs = cwd / ".runs"
    logs.mkdir(exist_ok=True)
    number = len(list(logs.iterdir()))
    out, err = logs / f"{number}.out", logs / f"{number}.err"
    out.touch()
    err.touch()
    line, limits = [script, *map(str, argv)], (file_limit, memory_limit)
    with _environment():
        process = _context.Process(target=_run, args=(line, cwd, out, err, limits, permissions, environment or {}))
        process.start()
    running = Running(process, out, err)
    _started.append(running)
    return running


def end_all() -> None:
    """Kills what a test that failed has left running."""
    while _started:
        _started.pop().kill(signal.SIGKILL)


def signal_itself(number: int, epoch: int, batch: int) -> str:
    """Code for `PRELUDE`: the run sends itself a signal after this batch. One from a test could come after its end."""
    return (
        "import signal, train\nstep = train.train_step\n"
        "def signalled(run, *batch):\n"
        f"    if (run.at.epoch, run.at.batch) == ({epoch}, {batch}): signal.raise_signal({int(number)})\n"
        "    return step(run, *batch)\n"
        "train.train_step = signalled"
    )


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def run_cli(*argv: object, cwd: Path, **how: object) -> Result:
    """`python main.py argv` in `cwd`, to its end; `how` as in `start`."""
    return start(*argv, cwd=cwd, **how).result()


def run_fresh(*argv: object, cwd: Path, script: str = "main.py") -> Result:
    """The same by a new interpreter: what a shell does, with hash seeds and imports of its own."""
    end = subprocess.run(
        [sys.executable, "-u", ROOT / script, *map(str, argv)],
        cwd=cwd, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=WALL_S,
    )  # fmt: skip
    return Result(end.returncode, end.stdout, end.stderr)


@contextlib.contextmanager
def _environment():
    """What the fork server inherits when the first run starts it."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(
    line: list[str],
    cwd: Path,
    out: Path,
    err: Path,
    limits: tuple[int, int],
    permissions: bool,
    environment: dict[str, str],
) -> None:
    """In the new process: the script as `__main__`, with buffers flushed at each line as by `python -u`."""
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(ENVIRONMENT | environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_S, PROCESSOR_S + 10))
    file_limit, memory_limit = limits
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if memory_limit:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory_limit, taken + memory_limit))
    if permissions:
        _give_up_override()
    sys.argv = line
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / line[0]), run_name="__main__")


def _give_up_override() -> None:
    """On Linux root writes whatever permissions say, by capabilities (bits 1 and 2) that can be given up."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
        failed = libc.capget(header, sets)
        sets[0] &= ~0b110
        failed |= libc.capset(header, sets)
        assert not failed, "capset"
