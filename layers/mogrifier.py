"""The Mogrifier LSTM: input and state gate each other in rounds, before the LSTM's gates are computed.

Melis, Kočiský, Blunsom, arXiv 1909.01792, section 2; the cell is that of Melis, Dyer, Blunsom, arXiv 1707.05589.
Per step, with x and h after their dropouts:

    for r = 0 .. R-1:    even r:  x ← 2σ(h·A_r·B_r + b_r) ⊙ x      odd r:  h ← 2σ(x·A_r·B_r + b_r) ⊙ h
    i, f, g, o = W·[x, h] + b                                      R = 0: Melis's LSTM
    c ← σ(f) ⊙ c + min(σ(i), 1 - σ(f)) ⊙ tanh(g)
    h ← σ(o) ⊙ tanh(c)

Shapes: T time, B batch, E the layer's input features, H hidden, R rounds, K rank of A·B.

The loop over time is one autograd function, without graph nodes per step. It keeps the gates, 2σ of the rounds, and c.
The backward pass first differentiates the gates of all steps, a block of steps at a time; then its loop only
multiplies. The gradient of a weight is one product over all steps.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from layers import persistent
from layers.recurrent import Hidden, RecurrentLayer, blocks_of_steps, truncated_normal_
from products import add_product, exact_or_bf16, over_steps, product


class Round(NamedTuple):
    """The weights of a round, which computes σ(source · A · B + bias)."""

    a: Tensor | None  # (from, K); None: B is a matrix of full rank
    b: Tensor  # (K, to), or (from, to)
    bias: Tensor  # (to,)


def take_rounds(weights: Sequence[Tensor], full: bool) -> list[Round]:
    """The rounds of their weights in a row; `full`: the matrices have full rank."""
    size = 2 if full else 3
    parts = [weights[k : k + size] for k in range(0, len(weights), size)]
    return [Round(None, b=part[0], bias=part[1]) if full else Round(*part) for part in parts]


def gate_step(
    rounds: list[Round], x: Tensor, h: Tensor, doubled: Sequence[Tensor], inner: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """All rounds of one step: x (B, E) and h (B, H) before -> after.

    Writes what the backward pass needs: `doubled` (B, to), 2σ, and of low-rank rounds `inner` (B, K), source · A.
    """
    for r, (a, b, bias) in enumerate(rounds):
        source = x if r % 2 else h
        source = source if a is None else torch.mm(source, a, out=inner[r])
        double = torch.addmm(bias, source, b, out=doubled[r]).sigmoid_().mul_(2)
        x, h = (x, h * double) if r % 2 else (x * double, h)
    return x, h


def before_rounds(x: Tensor, h: Tensor, doubled: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """x and h of all steps before every round and after the last one: R + 1 of each."""
    xs, hs = [x], [h]
    for r, double in enumerate(doubled):
        xs.append(xs[-1] if r % 2 else xs[-1] * double)
        hs.append(hs[-1] * double if r % 2 else hs[-1])
    return xs, hs


def differentiate_rounds(xs: list[Tensor], hs: list[Tensor], doubled: list[Tensor]) -> list[Tensor]:
    """The derivatives of every round's result with respect to its pre-activation, of all steps: (T, B, to)."""
    derivatives = [torch.empty_like(double) for double in doubled]
    for r, (double, derivative) in enumerate(zip(doubled, derivatives, strict=True)):
        for value, y, d in blocks_of_steps((hs if r % 2 else xs)[r], double, derivative):
            torch.mul(value * y, 1 - y / 2, out=d)
    return derivatives


def gate_step_backward(
    rounds: list[Round], doubled: list[Tensor], d_x: Tensor, d_h: Tensor, d_sums: list[Tensor], d_inner: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of x and h after all rounds of one step -> before them.

    `d_sums` (B, to): the derivatives of `differentiate_rounds`, which become the gradients of the pre-activations.
    Writes `d_inner` (B, K), the gradients of source · A.
    """
    for r in reversed(range(len(rounds))):
        d = d_h if r % 2 else d_x
        d_sum, (a, b, _) = d_sums[r].mul_(d), rounds[r]
        d_source = d_sum @ b.T if a is None else torch.mm(d_sum, b.T, out=d_inner[r]) @ a.T
        d_gated = d * doubled[r]
        d_x, d_h = (d_x + d_source, d_gated) if r % 2 else (d_gated, d_h + d_source)
    return d_x, d_h


def round_gradients(
    xs: list[Tensor], hs: list[Tensor], inner: list[Tensor], d_sums: list[Tensor], d_inner: list[Tensor]
) -> list[Tensor]:
    """The gradients of the rounds' weights in a row; `xs`, `hs`: those of `before_rounds`, of all steps."""
    gradients = []
    for r, d_sum in enumerate(d_sums):
        source = xs[r] if r % 2 else hs[r]
        if inner:
            gradients += [over_steps(source, d_inner[r]), over_steps(inner[r], d_sum)]
        else:
            gradients += [over_steps(source, d_sum)]
        gradients += [d_sum.sum((0, 1))]
    return gradients


class MogrifierScan(torch.autograd.Function):
    """All steps of a layer: x (T, B, E), h and c (B, H) -> out (T, B, H), c (B, H).

    mask: (B, H), multiplied into h before each step; or None.
    full: the rounds' matrices have full rank.
    weights: weight_ih (4H, E), weight_hh (4H, H), bias (4H,), then those of each round. If the two matrices are in
        half precision, factors and results of their products are rounded to it; all else is in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, mask: Tensor | None, full: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        (T, B, _), H, (weight_ih, weight_hh, bias) = x.shape, h.size(1), weights[:3]
        rounds, first = take_rounds(weights[3:], full), h
        gates, cells, out = x.new_empty(T, B, 4 * H), x.new_empty(T + 1, B, H), x.new_empty(T, B, H)
        cells[0] = c
        doubled = [x.new_empty(T, B, len(round.bias)) for round in rounds]  # 2σ
        inner = [x.new_empty(T, B, len(round.b)) for round in rounds if not full]  # source · A
        if not rounds:  # W·x of all steps in one product
            gates = product(x.flatten(0, 1), weight_ih.T, bias, out=gates.view(T * B, -1)).view_as(gates)
        for t in range(T):
            h, y = h if mask is None else h * mask, gates[t]
            if rounds:
                x_t, h = gate_step(rounds, x[t], h, [double[t] for double in doubled], [u[t] for u in inner])
                y.copy_(product(x_t, weight_ih.T, bias, out=y))
            add_product(y, h, weight_hh.T)
            y[:, : 2 * H].sigmoid_()
            y[:, 2 * H : 3 * H].tanh_()
            y[:, 3 * H :].sigmoid_()
            i, f, g, o = y.chunk(4, 1)
            c = torch.mul(f, c, out=cells[t + 1]).addcmul_(torch.minimum(i, 1 - f), g)
            h = torch.mul(o, c.tanh(), out=out[t])
        ctx.save_for_backward(x, first, mask, gates, cells, out, *doubled, *inner, *weights)
        ctx.full, ctx.rounds = full, len(rounds)
        return out, c.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        R, saved = ctx.rounds, iter(ctx.saved_tensors)
        x, first, mask, gates, cells, out = islice(saved, 6)
        doubled, inner = list(islice(saved, R)), list(islice(saved, 0 if ctx.full else R))
        weights = list(saved)
        (weight_ih, weight_hh), rounds = weights[:2], take_rounds(weights[3:], ctx.full)
        before = torch.cat([first[None], out[:-1]])  # (T, B, H), h before each step
        xs, hs = before_rounds(x, before if mask is None else before.mul_(mask), doubled)

        # The derivatives of c with respect to i, f and g, of h with respect to o, all before their σ or tanh, and of h
        # with respect to c. The loop multiplies them by the gradients of c and h.
        d_gates, h_by_c = torch.empty_like(gates), torch.empty_like(out)
        for y, c_before, c, d_y, d_h_c in blocks_of_steps(gates, cells[:-1], cells[1:], d_gates, h_by_c):
            (i, f, g, o), (d_i, d_f, d_g, d_o) = y.chunk(4, 2), d_y.chunk(4, 2)
            keep, tanh_c = 1 - f, c.tanh()
            free = g * (i < keep)  # the gradient of min(i, 1 - f) goes to the smaller of the two
            torch.mul(free, i * (1 - i), out=d_i)
            torch.mul(c_before + (free - g), f * keep, out=d_f)
            torch.mul(torch.minimum(i, keep), 1 - g * g, out=d_g)
            torch.mul(tanh_c, o * (1 - o), out=d_o)
            torch.mul(o, 1 - tanh_c * tanh_c, out=d_h_c)

        H, d_x, d_h = out.size(2), torch.empty_like(x), torch.zeros_like(first)
        f, d_ifg, d_os = gates[:, :, H : 2 * H], d_gates[:, :, : 3 * H].unflatten(2, (3, H)), d_gates[:, :, 3 * H :]
        d_sums = differentiate_rounds(xs, hs, doubled)
        d_inner = [torch.empty_like(u) for u in inner]
        for t in reversed(range(len(x))):
            d_h = d_h + d_out[t]
            d_c = torch.addcmul(d_c, d_h, h_by_c[t])
            d_ifg[t].mul_(d_c[:, None])
            d_os[t].mul_(d_h)
            d_c, d_h = d_c * f[t], product(d_gates[t], weight_hh)
            if rounds:
                d_x[t], d_h = gate_step_backward(
                    rounds, [double[t] for double in doubled], product(d_gates[t], weight_ih), d_h,
                    [d_sum[t] for d_sum in d_sums], [d_u[t] for d_u in d_inner],
                )  # fmt: skip
            d_h = d_h if mask is None else d_h * mask
        del h_by_c
        d_rounded = d_gates.to(weight_ih.dtype)
        if not rounds:
            d_x = product(d_rounded.flatten(0, 1), weight_ih, out=d_x.flatten(0, 1)).view_as(x)
        d_weights = [over_steps(d_rounded, xs[-1]), over_steps(d_rounded, hs[-1]), d_gates.sum((0, 1))]
        d_weights += round_gradients(xs, hs, inner, d_sums, d_inner)
        return d_x, d_h, d_c, None, None, *d_weights


class RoundWeights(nn.Module):
    """A round's parameters: a (from, K), b (K, to) and bias (to,), or with rank 0 weight (from, to) and bias."""

    def __init__(self, source: int, to: int, rank: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(to))
        if rank:
            self.a = nn.Parameter(torch.empty(source, rank))
            self.b = nn.Parameter(torch.empty(rank, to))
        else:
            self.weight = nn.Parameter(torch.empty(source, to))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, self.bias] if hasattr(self, "weight") else [self.a, self.b, self.bias]

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)
        *factors, _ = self.tensors
        for factor in factors:
            # With two factors, their product has the deviation of one matrix (Melis et al., appendix).
            truncated_normal_(factor, (factors[0].size(0) * factors[-1].size(0)) ** -0.25)


class Mogrifier(RecurrentLayer):
    """One layer.

    Args:
        input_size, hidden_size: E, H.
        wdrop: of no effect, as this cell has no weight drop.
        rounds, rank: R, K; rank 0: a full matrix in place of A·B.
        dropoutr: dropout of h; one mask serves all steps of a batch.
        chrono: T > 2: initial forget biases are ln U(1, T - 1), for units that remember from 1 to T steps (Tallec,
            Ollivier, arXiv 1804.11188); 0: they are 1.

    Parameters: weight_ih (4H, E), weight_hh (4H, H), bias (4H,), rows in the order i, f, g, o; rounds.R.
    """

    locked, summed, normal_embedding = False, True, True
    options = ("rounds", "rank", "dropoutr", "chrono")
    defaults: ClassVar = {"wdrop": 0.0, "dropoute": 0.0, "drop_state": 0.01}
    scan: ClassVar[type[torch.autograd.Function]] = MogrifierScan
    forget_row: ClassVar[int] = 1  # the forget gate's place among the gates of `bias`

    def __init__(
        self, input_size: int, hidden_size: int, wdrop: float, first: bool,
        rounds: int = 5, rank: int = 0, dropoutr: float = 0.0, chrono: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.hidden_size, self.rank, self.dropoutr, self.chrono = hidden_size, rank, dropoutr, chrono
        self.make_cell(input_size, hidden_size)
        sizes = input_size, hidden_size
        self.rounds = nn.ModuleList(RoundWeights(sizes[r % 2 == 0], sizes[r % 2], rank) for r in range(rounds))

    def make_cell(self, input_size: int, hidden_size: int) -> None:
        """Makes the cell's own parameters."""
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))

    @property
    def cell_tensors(self) -> list[Tensor]:
        """The cell's own parameters, in the order of `scan`."""
        return [self.weight_ih, self.weight_hh, self.bias]

    def reset_matrices(self) -> None:
        """Draws the cell's matrices: truncated normal of variance 1 / fan-in, which is E + H for every gate."""
        for weight in (self.weight_ih, self.weight_hh):
            truncated_normal_(weight, (self.weight_ih.size(1) + self.hidden_size) ** -0.5)

    def reset_parameters(self) -> None:
        """As `reset_matrices`; the forget gate's bias is as `chrono` says, others are 0."""
        self.reset_matrices()
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            forget = self.bias.view(4, -1)[self.forget_row]
            if self.chrono:
                forget.uniform_(1, self.chrono - 1).log_()
            else:
                forget.fill_(1)
        for round in self.rounds:
            cast(RoundWeights, round).reset_parameters()

    def init_hidden(self, batch_size: int) -> Hidden:
        size = (1, batch_size, self.hidden_size)
        return self.bias.new_zeros(size), self.bias.new_zeros(size)

    def forward(self, x: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        mask = None
        if self.training and self.dropoutr:
            mask = torch.empty_like(hidden[0][0]).bernoulli_(1 - self.dropoutr).div_(1 - self.dropoutr)  # (B, H)
        rounds = [tensor for round in self.rounds for tensor in cast(RoundWeights, round).tensors]
        dtype = exact_or_bf16(self.bias) if x.device.type == "cpu" else self.bias.dtype
        with torch.autocast(x.device.type, enabled=False):  # rounding errors of the state would add up
            h, c = (tensor[0].to(self.bias.dtype) for tensor in hidden)
            x, kernels = x.to(self.bias.dtype), None
            if self.persistent and self.training and self.scan is MogrifierScan and not self.rounds:
                kernels = persistent.pick_kernels("MELIS", x, self.weight_hh)
            if kernels:
                out, c = persistent.melis(kernels, x, h, c, mask, self.cell_tensors)
            else:
                cell = [tensor.to(dtype) if tensor.dim() == 2 else tensor for tensor in self.cell_tensors]
                out, c = self.scan.apply(x, h, c, mask, self.rank == 0, *cell, *rounds)
        return out, (out[-1:].clone(), c[None])
