"""The QRNN, slow and obvious: what the scan and the kernels are held against, in float64."""

import torch
from torch import Tensor


def forget_mult(f: Tensor, z: Tensor, c0: Tensor | None = None) -> Tensor:
    """c_t = f_t · z_t + (1 - f_t) · c_{t-1}: f, z (T, B, H), c0 (B, H) or None -> c (T, B, H)."""
    c, states = torch.zeros_like(z[0]) if c0 is None else c0, []
    for f_t, z_t in zip(f, z, strict=True):
        c = f_t * z_t + (1 - f_t) * c
        states.append(c)
    return torch.stack(states)


def gates(y: Tensor, c0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (T, B, 3H), z, f, o side by side, c0 (B, H) or None -> out (T, B, H), c_last (B, H)."""
    H = y.shape[2] // 3
    c = forget_mult(torch.sigmoid(y[..., H : 2 * H]), torch.tanh(y[..., :H]), c0)
    return torch.sigmoid(y[..., 2 * H :]) * c, c[-1]


def results(function, inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `function` at `inputs` taken as `dtype`, then the gradients of all inputs that are not None.

    The gradients that flow into the outputs are fixed random ones: the same for every implementation.
    """
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator).double().to(x.device)).sum() for x in outputs
    )
    gradients = torch.autograd.grad(loss, [x for x in inputs if x is not None])
    return [*outputs, *gradients]


def random_inputs(name: str, T: int, B: int, H: int, with_c0: bool, seed: int = 0) -> list[Tensor | None]:
    """Inputs, float64, of "forget_mult" (f, z, c0) or "gates" (y, c0), already rounded to what bfloat16 holds
    so that every dtype is given the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).double()

    c0 = draw(B, H) if with_c0 else None
    if name == "gates":
        return [2 * draw(T, B, 3 * H), c0]
    return [torch.rand(T, B, H, generator=generator).to(torch.bfloat16).double(), draw(T, B, H), c0]
