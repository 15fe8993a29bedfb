"""The QRNN layer: one linear product over all time steps, then a recurrence that is elementwise.

Bradbury et al., arXiv 1611.01576, section 2 ("fo-pooling"):

    z, f, o = W · [x_t, x_{t-1}] + b        window 2; with window 1, of x_t alone
    c_t     = σ(f_t) · tanh(z_t) + (1 - σ(f_t)) · c_{t-1}        ForgetMult
    out_t   = σ(o_t) · c_t

Shapes: T time, B batch, E the layer's input features, H hidden.

The recurrence is a scan on the CPU, a kernel (`qrnn.cu`, launched by `qrnn_cuda.py`) on an NVIDIA GPU. Both
store what they are given, half precision included, and calculate in float32 (float64 for float64), under
`torch.autocast` too: c moves by f · (z - c) a step, and with 8 bits of mantissa whatever is below 1/256 of c
would be rounded away, step after step. The carried c keeps its own dtype.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

GRAIN = 2**15  # elements below which torch runs an elementwise operation on one thread
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # g · s · (1 - s), into an existing tensor
tanh_backward = torch.ops.aten.tanh_backward.grad_input  # g · (1 - z²), likewise


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to calculate in for tensors of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def pick_kernels(x: Tensor) -> ModuleType | None:
    """`qrnn_cuda` when `x` is on a CUDA device and the kernels can be had; None for the scan."""
    if x.device.type != "cuda":
        return None
    import qrnn_cuda  # only here: on the CPU nothing of it is loaded

    return qrnn_cuda if qrnn_cuda.available(x.device.index) else None


def scan_forward(f: Tensor, z: Tensor, c0: Tensor | None) -> Tensor:
    """f, z (T, B, H), c0 (B, H) or None -> c (T, B, H)."""
    f, z = f.to(wide(f.dtype)), z.to(wide(z.dtype))
    c = torch.empty_like(z, memory_format=torch.contiguous_format)
    before = torch.zeros_like(z[0]) if c0 is None else c0
    for t in range(len(z)):
        before = torch.lerp(before, z[t], f[t], out=c[t])
    return c


def scan_backward(
    grad: Tensor, f: Tensor, z: Tensor, c: Tensor, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of f, z (T, B, H) and c0 (B, H), from those of c (T, B, H)."""
    grad, f, z, c = (x.to(wide(x.dtype)) for x in (grad, f, z, c))
    dc = grad.clone()  # the gradient of c_t, by way of all later steps too
    keep = 1 - f
    for t in range(len(dc) - 2, -1, -1):
        dc[t].addcmul_(keep[t + 1], dc[t + 1])
    dc0 = keep[0] * dc[0]
    df = keep  # no longer needed, so its memory is
    torch.sub(z[1:], c[:-1], out=df[1:])
    df[0] = z[0] if c0 is None else z[0] - c0
    return df.mul_(dc), dc.mul_(f), dc0


def steps_per_block(T: int, lanes: int, device: torch.device) -> int:
    """How many steps of B·H = `lanes` elements to take at once: as many as keep a block in the cache.

    A block of GRAIN elements costs no thread a wake-up, either. With many cores the blocks grow, so that
    half of them share the work. On a GPU, where the scan is a fallback, launches are what costs: one block.
    """
    elements = GRAIN * max(1, torch.get_num_threads() // 2)
    return min(T, max(1, elements // lanes)) if device.type == "cpu" else T


def activate(y: Tensor, scratch: Tensor) -> Tensor:
    """y (S, B, 3H) -> z = tanh(y_z), keep = 1 - σ(y_f) = σ(-y_f), o = σ(y_o): (3, S, B, H) of `scratch`.

    tanh(x) is 2σ(2x) - 1 here: as good as its absolute error (1e-7), three times as fast in torch, whose
    tanh also wakes every thread for a few thousand elements.
    """
    scratch = scratch[:, : len(y)]
    y_z, y_f, y_o = y.chunk(3, -1)  # (S, B, H), strided
    torch.mul(y_z, 2, out=scratch[0]).sigmoid_().mul_(2).sub_(1)
    torch.neg(y_f, out=scratch[1]).sigmoid_()
    torch.sigmoid(y_o, out=scratch[2])
    return scratch


def gates_forward(y: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, B, 3H), c0 (B, H) or None -> out, c (T, B, H), c_last (B, H)."""
    y = y.to(wide(y.dtype))
    T, B, H = len(y), y.shape[1], y.shape[2] // 3
    c, out = y.new_empty(T, B, H), y.new_empty(T, B, H)
    before = y.new_zeros(B, H) if c0 is None else c0
    steps = steps_per_block(T, B * H, y.device)
    scratch = y.new_empty(3, steps, B, H)
    for start in range(0, T, steps):
        block = slice(start, start + steps)
        z, keep, o = activate(y[block], scratch)  # (S, B, H)
        for c_t, z_t, keep_t in zip(c[block], z, keep, strict=True):
            before = torch.lerp(z_t, before, keep_t, out=c_t)
        torch.mul(o, c[block], out=out[block])
    return out, c, c[-1].clone()  # a clone: the carried state must not hold on to all of c


def gates_backward(
    g_out: Tensor, g_last: Tensor, y: Tensor, c: Tensor, c0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of y (T, B, 3H) and c0 (B, H), from those of out (T, B, H) and c_last (B, H).

    The activations are calculated again from y: a block's fit in the cache, while those of all T steps
    would have to be kept beside y or written over it.
    """
    g_out, y, c = (x.to(wide(x.dtype)) for x in (g_out, y, c))
    T, B, H = c.shape
    before = y.new_zeros(B, H) if c0 is None else c0
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    steps = steps_per_block(T, B * H, y.device)
    scratch = y.new_empty(3, steps, B, H)
    later = g_last  # what reaches c_t by way of c_{t+1}
    for start in reversed(range(0, T, steps)):
        block = slice(start, start + steps)
        z, keep, o = activate(y[block], scratch)
        dz, df, do = dy[block].chunk(3, -1)  # (S, B, H), strided
        dc = torch.mul(g_out[block], o, out=dz)  # the gradient of c_t, for now in the place of z's
        dc[-1].add_(later)
        for t in range(len(dc) - 2, -1, -1):
            dc[t].addcmul_(keep[t + 1], dc[t + 1])
        later = keep[0] * dc[0]
        torch.sub(z[1:], c[block][:-1], out=df[1:])
        torch.sub(z[0], c[start - 1] if start else before, out=df[0])
        sigmoid_backward(df.mul_(dc), keep, grad_input=df)
        tanh_backward(dz.addcmul_(dz, keep, value=-1), z, grad_input=dz)  # from dc · (1 - keep)
        sigmoid_backward(torch.mul(g_out[block], c[block], out=do), o, grad_input=do)
    return dy, later


class ForgetMult(torch.autograd.Function):
    """c_t = f_t · z_t + (1 - f_t) · c_{t-1}; see `forget_mult`."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, z: Tensor, c0: Tensor | None) -> Tensor:
        ctx.kernels = pick_kernels(z)
        run = ctx.kernels.forget_mult_forward if ctx.kernels else scan_forward
        c = run(f, z, c0).to(z.dtype)
        ctx.save_for_backward(f, z, c, c0)
        return c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        f, z, c, c0 = ctx.saved_tensors
        run = ctx.kernels.forget_mult_backward if ctx.kernels else scan_backward
        df, dz, dc0 = run(grad, f, z, c, c0)
        return df.to(f.dtype), dz.to(z.dtype), None if c0 is None else dc0


class QRNNGates(torch.autograd.Function):
    """tanh, both sigmoids, the recurrence and the output gate in one; see `qrnn_gates`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.kernels = pick_kernels(y)
        run = ctx.kernels.gates_forward if ctx.kernels else gates_forward
        out, c, c_last = run(y, c0)
        ctx.save_for_backward(y, c.to(y.dtype), c0)
        return out.to(y.dtype), c_last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_out: Tensor, g_last: Tensor) -> tuple[Tensor, Tensor | None]:
        y, c, c0 = ctx.saved_tensors
        run = ctx.kernels.gates_backward if ctx.kernels else gates_backward
        dy, dc0 = run(g_out, g_last, y, c, c0)
        return dy.to(y.dtype), None if c0 is None else dc0


def check(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError unless `x` has this shape and lies where `like` lies: kernels trust what they get."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {shape} is needed")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the rest on {like.device}; move one of them")


def forget_mult(f: Tensor, z: Tensor, c0: Tensor | None = None) -> Tensor:
    """c_t = f_t · z_t + (1 - f_t) · c_{t-1} (Bradbury et al., equation 4), differentiable once.

    Args:
        f, z: (T, B, H), any strides, T at least 1.
        c0: (B, H), the state before the first step; None for zeros.

    Returns:
        c: (T, B, H), of the dtype of f and z.

    Raises:
        ValueError: shapes or devices do not agree.
    """
    if z.dim() != 3 or 0 in z.shape or not z.is_floating_point():
        raise ValueError(f"z is {z.dtype} of shape {tuple(z.shape)}; floats (T, B, H), none 0, are needed")
    check("f", f, tuple(z.shape), z)
    dtype = torch.promote_types(f.dtype, z.dtype)
    if c0 is not None:
        check("c0", c0, tuple(z.shape[1:]), z)
        c0 = c0.to(wide(dtype))
    return ForgetMult.apply(f.to(dtype), z.to(dtype), c0)


def qrnn_gates(y: Tensor, c0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pointwise part of a QRNN layer in one pass (formulas at the top of the file), differentiable once.

    Args:
        y: (T, B, 3H), what the linear product gives, z, f, o side by side; any strides, T at least 1.
        c0: (B, H), the state before the first step; None for zeros.

    Returns:
        out: (T, B, H), of y's dtype.
        c_last: (B, H), the state after the last step, of c0's dtype.

    Raises:
        ValueError: shapes or devices do not agree.
    """
    if y.dim() != 3 or 0 in y.shape or y.shape[2] % 3 or not y.is_floating_point():
        raise ValueError(f"y is {y.dtype} of shape {tuple(y.shape)}; floats (T, B, 3H), none 0, are needed")
    if c0 is None:
        return QRNNGates.apply(y, None)
    check("c0", c0, (y.shape[1], y.shape[2] // 3), y)
    out, c_last = QRNNGates.apply(y, c0.to(wide(y.dtype)))
    return out, c_last.to(c0.dtype)


class QRNNLayer(nn.Module):
    """One QRNN layer: `linear.weight` (3H, window · E), rows z, f, o and columns x_t then x_{t-1}, and
    `linear.bias` (3H,).

    The state is (c (1, B, H),), with window 2 (c, last input (1, B, E)): what a batch needs of the one
    before it travels with the state, and the module remembers nothing.
    """

    def __init__(self, input_size: int, hidden_size: int, window: int = 1) -> None:
        super().__init__()
        if window not in (1, 2):
            raise ValueError(f"window {window}: a QRNN layer looks at 1 or 2 inputs a step")
        self.input_size, self.hidden_size, self.window = input_size, hidden_size, window
        self.linear = nn.Linear(window * input_size, 3 * hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (T, B, E) and the state of the batch before -> out (T, B, H) and the state to carry."""
        if self.window == 1:
            (c,) = state
            out, c = qrnn_gates(self.linear(x), c[0])
            return out, (c.unsqueeze(0),)
        c, x_last = state
        before = torch.cat([x_last, x[:-1]])  # x_{t-1}, (T, B, E)
        out, c = qrnn_gates(self.linear(torch.cat([x, before], dim=-1)), c[0])
        return out, (c.unsqueeze(0), x[-1:].clone())  # a clone: a saved state must not drag x along

    def init_state(self, batch_size: int) -> tuple[Tensor, ...]:
        """Zeros, of the parameters' dtype and device."""
        bias = self.linear.bias
        c = bias.new_zeros(1, batch_size, self.hidden_size)
        return (c,) if self.window == 1 else (c, bias.new_zeros(1, batch_size, self.input_size))
