"""The QRNN, slow and obvious: what the scan and the kernels are held against, in float64."""

import torch
from torch import Tensor


def forget_mult(y: Tensor, c0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (T, B, 3H), z, f, o side by side, c0 (B, H) or None -> out (T, B, H), c_last (B, H):
    c_t = σ(f_t) · tanh(z_t) + (1 - σ(f_t)) · c_{t-1} and out_t = σ(o_t) · c_t, step by step."""
    z, f, o = y.chunk(3, dim=2)
    c, out = torch.zeros_like(z[0]) if c0 is None else c0, []
    for z_t, f_t, o_t in zip(z, f, o, strict=True):
        c = torch.sigmoid(f_t) * torch.tanh(z_t) + (1 - torch.sigmoid(f_t)) * c
        out.append(torch.sigmoid(o_t) * c)
    return torch.stack(out), c


def results(function, inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `function` at `inputs` taken as `dtype`, then the gradients of all inputs that are not None.

    The gradients that flow into the outputs are fixed random ones: the same for every implementation.
    """
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator).double().to(x.device)).sum() for x in outputs)
    gradients = torch.autograd.grad(loss, [x for x in inputs if x is not None])
    return [*outputs, *gradients]


def random_inputs(T: int, B: int, H: int, with_c0: bool = True) -> list[Tensor | None]:
    """y (T, B, 3H) and c0 (B, H) or None, float64, rounded to what bfloat16 holds: the same for every dtype."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).double()

    c0 = draw(B, H) if with_c0 else None
    return [2 * draw(T, B, 3 * H), c0]
