"""Matrix products on the CPU by the library that is fastest there; on other devices by torch's functions.

`torch.mm` calls MKL, which uses no more than AVX2 on AMD's processors. GFLOP/s in float32 on two cores, torch 2.13.0:

                                                     torch.mm   oneDNN, in the same build of torch
    AMD EPYC, AVX-512                                     200   430
    Intel Xeon, AVX-512                                   310   200 to 300
    AMD EPYC, AVX2: the result has rows of 8·n floats 100 to 150   80 to 130
                    rows of another length             60 to 90   90 to 130
                    the second factor is transposed   30 to 110   50 to 130

(AVX2: the first two lines for 256 rows and more, the third for 20 to 1,400.) So on AMD with AVX-512 oneDNN is used,
on AMD with AVX2 the shape decides, elsewhere `torch.mm` is used; only for the gradient of a weight over a few rows
oneDNN is the faster one everywhere. Processor and shape decide, never a timing: a resumed run repeats the bits of the
run that was cut. oneDNN is called by the operator that torch's compiler uses; a build of torch without that operator
uses `torch.mm`.

Shapes: N rows, I inputs and O outputs of a weight (O, I).
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import not_a_command

HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 32  # of the factors of a weight's gradient: with fewer, oneDNN is faster on all processors
LARGE = 2**19  # elements of the second factor; with fewer, neither library is faster


@cache
def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's product as an operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU: it needs AVX-512, and is slow without bfloat16 instructions."""
    return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The half precision that --amp names; None: none, or the processor has no bfloat16."""
    if amp == "none" or (amp == "bf16" and device.type == "cpu" and not has_bf16()):
        return None
    return torch.bfloat16 if amp == "bf16" else torch.float16


@cache
def preferred_library() -> str:
    """The library for float32 products on this processor: "oneDNN", "torch.mm", or "by shape" (one of the two)."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        amd = False
    if not amd or not has_onednn():
        return "torch.mm"
    return "oneDNN" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "by shape"


def may_use_onednn(a: Tensor) -> bool:
    """Whether some products with `a` as the first factor are computed by oneDNN."""
    return a.device.type == "cpu" and a.dtype == torch.float32 and preferred_library() != "torch.mm"


def use_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a·b is computed by oneDNN.

    "by shape" means: where MKL is slow, because the second factor is transposed (as a weight is in the forward pass)
    or because the rows of the result do not consist of whole vectors of 8 floats.
    """
    slow = b.numel() >= LARGE and (b.size(1) % 8 > 0 or b.stride(0) == 1)
    return may_use_onednn(a) and (slow or preferred_library() == "oneDNN")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a·b + bias: (N, K), (K, M), (M,) or None -> (N, M); `out`: memory that a·b may be written to, if its dtype fits.

    If b is in half precision, a and the result are rounded to it. A float32 bias is added to that in float32: then the
    result is float32.
    """
    if b.dtype in HALF:
        a = a.to(b.dtype)
    if out is not None and out.dtype != b.dtype:
        out = None
    if bias is not None and bias.dtype != a.dtype:
        return product(a, b, out=out).to(bias.dtype).add_(bias)  # adding tensors of two dtypes is slower
    if use_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a·b, in place; `first`: total = a·b. The sum has `total`'s precision, the product has b's."""
    if b.dtype == total.dtype and not use_onednn(a, b):
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(product(a, b))
    else:
        total.add_(product(a, b))


def over_steps(left: Tensor, right: Tensor) -> Tensor:
    """The gradient of a weight, summed over all steps by one product: (T, B, n), (T, B, m) -> (n, m).

    `right` is rounded if `left` is in half precision. With five rows oneDNN takes half of MKL's time.
    """
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype in HALF:
        right = right.to(left.dtype)
    if len(left) <= FEW_ROWS and left.device.type == "cpu" and left.dtype == torch.float32 and has_onednn():
        return torch.ops.mkldnn._linear_pointwise(left.T.contiguous(), right.T.contiguous(), None, "none", [], "")
    return product(left.T, right)


class LinearProducts(torch.autograd.Function):
    """x (N, I), weight (O, I), bias (O,) or None -> (N, O): `F.linear` with all three products by `product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return product(dy, weight), product(dy.T, x), dy.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by the fastest library: (..., I), (O, I), (O,) or None -> (..., O)."""
    if not may_use_onednn(x) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return LinearProducts.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """torch's linear layer; `linear` computes its products."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to calculate in for tensors of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def factor_dtype(weight: Tensor) -> torch.dtype:
    """The dtype for the factors of products: autocast's if it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def exact_or_bf16(weight: Tensor) -> torch.dtype:
    """`factor_dtype`, but never float16: a gradient divided by the number of positions would vanish in it."""
    dtype = factor_dtype(weight)
    return weight.dtype if dtype == torch.float16 else dtype


if __name__ == "__main__":
    not_a_command(__file__)
