"""What every part needs: PyTorch-NLP on today's torch, whole files, out of memory, the device, kept memory."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
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


@pytest.mark.parametrize("suffix", [".tmp", ".7.tmp"])
def test_a_file_is_replaced_once_it_is_whole(tmp_path, suffix):
    """Until the block ends the old file is there, the new one beside it under its fixed name; then only it."""
    path, temporary = tmp_path / "m.pt", tmp_path / f"m.pt{suffix}"
    path.write_bytes(b"old")
    with replacing(path, suffix=suffix) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["m.pt"]


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
def test_what_a_killed_writer_left_is_overwritten_by_the_next(tmp_path, end):
    """A longer rest under the fixed name neither shows in the new file nor stays; nothing piles up."""
    (tmp_path / "m.pt.tmp").write_bytes(b"half of a large file")
    with contextlib.suppress(RuntimeError), replacing(tmp_path / "m.pt") as file:
        file.write(b"new")
        if end == "badly":
            raise RuntimeError
    assert os.listdir(tmp_path) == (["m.pt"] if end == "well" else [])
    assert end == "badly" or (tmp_path / "m.pt").read_bytes() == b"new"


def test_a_real_kill_leaves_the_old_file_whole(tmp_path):
    """A process that dies in the block leaves the old file and one temporary one, which the next takes over."""
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def die() -> None:
        with replacing(path) as file:
            file.write(b"x" * 10**6)
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=die)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert path.read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == ["m.pt", "m.pt.tmp"]
    with replacing(path) as file:
        file.write(b"new")
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
