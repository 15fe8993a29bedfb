"""Compiles, loads and launches CUDA text: NVRTC through pynvrtc, the launches through CuPy on torch's current stream.

A text is compiled once per process, architecture and options, and loaded once per device.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

INSTALL = "python -m pip install -r requirements-cuda.txt"
OPTIONS = ("--std=c++17", "--prec-div=false")  # division to 2 ulp: enough for σ, and no branch


@functools.cache
def compile_ptx(source: Path, architecture: str, options: tuple[str, ...] = ()) -> bytes:
    """The text as PTX for an architecture such as "compute_90"; options: further ones of NVRTC.

    Raises:
        ImportError: pynvrtc or cuda-pathfinder is missing.
        Exception: NVRTC is missing or cannot compile; of classes of pynvrtc and pathfinder.
    """
    from cuda.pathfinder import load_nvidia_dynamic_lib
    from pynvrtc.compiler import Program

    library = load_nvidia_dynamic_lib("nvrtc").abs_path
    program = Program(source.read_text(encoding="utf-8"), source.name, lib_name=library)
    ptx = program.compile([f"--gpu-architecture={architecture}", *OPTIONS, *options])
    return ptx.encode() if isinstance(ptx, str) else ptx


@functools.cache
def load_module(index: int, source: Path, options: tuple[str, ...] = ()) -> Any:
    """The kernels, loaded on CUDA device `index`: CuPy's Module. Raises as `compile_ptx`, and of CuPy."""
    import cupy

    major, minor = torch.cuda.get_device_capability(index)
    ptx = compile_ptx(source, f"compute_{major}{minor}", options)
    with torch.cuda.device(index), cupy.cuda.Device(index):
        module = cupy.cuda.function.Module()
        module.load(ptx)
    return module


@functools.cache
def find_kernel(index: int, name: str, source: Path, options: tuple[str, ...] = ()) -> Any:
    """A kernel of that module: CuPy's Function."""
    return load_module(index, source, options).get_function(name)


@functools.cache
def warn_once(text: str) -> None:
    """Warns, but of the same text once per process."""
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def launch(
    function: Any, index: int, blocks: int, threads: int, arguments: tuple[Tensor | int | float | None, ...],
    shared_bytes: int = 0, cooperative: bool = False,
) -> None:  # fmt: skip
    """Starts a kernel on torch's current stream of CUDA device `index`.

    Args:
        function: from `find_kernel`.
        arguments: a tensor is passed as its address, None as a null pointer, an int with 64 bits, a float with 32.
        shared_bytes: dynamic shared memory per block.
        cooperative: all blocks run at the same time, or the launch fails.
    """
    import cupy

    with torch.cuda.device(index), cupy.cuda.Device(index):
        stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(index))
        values = tuple(by_value(x) for x in arguments)
        grid, block = (blocks,), (threads,)
        function(grid, block, values, shared_mem=shared_bytes, stream=stream, enable_cooperative_groups=cooperative)


def by_value(argument: Tensor | int | float | None) -> np.generic:
    """A numpy scalar, which CuPy passes on with its size."""
    if isinstance(argument, int):
        return np.int64(argument)
    if isinstance(argument, float):
        return np.float32(argument)
    return np.uintp(0 if argument is None else argument.data_ptr())
