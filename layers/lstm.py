"""The LSTM layer, with a faster pass over a few steps of a single column, for dynamic evaluation.

oneDNN's LSTM packs its weights at each call, which takes longer than five steps of a single column. torch's other
kernel adds a gradient of the recurrent matrix's size at every step. Here a step is a product of a matrix and a
vector, and the gradient of a weight is one product over all steps.

Shapes: T time, E input features, H hidden.
"""

from typing import Any

import torch
from torch import Tensor

from layers.recurrent import GatedLayer, Hidden
from products import outer, product

STEPS = 32  # the most for which this pass is used; oneDNN is faster for longer segments


class ShortLSTM(torch.autograd.Function):
    """x (T, E), h and c (H,) -> out (T, H), c (H,); gates in the order i, f, g, o.

    weight_ih (4H, E), weight_hh (4H, H), bias (4H,): the sum of both of torch's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, H = (h, c), len(h)
        gates = product(x, weight_ih.T, bias)  # (T, 4H)
        cells, out = x.new_empty(len(x), H), x.new_empty(len(x), H)
        for t, y in enumerate(gates):
            y.addmv_(weight_hh, h)
            y[: 2 * H].sigmoid_()
            y[2 * H : 3 * H].tanh_()
            y[3 * H :].sigmoid_()
            i, f, g, o = y.chunk(4)
            c = torch.mul(f, c, out=cells[t]).addcmul_(i, g)
            h = torch.mul(o, c.tanh(), out=out[t])
        ctx.save_for_backward(x, *first, gates, cells, out, weight_ih, weight_hh)
        return out, c.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_c: Tensor) -> tuple[Tensor, ...]:
        x, h_first, c_first, gates, cells, out, weight_ih, weight_hh = ctx.saved_tensors
        before = torch.cat([h_first[None], out[:-1]])  # (T, H), h before each step
        d_gates, d_h = torch.empty_like(gates), torch.zeros_like(h_first)
        for t in reversed(range(len(x))):
            i, f, g, o = gates[t].chunk(4)
            c_before, tanh_c = cells[t - 1] if t else c_first, cells[t].tanh()
            d_h = d_h + d_out[t]
            d_c = torch.addcmul(d_c, d_h * o, 1 - tanh_c * tanh_c)
            parts = (
                d_c * g * i * (1 - i),
                d_c * c_before * f * (1 - f),
                d_c * i * (1 - g * g),
                d_h * tanh_c * o * (1 - o),
            )
            torch.cat(parts, out=d_gates[t])
            d_c, d_h = d_c * f, torch.mv(weight_hh.T, d_gates[t])
        return product(d_gates, weight_ih), d_h, d_c, outer(d_gates, x), outer(d_gates, before), d_gates.sum(0)


class LSTM(GatedLayer):
    """Rows of the weights: input, forget, cell, output gate."""

    cell, gates, state_tensors, cudnn_mode = "LSTM", 4, 2, 2

    @staticmethod
    def kernel(x: Tensor, hidden: Hidden, weights: list[Tensor], training: bool) -> tuple[Tensor, Hidden]:
        (T, B, _), (h, c) = x.shape, hidden
        if B == 1 and T <= STEPS and x.device.type == "cpu" and torch.is_grad_enabled():
            weight_ih, weight_hh, bias_ih, bias_hh = weights
            out, c = ShortLSTM.apply(x[:, 0], h[0, 0], c[0, 0], weight_ih, weight_hh, bias_ih + bias_hh)
            return out[:, None], (out[None, -1:].clone(), c[None, None])
        # with biases, 1 layer, no dropout, one direction, time first
        out, h, c = torch.lstm(x, hidden, weights, True, 1, 0.0, training, False, False)
        return out, (h, c)
