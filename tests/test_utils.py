"""What every part needs: PyTorch-NLP on today's torch, whole files, out of memory, the device, kept memory."""

import contextlib
import ctypes
import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest
import torch
from runner import ROOT, run_cli
from toys import file_limit

import utils
from utils import RunError, UserError, keep_freed_memory, map_tensors, out_of_memory, pick_device, replacing


def python(code: str) -> str:
    """What a new interpreter prints that runs `code` in the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


# PyTorch-NLP


def test_importing_utils_mends_torchnlp():
    """`torchnlp.samplers` fails on today's torch; after `import utils` it does not."""
    code = """
try:
    import torchnlp.samplers
except ModuleNotFoundError as error:
    print(error.name)
import utils
from torchnlp.samplers import BPTTBatchSampler
print(BPTTBatchSampler is utils.BPTTBatchSampler)
"""
    assert python(code) == "torch._six\nTrue\n"


def test_a_stand_in_of_somebody_else_is_left_alone():
    """Another library's `torch._six`, or our own when utils is loaded again, stays what it is."""
    code = """
import importlib, sys, types, torch
six = sys.modules["torch._six"] = types.ModuleType("torch._six")
six.int_classes, six.string_classes = (int,), (str,)
import utils
importlib.reload(utils)
print(sys.modules["torch._six"] is six)
"""
    assert python(code) == "True\n"


def test_exit_statuses():
    """2 for usage and data, 1 for a run that failed; one handler catches both."""
    assert (UserError.status, RunError.status) == (2, 1)
    assert issubclass(RunError, UserError)


# Whole files


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    with replacing(path) as file:
        fill(file)


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    """Until the block ends the old file is there, the new one beside it under a name of its own; then only it."""
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    with replacing(path) as file, replacing(path) as other:
        file.write(b"new")
        other.write(b"newer")
        assert path.read_bytes() == b"old"
        assert len({file.name, other.name, str(path)}) == len(os.listdir(tmp_path)) == 3
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_link_is_followed_and_the_mode_kept(tmp_path):
    """A link stays one, also where its target is not there yet; what others have put at old fixed names stays."""
    (tmp_path / "disk").mkdir()
    target, link, victim = tmp_path / "disk" / "m.pt", tmp_path / "m.pt", tmp_path / "victim"
    link.symlink_to(target)
    victim.write_bytes(b"precious")
    (tmp_path / "m.pt.tmp").symlink_to(victim)
    for mode in (0o600, 0o640):
        with replacing(link) as file:
            file.write(b"new")
        assert link.is_symlink()
        assert target.read_bytes() == b"new"
        target.chmod(mode)
    with replacing(link) as file:
        file.write(b"newer")
    assert (target.stat().st_mode & 0o777, target.read_bytes(), victim.read_bytes()) == (0o640, b"newer", b"precious")
    assert sorted(os.listdir(tmp_path)) == ["disk", "m.pt", "m.pt.tmp", "victim"]
    assert os.listdir(tmp_path / "disk") == ["m.pt"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_never_replaced(tmp_path, make):
    """By a link neither: /dev/null would be a file from then on."""
    make(tmp_path / "odd")
    (tmp_path / "link").symlink_to(tmp_path / "odd")
    for name in ("odd", "link"):
        with pytest.raises(OSError, match=r"is a pipe or a device|Is a directory"):
            write(tmp_path / name, lambda file: pytest.fail("the block is not entered"))
    assert not (tmp_path / "odd").is_file()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced_costs_a_warning_at_most(tmp_path, monkeypatch, capsys, number):
    """Once in all; the files are there."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    utils.warn_unsynced.cache_clear()
    for name in ("a", "b"):
        with replacing(tmp_path / name) as file:
            file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_removes_the_temporary_file_and_keeps_the_old_one(tmp_path, error):
    """Whatever goes wrong in the block is raised as it is; nothing is left of the new file."""
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.pt"]


@pytest.mark.parametrize("end", ["well", "badly"])
def test_what_killed_writers_left_is_removed_by_the_next(tmp_path, end):
    """Real kills: the old file stays whole, and one that is still being written by a living process is not touched."""
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def die() -> None:
        with replacing(path) as file:
            file.write(b"x" * 10**6)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    with replacing(path) as living:
        for _ in range(2):
            process = multiprocessing.get_context("fork").Process(target=die)
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert path.read_bytes() == b"old"
            assert len(os.listdir(tmp_path)) == 3  # the second one has removed what the first one left
        with contextlib.suppress(RuntimeError), replacing(path) as file:
            file.write(b"new")
            if end == "badly":
                raise RuntimeError
        assert sorted(os.listdir(tmp_path)) == sorted(["m.pt", os.path.basename(living.name)])
        assert path.read_bytes() == (b"new" if end == "well" else b"old")
    assert os.listdir(tmp_path) == ["m.pt"]


def test_the_data_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """fsync of the file, rename, fsync of the folder, in this order; a path without a folder works too."""
    done, folder = [], os.stat(tmp_path).st_ino
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        status = os.fstat(descriptor)
        done.append("folder" if status.st_ino == folder else f"file of {status.st_size}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("rename") or replace(*paths))
    monkeypatch.chdir(tmp_path)
    for path in ("m.pt", tmp_path / "m.pt"):
        with replacing(path) as file:
            file.write(b"new")
        assert done == ["file of 3", "rename", "folder"]
        done.clear()


@pytest.mark.parametrize("sizes", [[4800], [25_000], [2500] * 10, [2500, 25_000]])
def test_a_full_disk_is_an_os_error(tmp_path, sizes):
    """Wherever in the file the room ends: torch's writer makes a RuntimeError of some of them."""
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    tensors = [torch.zeros(size) for size in sizes]
    with file_limit(20_000), pytest.raises(OSError, match="File too large"):
        write(path, lambda file: torch.save(tensors, file))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    """Its name is in the error; a RuntimeError of the block's own stays one."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write(tmp_path / "nowhere" / "m.pt", lambda file: pytest.fail("the block is not entered"))
    with pytest.raises(RuntimeError, match="shape"):
        write(tmp_path / "m.pt", lambda file: torch.empty(2).view(3))


# Memory and devices


@pytest.mark.parametrize(
    ("allocate", "yes"),
    [
        (lambda: torch.empty(2**45), True),
        (lambda: torch.empty(2**62), True),
        (lambda: np.empty(2**45), True),
        (lambda: torch.empty(2).view(3), False),
        (lambda: {}["key"], False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(allocate, yes):
    """torch's and numpy's own failures to allocate, and sizes past what can be counted."""
    with pytest.raises((RuntimeError, MemoryError, KeyError)) as caught:
        allocate()
    assert out_of_memory(caught.value) == yes
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


def test_the_device_is_the_one_asked_for():
    """`cpu` always; `auto` the best there is."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == best


@pytest.mark.parametrize("name", ["cuda:99", "meta", "xpu", "gpu", ""])
def test_a_device_that_is_not_there_is_named(name):
    """Absent, of a kind that cannot train, or no device at all: one line that says what to do."""
    with pytest.raises(UserError, match=f"^--device {name}: there is no such device here; use --device auto"):
        pick_device(name)


def test_a_device_that_is_full_is_not_called_absent(monkeypatch):
    """torch's own error passes, for whoever knows what to say of memory."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError):
        pick_device("cpu")


def test_freed_memory_is_kept(monkeypatch):
    """glibc is told to take tensors of up to 32 MB from its heap and to keep the heap's free end, torch to use
    large pages. (How many page faults that saves depends on the machine at the moment: no claim for a test.)"""
    told = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: told.append(option)))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    keep_freed_memory()
    assert told == [(-3, 2**25), (-1, 2**31 - 1)]  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_map_tensors_changes_tensors_and_nothing_else():
    """Dicts, lists and tuples keep kind, keys and order; tensors are visited in it."""
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    seen = []
    found = map_tensors(lambda x: seen.append(x) or len(x), {"a": [a, (b, "s")], "c": c, "n": None})
    assert found == {"a": [1, (2, "s")], "c": 3, "n": None}
    assert isinstance(found["a"][1], tuple)
    assert [x is y for x, y in zip(seen, (a, b, c), strict=True)] == [True] * 3


MODULES = ("train", "evaluate", "model", "splitcross", "mos", "data", "optim", "products", "surprisal", "utils")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_is_run_says_that_it_is_no_command(name, tmp_path):
    result = run_cli(cwd=tmp_path, script=f"{name}.py")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"{name}.py: is a module, not a command; ")
    assert result.err.count("\n") == 1


def test_every_file_at_the_top_is_a_command_or_says_that_it_is_none():
    """A command's docstring says so by a line that runs it; a module's has none."""
    for path in ROOT.glob("*.py"):
        runs = f"\n    python {path.name} " in path.read_text(encoding="utf-8").partition("import ")[0]
        assert runs != (path.stem in MODULES), path.name
