"""Compiles, loads and launches the kernels of `qrnn.cu`. `qrnn.py` imports it for CUDA tensors only.

The text is compiled once per process and architecture by NVRTC (through pynvrtc), loaded once per device and
launched on torch's current stream of that device (through CuPy).

Shapes: T time, B batch, H hidden. S is the dtype in memory, A that of the arithmetic (float64 for float64,
else float32). Outputs are contiguous; inputs may have any strides, and are copied unless contiguous.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from products import wide

SOURCE = Path(__file__).with_name("qrnn.cu")
INSTALL = "python -m pip install -r requirements-cuda.txt"
BLOCK = 128  # threads per block: a few warps, so that B·H = 31,000 lanes still spread over all processors
OPTIONS = ["--std=c++17", "--prec-div=false"]  # division to 2 ulp: enough for σ, and no branch
NAMES = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16"}


@functools.cache
def compile_ptx(architecture: str) -> bytes:
    """`qrnn.cu` as PTX for an architecture such as "compute_90".

    Raises:
        ImportError: pynvrtc or cuda-pathfinder is missing.
        Exception: NVRTC is missing or cannot compile; of classes of pynvrtc and pathfinder.
    """
    from cuda.pathfinder import load_nvidia_dynamic_lib
    from pynvrtc.compiler import Program

    library = load_nvidia_dynamic_lib("nvrtc").abs_path
    program = Program(SOURCE.read_text(encoding="ascii"), SOURCE.name, lib_name=library)
    ptx = program.compile([f"--gpu-architecture={architecture}", *OPTIONS])
    return ptx.encode() if isinstance(ptx, str) else ptx


@functools.cache
def load_module(index: int) -> Any:
    """The kernels, loaded on CUDA device `index`: CuPy's Module."""
    import cupy

    major, minor = torch.cuda.get_device_capability(index)
    ptx = compile_ptx(f"compute_{major}{minor}")
    with torch.cuda.device(index), cupy.cuda.Device(index):
        module = cupy.cuda.function.Module()
        module.load(ptx)
    return module


@functools.cache
def find_kernel(index: int, name: str) -> Any:
    """A kernel of that module: CuPy's Function."""
    return load_module(index).get_function(name)


@functools.cache
def warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@functools.cache
def available(index: int) -> bool:
    """Whether the kernels run on CUDA device `index`; if not, one warning says why, and how to install them."""
    try:
        load_module(index)
    except ImportError as error:
        warn_once(f"the QRNN runs without its CUDA kernels, slower: {error}; to install them: {INSTALL}")
        return False
    except Exception as error:  # of NVRTC or the driver; the scan works without them
        warn_once(f"the QRNN runs without its CUDA kernels, slower: {error}; to reinstall them: {INSTALL}")
        return False
    return True


def launch(kernel: str, like: Tensor, lanes: int, *arguments: Tensor | int | None) -> None:
    """Runs `kernel` for the dtype and on the device of `like`, one thread per lane; None is a null pointer."""
    import cupy

    index = like.device.index
    function = find_kernel(index, f"{kernel}_{NAMES[like.dtype]}")
    # numpy scalars, because CuPy passes them on with their size: the kernels declare 64 bits
    values = tuple(np.int64(x) if isinstance(x, int) else np.uintp(0 if x is None else x.data_ptr()) for x in arguments)
    with torch.cuda.device(index), cupy.cuda.Device(index):
        stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(index))
        function(((lanes + BLOCK - 1) // BLOCK,), (BLOCK,), values, stream=stream)


def forward(y: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, B, 3H) of S, c0 (B, H) of A or None -> out, c (T, B, H) of S, c_last (B, H) of A."""
    T, B, H = y.shape[0], y.shape[1], y.shape[2] // 3
    y, c0 = y.contiguous(), None if c0 is None else c0.to(wide(y.dtype)).contiguous()
    out, c = y.new_empty(T, B, H), y.new_empty(T, B, H)
    c_last = y.new_empty(B, H, dtype=wide(y.dtype))
    launch("forget_mult_forward", y, B * H, y, c0, out, c, c_last, T, B, H)
    return out, c, c_last


def backward(g_out: Tensor, g_last: Tensor, y: Tensor, c: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of y (T, B, 3H) of S and c0 (B, H) of A, from those of out (T, B, H), c_last (B, H)."""
    T, B, H = c.shape
    g_out, y, c = (x.to(y.dtype).contiguous() for x in (g_out, y, c))
    g_last = g_last.to(wide(y.dtype)).contiguous()
    c0 = None if c0 is None else c0.to(wide(y.dtype)).contiguous()
    dy = torch.empty_like(y)
    dc0 = torch.empty_like(g_last)
    launch("forget_mult_backward", y, B * H, g_out, g_last, y, c, c0, dy, dc0, T, B, H)
    return dy, dc0
