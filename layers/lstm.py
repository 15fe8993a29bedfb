"""The LSTM layer, with a second pass for the CPU where torch's is slow.

That is a few steps of a single column, as in dynamic evaluation: oneDNN's LSTM packs its weights at each call, which
takes longer than five such steps, and torch's other kernel adds a gradient of the recurrent matrix's size at every
step. And it is training in bfloat16, where torch's LSTM would round the state c at every step. Here a step is one
product, and the gradient of a weight is one product over all steps.

Shapes: T time, B batch, E input features, H hidden.
"""

from typing import Any

import torch
from torch import Tensor

from layers.recurrent import GatedLayer, Hidden, blocks_of_steps
from products import add_product, over_steps, product

STEPS = 32  # of a single column: the most for which this pass is used in float32; for more oneDNN is faster


class LSTMScan(torch.autograd.Function):
    """x (T, B, E), h and c (B, H) -> out (T, B, H), c (B, H); gates in the order i, f, g, o.

    weight_ih (4H, E), weight_hh (4H, H), bias (4H,): the sum of both of torch's. If the weights are in half precision,
    factors and results of products are rounded to it; state, sums and elementwise work are in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        (T, B, _), H, first = x.shape, h.size(1), h
        ctx.single = B == 1 and weight_hh.dtype == h.dtype  # a step is a product of a matrix and a vector
        gates = product(x.flatten(0, 1), weight_ih.T, bias).view(T, B, 4 * H)
        cells, out = x.new_empty(T + 1, B, H), x.new_empty(T, B, H)
        cells[0] = c
        for t, y in enumerate(gates):
            if ctx.single:
                y[0].addmv_(weight_hh, h[0])
            else:
                add_product(y, h, weight_hh.T)
            y[:, : 2 * H].sigmoid_()
            y[:, 2 * H : 3 * H].tanh_()
            y[:, 3 * H :].sigmoid_()
            i, f, g, o = y.chunk(4, 1)
            c = torch.mul(f, c, out=cells[t + 1]).addcmul_(i, g)
            h = torch.mul(o, c.tanh(), out=out[t])
        ctx.save_for_backward(x, first, gates, cells, out, weight_ih, weight_hh)
        return out, c.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_c: Tensor) -> tuple[Tensor, ...]:
        x, first, gates, cells, out, weight_ih, weight_hh = ctx.saved_tensors
        before, H = torch.cat([first[None], out[:-1]]), out.size(2)  # (T, B, H), h before each step

        # The derivatives of c with respect to i, f and g, of h with respect to o, all before their σ or tanh, and of h
        # with respect to c. The loop multiplies them by the gradients of c and h.
        d_gates, h_by_c = torch.empty_like(gates), torch.empty_like(out)
        for y, c_before, c, d_y, d_h_c in blocks_of_steps(gates, cells[:-1], cells[1:], d_gates, h_by_c):
            (i, f, g, o), (d_i, d_f, d_g, d_o) = y.chunk(4, 2), d_y.chunk(4, 2)
            tanh_c = c.tanh()
            torch.mul(g, i * (1 - i), out=d_i)
            torch.mul(c_before, f * (1 - f), out=d_f)
            torch.mul(i, 1 - g * g, out=d_g)
            torch.mul(tanh_c, o * (1 - o), out=d_o)
            torch.mul(o, 1 - tanh_c * tanh_c, out=d_h_c)

        f, d_ifg, d_os = gates[:, :, H : 2 * H], d_gates[:, :, : 3 * H].unflatten(2, (3, H)), d_gates[:, :, 3 * H :]
        d_h = torch.zeros_like(first)
        for t in reversed(range(len(x))):
            d_h = d_h + d_out[t]
            d_c = torch.addcmul(d_c, d_h, h_by_c[t])
            d_ifg[t].mul_(d_c[:, None])
            d_os[t].mul_(d_h)
            d_c = d_c * f[t]
            d_h = torch.mv(weight_hh.T, d_gates[t, 0])[None] if ctx.single else product(d_gates[t], weight_hh)
        del h_by_c
        d_rounded = d_gates.to(weight_ih.dtype)
        d_x = product(d_rounded.flatten(0, 1), weight_ih).view_as(x)
        return d_x, d_h, d_c, over_steps(d_rounded, x), over_steps(d_rounded, before), d_gates.sum((0, 1))


class LSTM(GatedLayer):
    """Rows of the weights: input, forget, cell, output gate."""

    cell, gates, state_tensors, cudnn_mode = "LSTM", 4, 2, 2

    @staticmethod
    def kernel(x: Tensor, hidden: Hidden, weights: list[Tensor], training: bool) -> tuple[Tensor, Hidden]:
        (T, B, _), (h, c) = x.shape, hidden
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        short = B == 1 and T <= STEPS and torch.is_grad_enabled()
        if x.device.type == "cpu" and (short or weight_hh.dtype != x.dtype):
            out, c = LSTMScan.apply(x, h[0], c[0], weight_ih, weight_hh, bias_ih + bias_hh)
            return out, (out[-1:].clone(), c[None])
        # with biases, 1 layer, no dropout, one direction, time first
        out, h, c = torch.lstm(x, hidden, weights, True, 1, 0.0, training, False, False)
        return out, (h, c)
