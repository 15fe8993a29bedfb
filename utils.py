"""What every part of the toolkit needs: PyTorch-NLP on today's torch, errors, whole files, device, memory.

python -c "import utils; print(utils.pick_device('auto'))"
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# `pytorch-nlp` 0.5.0 (2019) is the last release. Its `torchnlp.samplers` imports `torch._six`, which torch 2.0
# removed: this stands in for it, once, before torchnlp is imported, and only where torch has none of its own.
if "torch._six" not in sys.modules and importlib.util.find_spec("torch._six") is None:
    _six = types.ModuleType("torch._six", "Stand-in for the module that torch 2.0 removed.")
    _six.int_classes, _six.string_classes = (int,), (str, bytes)
    sys.modules["torch._six"] = _six

# "as" marks what others import from here
from torchnlp.datasets import penn_treebank_dataset as penn_treebank_dataset
from torchnlp.datasets import wikitext_2_dataset as wikitext_2_dataset
from torchnlp.encoders import LabelEncoder as LabelEncoder
from torchnlp.nn import LockedDropout as LockedDropout
from torchnlp.samplers import BPTTBatchSampler as BPTTBatchSampler


class UserError(Exception):
    """Usage or data that cannot be worked with: one line on stderr, exit status 2."""

    status = 2


class RunError(UserError):
    """A run that began well and failed: one line on stderr, exit status 1."""

    status = 1


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device: torch has no class of its own for the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "calculation overflowed")
    of_onednn = ("could not create a primitive", "could not execute a primitive")  # all that it says of it
    text = str(error)
    return isinstance(error, RuntimeError) and (text in of_onednn or any(word in text for word in words))


@contextlib.contextmanager
def replacing(path: str | Path, suffix: str = ".tmp") -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once the block has ended well: it is written whole or not at all.

    Until then it is called `path` + `suffix`. An error removes it; what a killed writer left there is
    overwritten by the next one. The rename survives a power loss. A disk that is full raises OSError.
    """
    temporary = f"{path}{suffix}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # what torch's zip writer made another error of
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def pick_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UserError: the device is not there. One that is there but full raises torch's own error.
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
        raise UserError(
            f"--device {name}: there is no such device here; use --device auto or --device cpu"
        ) from None
    return device


def use_tf32() -> None:
    """Has an NVIDIA GPU multiply float32 matrices in TF32, as torch lets it inside cuDNN's layers anyway.

    Factors are rounded to 11 bits, sums are float32. Has no effect on other devices.
    """
    torch.backends.cuda.matmul.allow_tf32 = True


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


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Nested dicts, lists and tuples with each tensor replaced by `function(tensor)`, in their order."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree
