"""The RLSTM (rewired LSTM): the forget gate reads what the input gate lets in, the output gate reads the new cell.

Melis, arXiv 2211.01848, section 2. Per step, with x and h after their dropouts and after the Mogrifier's rounds, and
with m the mask of dropoutr:

    i = σ(W_ix·x + W_ih·h + b_i)            j = tanh(W_jx·x + W_jh·h + b_j)
    f = σ(W_fu·(i ⊙ j) + W_fh·h + b_f)      c ← f ⊙ c + min(i, 1 - f) ⊙ j
    o = σ(W_oc·(c ⊙ m) + b_o)               h ← o ⊙ tanh(c)

Seven matrices for the eight of an LSTM. The rounds, and all that is not said here, are in mogrifier.py.

Shapes: T time, B batch, E the layer's input features, H hidden, R rounds, K rank of A·B.
"""

from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layers.mogrifier import (
    Mogrifier,
    before_rounds,
    differentiate_rounds,
    gate_step,
    gate_step_backward,
    round_gradients,
    take_rounds,
)
from layers.recurrent import blocks_of_steps, truncated_normal_
from products import add_product, over_steps, product


class RLSTMScan(torch.autograd.Function):
    """All steps of a layer: x (T, B, E), h and c (B, H) -> out (T, B, H), c (B, H).

    mask: (B, H), multiplied into h before each step, and into c for the output gate; or None.
    full: the rounds' matrices have full rank.
    weights: weight_ih (2H, E), weight_hh (3H, H), weight_fu (H, H), weight_oc (H, H), bias (4H,), then those of each
        round. If the four matrices are in half precision, factors and results of their products are rounded to it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, mask: Tensor | None, full: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        (T, B, _), H, first = x.shape, h.size(1), h
        (weight_ih, weight_hh, weight_fu, weight_oc, bias), rounds = weights[:5], take_rounds(weights[5:], full)
        gates = x.new_empty(T, B, 3 * H)  # i, j, f
        opened, cells, out = (x.new_empty(steps, B, H) for steps in (T, T + 1, T))  # opened: o
        cells[0] = c
        doubled = [x.new_empty(T, B, len(round.bias)) for round in rounds]  # 2σ
        inner = [x.new_empty(T, B, len(round.b)) for round in rounds if not full]  # source · A
        gates[:, :, 2 * H :], opened[:] = bias[2 * H : 3 * H], bias[3 * H :]
        if not rounds:  # W·x of all steps in one product
            gates[:, :, : 2 * H] = product(x.flatten(0, 1), weight_ih.T, bias[: 2 * H]).view(T, B, -1)
        for t in range(T):
            h, y = h if mask is None else h * mask, gates[t]
            if rounds:
                x_t, h = gate_step(rounds, x[t], h, [double[t] for double in doubled], [u[t] for u in inner])
                ij = y[:, : 2 * H]
                ij.copy_(product(x_t, weight_ih.T, bias[: 2 * H], out=ij))
            add_product(y, h, weight_hh.T)
            i, j, f = y.chunk(3, 1)
            i.sigmoid_()
            j.tanh_()
            add_product(f, i * j, weight_fu.T)
            f.sigmoid_()
            c = torch.mul(f, c, out=cells[t + 1]).addcmul_(torch.minimum(i, 1 - f), j)
            o = opened[t]
            add_product(o, c if mask is None else c * mask, weight_oc.T)
            o.sigmoid_()
            h = torch.mul(o, c.tanh(), out=out[t])
        ctx.save_for_backward(x, first, mask, gates, opened, cells, out, *doubled, *inner, *weights)
        ctx.full, ctx.rounds = full, len(rounds)
        return out, c.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        R, saved = ctx.rounds, iter(ctx.saved_tensors)
        x, first, mask, gates, opened, cells, out = islice(saved, 7)
        doubled, inner = list(islice(saved, R)), list(islice(saved, 0 if ctx.full else R))
        weight_ih, weight_hh, weight_fu, weight_oc, _ = islice(saved, 5)
        rounds, H = take_rounds(list(saved), ctx.full), out.size(2)
        before, read = torch.cat([first[None], out[:-1]]), cells[1:]  # (T, B, H): h before each step; c for o
        before, read = (before, read) if mask is None else (before.mul_(mask), read * mask)
        xs, hs = before_rounds(x, before, doubled)

        # Derivatives for all steps, which the loop multiplies by the gradients of c, h and u = i ⊙ j: of c with respect
        # to i, j and f, of u to i and j, of h to o, all before their σ or tanh, and of h with respect to c.
        d_gates, d_opened, h_by_c = torch.empty_like(gates), torch.empty_like(out), torch.empty_like(out)
        u_by_ij = torch.empty_like(gates[:, :, : 2 * H])
        blocks = blocks_of_steps(gates, opened, cells[:-1], cells[1:], d_gates, d_opened, u_by_ij, h_by_c)
        for y, o, c_before, c, d_y, d_o, d_u, d_h_c in blocks:
            (i, j, f), (d_i, d_j, d_f), (u_i, u_j) = y.chunk(3, 2), d_y.chunk(3, 2), d_u.chunk(2, 2)
            keep, tanh_c = 1 - f, c.tanh()
            free = j * (i < keep)  # the gradient of min(i, 1 - f) goes to the smaller of the two
            by_i, by_j = i * (1 - i), 1 - j * j
            torch.mul(free, by_i, out=d_i)
            torch.mul(torch.minimum(i, keep), by_j, out=d_j)
            torch.mul(c_before + (free - j), f * keep, out=d_f)
            torch.mul(j, by_i, out=u_i)
            torch.mul(i, by_j, out=u_j)
            torch.mul(tanh_c, o * (1 - o), out=d_o)
            torch.mul(o, 1 - tanh_c * tanh_c, out=d_h_c)

        d_x, d_h = torch.empty_like(x), torch.zeros_like(first)
        f, u_by_ij = gates[:, :, 2 * H :], u_by_ij.unflatten(2, (2, H))
        d_ijs, d_fs = d_gates[:, :, : 2 * H].unflatten(2, (2, H)), d_gates[:, :, 2 * H :]
        d_sums = differentiate_rounds(xs, hs, doubled)
        d_inner = [torch.empty_like(u) for u in inner]
        for t in reversed(range(len(x))):
            d_h = d_h + d_out[t]
            d_read = product(d_opened[t].mul_(d_h), weight_oc)
            d_c = torch.addcmul(d_c, d_h, h_by_c[t]).add_(d_read if mask is None else d_read * mask)
            d_u = product(d_fs[t].mul_(d_c), weight_fu)
            d_ijs[t].mul_(d_c[:, None]).addcmul_(u_by_ij[t], d_u[:, None])
            d_c, d_h = d_c * f[t], product(d_gates[t], weight_hh)
            if rounds:
                d_x[t], d_h = gate_step_backward(
                    rounds, [double[t] for double in doubled], product(d_gates[t, :, : 2 * H], weight_ih), d_h,
                    [d_sum[t] for d_sum in d_sums], [d_u[t] for d_u in d_inner],
                )  # fmt: skip
            d_h = d_h if mask is None else d_h * mask
        del h_by_c, u_by_ij
        d_rounded = d_gates.to(weight_ih.dtype)
        d_ij, d_f = d_rounded.split([2 * H, H], 2)
        if not rounds:
            d_x = product(d_ij.flatten(0, 1), weight_ih, out=d_x.flatten(0, 1)).view_as(x)
        d_weights = [over_steps(d_ij, xs[-1]), over_steps(d_rounded, hs[-1])]
        d_weights += [
            over_steps(d_f, gates[:, :, :H] * gates[:, :, H : 2 * H]),
            over_steps(d_opened.to(weight_oc.dtype), read),
        ]
        d_weights += [torch.cat([d_gates.sum((0, 1)), d_opened.sum((0, 1))])]
        return d_x, d_h, d_c, None, None, *d_weights, *round_gradients(xs, hs, inner, d_sums, d_inner)


class RLSTM(Mogrifier):
    """One layer; arguments as for a Mogrifier.

    Parameters: weight_ih (2H, E), rows i, j; weight_hh (3H, H), rows i, j, f; weight_fu, weight_oc (H, H);
    bias (4H,), rows i, j, f, o; rounds.R.
    """

    residual = True
    scan: ClassVar[type[torch.autograd.Function]] = RLSTMScan
    forget_row = 2

    def make_cell(self, input_size: int, hidden_size: int) -> None:
        self.weight_ih = nn.Parameter(torch.empty(2 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.weight_fu = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.weight_oc = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))

    @property
    def cell_tensors(self) -> list[Tensor]:
        return [self.weight_ih, self.weight_hh, self.weight_fu, self.weight_oc, self.bias]

    def reset_matrices(self) -> None:
        """Truncated normal of variance 1 / fan-in: E + H for i and j, 2H for f, which reads i ⊙ j and h, H for o."""
        E, H = self.weight_ih.size(1), self.hidden_size
        fan_ins = [(self.weight_ih, E + H), (self.weight_hh[: 2 * H], E + H), (self.weight_hh[2 * H :], 2 * H)]
        for weight, fan_in in [*fan_ins, (self.weight_fu, 2 * H), (self.weight_oc, H)]:
            truncated_normal_(weight.detach(), fan_in**-0.5)
