"""Used by every part of the toolkit: PyTorch-NLP on today's torch, errors, whole files, devices, memory."""

import contextlib
import ctypes
import errno
import functools
import importlib.util
import os
import re
import secrets
import stat
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

if sys.platform != "win32":
    import fcntl

# `pytorch-nlp` 0.5.0 (2019) is the last release. Its `torchnlp.samplers` imports `torch._six`, which torch 2.0
# removed. This module takes its place, if torch has none, before torchnlp is imported below.
if "torch._six" not in sys.modules and importlib.util.find_spec("torch._six") is None:
    _six = types.ModuleType("torch._six", "Stand-in for the module that torch 2.0 removed.")
    vars(_six).update(int_classes=(int,), string_classes=(str, bytes))
    sys.modules["torch._six"] = _six

# Imported "as" themselves: other modules take these names from here, after the module above is in place.
from torchnlp.datasets import penn_treebank_dataset as penn_treebank_dataset
from torchnlp.datasets import wikitext_2_dataset as wikitext_2_dataset
from torchnlp.encoders import LabelEncoder as LabelEncoder
from torchnlp.nn import LockedDropout as LockedDropout
from torchnlp.samplers import BPTTBatchSampler as BPTTBatchSampler


class UserError(Exception):
    """Wrong usage or data: one line on stderr, exit status 2."""

    status = 2


class RunError(UserError):
    """A run that started and then failed: one line on stderr, exit status 1."""

    status = 1


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device. torch has no class of error for the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "calculation overflowed")
    onednn = ("could not create a primitive", "could not execute a primitive")  # oneDNN's words for the same
    text = str(error)
    return isinstance(error, RuntimeError) and (text in onednn or any(word in text for word in words))


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a new file that replaces `path` when the block ends without an error: whole or not at all.

    A link is followed to its target, whose mode and owner are kept. The rename survives a power loss where the file
    system can promise that. A full disk raises OSError.
    """
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if os.path.exists(target) and not os.path.isfile(target):  # or the new file would replace a device for everybody
        raise OSError(errno.EINVAL, "is a pipe or a device", target)
    with new_file_beside(target) as file:
        with contextlib.suppress(OSError):  # there is none yet; or it belongs to somebody else
            before = os.stat(target)
            os.chmod(file.name, stat.S_IMODE(before.st_mode))
            os.chown(file.name, before.st_uid, before.st_gid)
        try:
            yield file
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None  # torch's zip writer has turned an OSError into a RuntimeError
            raise
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":  # it renames no open file
            file.close()
        os.replace(file.name, target)
    sync_folder(os.path.dirname(target))


@contextlib.contextmanager
def new_file_beside(target: str) -> Iterator[BinaryIO]:
    """Opens a new file under a temporary name, TARGET.XXXXXXXX.tmp, that is removed when the block ends.

    While it is open it is locked, so that what killed writers have left is told from what is being written: that is
    removed first.
    """
    folder, name = os.path.split(target)
    remove_leftovers(folder, f"{re.escape(name)}[.][0-9a-f]{{8}}[.]tmp")
    with open(f"{target}.{secrets.token_hex(4)}.tmp", "xb") as file:  # "x": follows no link, overwrites nothing
        try_lock(file)
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):
                os.unlink(file.name)


def remove_leftovers(folder: str | Path, pattern: str) -> None:
    """Removes the files of this pattern that no process has locked."""
    with contextlib.suppress(OSError):
        for name in filter(re.compile(pattern).fullmatch, os.listdir(folder or ".")):
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.lstat(path).st_mode):
                    with open(path, "r+b") as file:
                        if try_lock(file):
                            os.unlink(path)


def try_lock(file: BinaryIO) -> bool | None:
    """Locks a file until it is closed or its process ends. False: another process has it; None: no locks here."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def sync_folder(folder: str) -> None:
    """Writes the names in a folder to the disk. Some file systems cannot; the file is there all the same."""
    try:
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        warn_unsynced(error.strerror or str(error))


@functools.cache  # says it once
def warn_unsynced(reason: str) -> None:
    consequence = "after a power loss the newest files may be missing"
    print(f"warning: the folder cannot be synced ({reason}); {consequence}", file=sys.stderr)


def pick_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UserError: there is no such device. If its memory is full, torch's error is raised.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"--device {name}: there is no such device here; use --device auto or --device cpu") from None
    return device


def use_tf32() -> None:
    """Lets an NVIDIA GPU multiply float32 matrices in TF32, as torch does inside cuDNN's layers by default.

    Factors are rounded to 11 bits, sums are float32. Has no effect on other devices.
    """
    torch.backends.cuda.matmul.allow_tf32 = True


def keep_freed_memory(largest: int = 0) -> None:
    """Keeps the memory of freed tensors of up to 32 MB, and puts large tensors into large pages.

    A training step frees and allocates the same sizes again and again. By default the system maps their memory anew
    each time, and every page costs a fault: a quarter of all CPU time. With large pages it is a twentieth, with kept
    memory nothing. The largest tensors rarely fit into each other's places: keeping them too would double the size of
    the process. 32 MB is glibc's limit. This works on Linux with glibc only; large pages only if it is called before
    torch has allocated anything.

    Args:
        largest: bytes of a step's largest tensors, if known. Above 32 MB, tensors of half their size are not kept:
            keeping them saves 1 % of time and costs 8 % of memory.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**24 if largest > 2**25 else 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's free end is kept


def not_a_command(path: str) -> None:
    """Ends a module that was started as a script, with one line on stderr and status 2."""
    name = os.path.basename(path)
    print(
        f"{name}: is a module, not a command; to train, python main.py --help (README.md has all commands)",
        file=sys.stderr,
    )
    sys.exit(2)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Nested dicts, lists and tuples with each tensor replaced by `function(tensor)`, in the same order."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


if __name__ == "__main__":
    not_a_command(__file__)
