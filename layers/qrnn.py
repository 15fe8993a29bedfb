"""The QRNN layer: one linear product over all time steps, then a recurrence that is elementwise.

Bradbury et al., arXiv 1611.01576, section 2 ("fo-pooling"):

    z, f, o = W · [x_t, x_{t-1}] + b        window 2; with window 1, of x_t alone
    c_t     = σ(f_t) · tanh(z_t) + (1 - σ(f_t)) · c_{t-1}        ForgetMult
    out_t   = σ(o_t) · c_t

Shapes: T time, B batch, E the layer's input features, H hidden.

Everything after the product is one autograd function: a scan on the CPU, a kernel (`qrnn.cu`, launched by
`qrnn_cuda.py`) on an NVIDIA GPU. Both store tensors in their dtype, half precision included, and calculate in float32
(float64 for float64), under `torch.autocast` too: c changes by f · (z - c) per step, and with 8 bits of mantissa every
change below 1/256 of c would be lost. The carried c keeps its dtype.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.recurrent import Hidden, RecurrentLayer
from layers.weight_drop import WeightDropLinear, drop_weight
from products import Linear, wide

ALIGNED = 8  # elements: 16 bytes in half precision, 32 in float32
GRAIN = 2**15  # elements below which torch runs an elementwise operation on one thread
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # g · s · (1 - s), into an existing tensor
tanh_backward = torch.ops.aten.tanh_backward.grad_input  # g · (1 - z²), into an existing tensor


def pick_kernels(x: Tensor) -> ModuleType | None:
    """The module `qrnn_cuda` if `x` is on a CUDA device and the kernels are installed; None: use the scan."""
    if x.device.type != "cuda":
        return None
    from layers import qrnn_cuda  # not at the top: it is not needed on a CPU

    return qrnn_cuda if qrnn_cuda.available(x.device.index) else None


def steps_per_block(T: int, lanes: int, device: torch.device) -> int:
    """The number of steps, of B·H = `lanes` elements each, that form a block which fits the cache.

    torch runs a block of up to GRAIN elements on one thread, without waking others. With many cores the blocks are
    larger, so that half of the cores share the work. On a GPU the scan is a fallback, and its time is that of the
    launches: one block.
    """
    elements = GRAIN * max(1, torch.get_num_threads() // 2)
    return min(T, max(1, elements // lanes)) if device.type == "cpu" else T


def activate(y: Tensor, scratch: Tensor) -> Tensor:
    """y (S, B, 3H) -> z = tanh(y_z), keep = 1 - σ(y_f) = σ(-y_f), o = σ(y_o): (3, S, B, H) of `scratch`.

    tanh(x) is computed as 2σ(2x) - 1, with an absolute error of 1e-7: in torch that is three times as fast, because its
    tanh wakes every thread for a few thousand elements.
    """
    scratch = scratch[:, : len(y)]
    y_z, y_f, y_o = y.chunk(3, -1)  # (S, B, H), strided
    torch.mul(y_z, 2, out=scratch[0]).sigmoid_().mul_(2).sub_(1)
    torch.neg(y_f, out=scratch[1]).sigmoid_()
    torch.sigmoid(y_o, out=scratch[2])
    return scratch


def scan_forward(y: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
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
    return out, c, c[-1].clone()  # a view would keep all of c in memory


def scan_backward(g_out: Tensor, g_last: Tensor, y: Tensor, c: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of y (T, B, 3H) and c0 (B, H), from those of out (T, B, H) and c_last (B, H).

    The activations are calculated again from y, block by block in the cache. Keeping them would take as much memory as
    y.
    """
    g_out, y, c = (x.to(wide(x.dtype)) for x in (g_out, y, c))
    T, B, H = c.shape
    before = y.new_zeros(B, H) if c0 is None else c0
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    steps = steps_per_block(T, B * H, y.device)
    scratch = y.new_empty(3, steps, B, H)
    later = g_last  # the gradient that reaches c_t through c_{t+1}
    for start in reversed(range(0, T, steps)):
        block = slice(start, start + steps)
        z, keep, o = activate(y[block], scratch)
        dz, df, do = dy[block].chunk(3, -1)  # (S, B, H), strided
        dc = torch.mul(g_out[block], o, out=dz)  # the gradient of c_t, in the memory of dz for now
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
    """tanh, both sigmoids, the recurrence and the output gate in one function; see `forget_mult`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.kernels = pick_kernels(y)
        run = ctx.kernels.forward if ctx.kernels else scan_forward
        out, c, c_last = run(y, c0)
        ctx.save_for_backward(y, c.to(y.dtype), c0)
        return out.to(y.dtype), c_last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_out: Tensor, g_last: Tensor) -> tuple[Tensor, Tensor | None]:
        y, c, c0 = ctx.saved_tensors
        run = ctx.kernels.backward if ctx.kernels else scan_backward
        dy, dc0 = run(g_out, g_last, y, c, c0)
        return dy.to(y.dtype), None if c0 is None else dc0


def forget_mult(y: Tensor, c0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pointwise part of a QRNN layer in one pass (formulas at the top of the file), differentiable once.

    Args:
        y: (T, B, 3H), the result of the linear product, z, f, o side by side; any strides, T at least 1.
        c0: (B, H), c before the first step; None: zeros.

    Returns:
        out: (T, B, H), of y's dtype.
        c_last: (B, H), c after the last step, of c0's dtype.

    Raises:
        ValueError: shapes or devices do not agree; the kernels do not check them.
    """
    if y.dim() != 3 or 0 in y.shape or y.shape[2] % 3 or not y.is_floating_point():
        raise ValueError(f"y is {y.dtype} of shape {tuple(y.shape)}; floats (T, B, 3H), none 0, are needed")
    if c0 is None:
        return ForgetMult.apply(y, None)
    shape = (y.shape[1], y.shape[2] // 3)
    if c0.shape != shape:
        raise ValueError(f"c0 has shape {tuple(c0.shape)}; {shape} is needed")
    if c0.device != y.device:
        raise ValueError(f"c0 is on {c0.device}, y on {y.device}; move one of them")
    out, c_last = ForgetMult.apply(y, c0.to(wide(y.dtype)))
    return out, c_last.to(c0.dtype)


class QRNN(RecurrentLayer):
    """A QRNN layer whose whole linear weight is dropped (AWD, section 2). The first layer has window 2.

    Parameters: `linear.weight_raw` (3H, window · E) (`linear.weight` when `wdrop` is 0), rows z, f, o, columns x_t
    then x_{t-1}, and `linear.bias` (3H,).

    It carries (c (1, B, H),), with window 2 (c, last input (1, B, E)); the module itself remembers nothing.
    """

    def __init__(self, input_size: int, hidden_size: int, wdrop: float = 0.0, first: bool = False) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.window = input_size, hidden_size, 2 if first else 1
        self.wdrop = wdrop
        self.linear: nn.Linear = Linear(self.window * input_size, 3 * hidden_size)
        if wdrop:  # both are made, and draw weights, so that a seed gives the same run as in older versions
            self.linear = WeightDropLinear(self.window * input_size, 3 * hidden_size, wdrop)

    def reset_parameters(self) -> None:
        """Uniform ±1/sqrt(inputs), as in torch's linear layer."""
        bound = self.linear.in_features**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        inputs, c = x, hidden[0][0]  # (B, H)
        if self.window == 2:
            before = torch.cat([hidden[1], x[:-1]])  # x_{t-1}, (T, B, E)
            inputs = torch.cat([x, before], dim=-1)
        if self.padded:
            out, c = self.padded_pass(inputs, c)
        else:
            out, c = forget_mult(self.linear(inputs), c)
        if self.window == 1:
            return out, (c.unsqueeze(0),)
        return out, (c.unsqueeze(0), x[-1:].clone())  # a view would keep all of x in memory and in the .state

    def padded_pass(self, inputs: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The product and `forget_mult`, with H and the width of the inputs filled up to multiples of ALIGNED by zeros.

        The padding changes no value: its z and c are 0, and so are all gradients of it. Parameters keep their shapes.
        """
        H, rows, columns = self.hidden_size, -self.hidden_size % ALIGNED, -inputs.size(-1) % ALIGNED
        raw = self.linear.get_parameter("weight_raw" if self.wdrop else "weight")
        weight = drop_weight(raw, self.wdrop, self.training).unflatten(0, (3, H))  # (3, H, inputs)
        weight = F.pad(weight, (0, columns, 0, rows)).flatten(0, 1)
        bias = F.pad(self.linear.bias.unflatten(0, (3, H)), (0, rows)).flatten()
        y = F.linear(F.pad(inputs, (0, columns)), weight, bias)  # (T, B, 3·(H + rows))
        out, c = forget_mult(y, F.pad(c, (0, rows)))
        return out[..., :H], c[:, :H].clone()  # a view would keep the padding in the .state

    def init_hidden(self, batch_size: int) -> Hidden:
        bias = self.linear.bias
        c = bias.new_zeros(1, batch_size, self.hidden_size)
        return (c,) if self.window == 1 else (c, bias.new_zeros(1, batch_size, self.input_size))
