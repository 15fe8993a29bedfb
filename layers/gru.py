"""The GRU layer, and its pass on the CPU for training: the loop over time as one autograd function.

torch's GRU builds some ten graph nodes per step on the CPU, and at every step adds a gradient of the recurrent matrix's
size. Here the gradient of a weight is one product over all steps. A step of the loops has one product and a few
elementwise operations.

    r = σ(W_r·x + b_r + U_r·h + c_r)    z = σ(W_z·x + b_z + U_z·h + c_z)
    n = tanh(W_n·x + b_n + r ⊙ (U_n·h + c_n))
    h ← (1 - z) ⊙ n + z ⊙ h                  Cho et al., arXiv 1406.1078, with the reset gate placed as in cuDNN

Shapes: T time, B batch, E input features, H hidden.
"""

from typing import Any

import torch
from torch import Tensor

from layers.recurrent import GatedLayer, Hidden, blocks_of_steps
from products import over_steps, product

COLUMNS = 64  # the most for which this pass is used in float32; with 80 torch is as fast, with 128 a tenth faster


class GRUScan(torch.autograd.Function):
    """x (T, B, E), h (B, H) -> out (T, B, H).

    weight_ih (3H, E), weight_hh (3H, H), bias_ih and bias_hh (3H,): rows in the order r, z, n. If the weights
    are in half precision, factors and results of products are rounded to it; the rest is in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
    ) -> Tensor:
        (T, B, _), H, first = x.shape, h.size(1), h
        gates = product(x.flatten(0, 1), weight_ih.T, bias_ih).view(T, B, 3 * H)
        recurrent, inner, out = x.new_empty(B, 3 * H), x.new_empty(T, B, H), x.new_empty(T, B, H)
        for t in range(T):
            recurrent = product(h, weight_hh.T, bias_hh, out=recurrent)
            gates[t, :, : 2 * H].add_(recurrent[:, : 2 * H]).sigmoid_()
            r, z, n = gates[t].chunk(3, 1)
            inner[t] = recurrent[:, 2 * H :]
            n.addcmul_(r, inner[t]).tanh_()
            h = torch.lerp(n, h, z, out=out[t])
        ctx.save_for_backward(x, first, gates, inner, out, weight_ih, weight_hh)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        x, first, gates, inner, out, weight_ih, weight_hh = ctx.saved_tensors
        before = torch.cat([first[None], out[:-1]])  # (T, B, H), h before each step

        # The derivatives of h with respect to each gate's pre-activation. The loop multiplies them by h's gradient.
        d_gates = torch.empty_like(gates)
        for y, h, recurrent_n, d_y in blocks_of_steps(gates, before, inner, d_gates):
            (r, z, n), (d_r, d_z, d_n) = y.chunk(3, 2), d_y.chunk(3, 2)
            torch.mul(1 - z, 1 - n * n, out=d_n)
            torch.mul(h - n, z * (1 - z), out=d_z)
            torch.mul(d_n * recurrent_n, r * (1 - r), out=d_r)
        r, z, _ = gates.chunk(3, 2)
        d_recurrent = d_gates.clone()  # of U·h + c: the same, but times r for the new gate n
        d_recurrent.chunk(3, 2)[2].mul_(r)

        d_hs, d_h = torch.empty_like(out), torch.zeros_like(first)
        for t in reversed(range(len(x))):
            torch.add(d_h, d_out[t], out=d_hs[t])
            d_recurrent[t].unflatten(1, (3, -1)).mul_(d_hs[t, :, None])
            d_h = torch.addcmul(product(d_recurrent[t], weight_hh), d_hs[t], z[t])
        d_gates.unflatten(2, (3, -1)).mul_(d_hs[:, :, None])

        d_rounded = d_gates.to(weight_ih.dtype)
        d_x = product(d_rounded.flatten(0, 1), weight_ih).view_as(x)
        d_weight_ih = over_steps(d_rounded, x)
        d_weight_hh = over_steps(d_recurrent.to(weight_hh.dtype), before)
        return d_x, d_h, d_weight_ih, d_weight_hh, d_gates.sum((0, 1)), d_recurrent.sum((0, 1))


class GRU(GatedLayer):
    """Rows of the weights: reset, update, new gate."""

    cell, gates, state_tensors, cudnn_mode = "GRU", 3, 1, 3

    @staticmethod
    def kernel(x: Tensor, hidden: Hidden, weights: list[Tensor], training: bool) -> tuple[Tensor, Hidden]:
        narrow = torch.is_grad_enabled() and x.size(1) <= COLUMNS
        if x.device.type == "cpu" and (narrow or weights[1].dtype != x.dtype):
            out = GRUScan.apply(x, hidden[0][0], *weights)
            return out, (out[-1:].clone(),)  # a view would keep all of `out` in memory and in the .state
        # with biases, 1 layer, no dropout, one direction, time first
        out, h = torch.gru(x, hidden[0], weights, True, 1, 0.0, training, False, False)
        return out, (h,)
