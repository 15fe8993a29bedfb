"""Weight drop (DropConnect): single elements of a weight matrix are dropped, with one mask per batch.

Merity, Keskar, Socher, arXiv 1708.02182 ("AWD"), section 2. `ElementDropout` draws masks for activations in the same
way.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from products import linear


class DropWeight(torch.autograd.Function):
    """DropConnect on the CPU: each element of `weight` becomes 0 with probability p, the others are divided by 1-p.

    The mask is made of random bits, 16 per element, compared with a threshold (p is exact to 2^-16).
    `Tensor.bernoulli_` takes more than ten times as long: 8 % of an AWD-LSTM's step.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, p: float) -> Tensor:
        n = weight.numel()
        bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits random
        threshold = min(round(p * 2**16), 2**16 - 1) - 2**15  # an int16 lies below it with probability p
        keep = bits.view(torch.int16)[:n].view_as(weight) >= threshold
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return keep.to(weight.dtype).mul_(weight).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return keep.to(grad.dtype).mul_(grad).mul_(ctx.scale), None


def drop_weight(raw: Tensor, p: float, training: bool) -> Tensor:
    """Weight drop (AWD, section 2): one mask per batch over a weight matrix; in evaluation `raw` itself."""
    if not training or p == 0:
        return raw
    if raw.device.type != "cpu":
        return F.dropout(raw, p)
    return DropWeight.apply(raw, p)


class LockedDropout(utils.LockedDropout):
    """PyTorch-NLP's locked dropout, one mask for all time steps of a sequence, without its copy of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * x.new_empty(1, x.size(1), x.size(2)).bernoulli_(1 - self.p).div_(1 - self.p)  # (T, B, ·) * (1, B, ·)


class ElementDropout(nn.Dropout):
    """Dropout of single elements, with the mask of `drop_weight`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop_weight(x, self.p, self.training)


class WeightDropLinear(nn.Linear):
    """A linear layer with weight drop on its whole weight: the parameter is `weight_raw`, (out, in)."""

    def __init__(self, in_features: int, out_features: int, wdrop: float) -> None:
        super().__init__(in_features, out_features)
        self.wdrop = wdrop
        self.weight_raw = self.weight
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, drop_weight(self.weight_raw, self.wdrop, self.training), self.bias)
