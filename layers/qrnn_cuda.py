"""Launches the kernels of `qrnn.cu`. `qrnn.py` imports it for CUDA tensors only; `nvrtc.py` compiles and loads them.

Shapes: T time, B batch, H hidden. S is the dtype in memory, A that of the arithmetic (float64 for float64,
else float32). Outputs are contiguous; inputs may have any strides, and are copied unless contiguous.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from layers import nvrtc
from products import wide

SOURCE = Path(__file__).with_name("qrnn.cu")
BLOCK = 128  # threads per block: a few warps, so that B·H = 31,000 lanes still spread over all processors
NAMES = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16"}


@functools.cache
def available(index: int) -> bool:
    """Whether the kernels run on CUDA device `index`; if not, one warning says why, and how to install them."""
    slower = "the QRNN runs without its CUDA kernels, slower"
    try:
        nvrtc.load_module(index, SOURCE)
    except ImportError as error:
        nvrtc.warn_once(f"{slower}: {error}; to install them: {nvrtc.INSTALL}")
        return False
    except Exception as error:  # of NVRTC or the driver; the scan works without them
        nvrtc.warn_once(f"{slower}: {error}; to reinstall them: {nvrtc.INSTALL}")
        return False
    return True


def launch(kernel: str, like: Tensor, lanes: int, *arguments: Tensor | int | None) -> None:
    """Runs `kernel` for the dtype and on the device of `like`, one thread per lane; None is a null pointer."""
    index = like.device.index
    function = nvrtc.find_kernel(index, f"{kernel}_{NAMES[like.dtype]}", SOURCE)
    nvrtc.launch(function, index, (lanes + BLOCK - 1) // BLOCK, BLOCK, arguments)


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
