"""Split cross entropy: one softmax over the vocabulary, or one split by frequency, where rare words cost extra.

Shapes: N positions (T·B), H features, V vocabulary, K clusters beside the head (the number of splits).
The words are sorted by frequency. With splits `s_1 < ... < s_K` the head is a softmax over the words `[0, s_1)` and one
tombstone per cluster. Cluster k has the words `[s_k, s_{k+1})`, the last one the words up to V. The time of a batch
depends on the clusters that its words belong to.

    log p(w) = log p(tombstone_k) + log p(w | k)                       (Scales, section 3.2)
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from products import add_product, factor_dtype, linear, product
from utils import not_a_command

# A block of logits: enough rows for a matrix product at full speed, few enough for the cache.
BLOCK_ROWS, BLOCK_ELEMENTS = 256, 5 * 2**20


def block_rows(V: int) -> int:
    """The number of rows of V logits in a block."""
    return max(BLOCK_ROWS, BLOCK_ELEMENTS // V)


def default_splits(ntoken: int) -> list[int]:
    """The splits for a vocabulary of `ntoken` types: none up to 75,000, above that the published ones (Scales)."""
    splits = [4200, 35000, 180000] if ntoken > 500_000 else [2800, 20000, 76000] if ntoken > 75_000 else []
    return [split for split in splits if split < ntoken]


def is_one(grad: Tensor) -> bool:
    """Whether a gradient () is known to be 1. On a GPU it is not read, because that would wait for the device."""
    return grad.device.type == "cpu" and bool(grad == 1)


class BlockedCrossEntropy(torch.autograd.Function):
    """The sum of the positions' losses divided by `count`, and its gradients, one block of logits after the other.

    A position has K softmaxes, whose probabilities are mixed by a prior: a mixture (mos.py), or K = 1 without a prior.
    `F.linear` and `F.cross_entropy` hold (N, K, V) three times. Here a block of logits is turned into its gradient in
    place, multiplied into the gradients of weight and latents, and overwritten by the next block. With r_k =
    π_k·p_k(target) / p(target), the share of softmax k in the target's probability, the gradient of its logits is
    -r_k · (1[target] - p_k).

    latents (N, K, E), log_prior (N, K) or None, weight (V, E), bias (V,), targets (N,) -> the sum / count, in nats.
    `train`: calculate gradients. `dtype`: that of the products' factors, half precision under autocast. Bias, softmax
    and sums have the weight's dtype: logits lie near 9, where bfloat16's steps are 1/16, and with a rounded bias the
    mean gradient would be wrong by 1.5 % instead of 0.2 %.
    """

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, log_prior: Tensor | None, weight: Tensor, bias: Tensor, targets: Tensor, count: int,
        train: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        (N, K, _), V = latents.shape, len(weight)
        step = max(1, block_rows(V) // K)  # positions
        block = latents.new_empty(min(N, step) * K, V, dtype=dtype)
        factors = latents.to(dtype), weight.to(dtype)
        if train:
            d_latents, d_prior = weight.new_empty(latents.shape), weight.new_empty(N, K)
            d_weight, d_bias = torch.empty_like(weight), torch.zeros_like(bias)
        total: float | Tensor = 0.0
        for start in range(0, N, step):
            logits = powers = grad = None  # frees the last block: oneDNN allocates its result, and ignores `block`
            rows = slice(start, start + step)
            x = factors[0][rows].flatten(0, 1)  # (n·K, E)
            target = targets[rows].repeat_interleave(K)[:, None]  # (n·K, 1)
            logits = product(x, factors[1].T, bias, out=block[: len(x)])  # (n·K, V), in the weight's precision
            highest = logits.amax(1, keepdim=True)
            expected = logits.gather(1, target)
            powers = logits.sub_(highest).exp_()
            norm = powers.sum(1, keepdim=True)
            if log_prior is None:
                total += (norm.log() + highest - expected).sum(dtype=torch.float64).item()
                if not train:
                    continue
                grad = powers.div_(norm.mul_(count))  # p / count
                at_target = torch.full_like(expected, -1 / count)
            else:
                joint = log_prior[rows] + (expected - highest - norm.log()).view(-1, K)  # log π_k + log p_k(target)
                total = total - joint.logsumexp(1).sum()
                share = joint.softmax(1).div_(count).view(-1, 1)  # r_k / count, (n·K, 1)
                grad = powers.mul_(share / norm)  # r_k · p_k / count
                at_target = -share
                d_prior[rows] = at_target.view(-1, K)
            grad.scatter_add_(1, target, at_target)
            d_bias.add_(grad.sum(0))
            grad = grad.to(dtype)
            add_product(d_latents[rows].view(len(x), -1), grad, factors[1], first=True)
            add_product(d_weight, grad.T, x, first=start == 0)
        if train:
            ctx.save_for_backward(d_latents, d_prior, d_weight, d_bias)
        return torch.as_tensor(total / count, dtype=weight.dtype, device=weight.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In training `grad` is 1, and the gradients are returned without a copy: one is as large as the weight.
        copied = not is_one(grad)
        d_latents, d_prior, *rest = (x * grad if copied else x for x in ctx.saved_tensors)
        return d_latents, d_prior if ctx.needs_input_grad[1] else None, *rest, None, None, None, None


def linear_cross_entropy(
    hiddens: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, count: int | None
) -> Tensor:
    """Projection and loss: (N, H), (V, H), (V,), (N,) -> the sum divided by `count`, in nats; count None: (N,)."""
    if bias is None or factor_dtype(weight) == weight.dtype:
        logits = F.linear(hiddens, weight, bias)  # (N, V)
    else:
        logits = F.linear(hiddens, weight) + bias  # in the bias's dtype, as in `BlockedCrossEntropy`
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses if count is None else losses.sum() / count


def blocked_cross_entropy(
    hiddens: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, count: int | None
) -> Tensor:
    """The same, in blocks where these save time and memory: for a sum on the CPU.

    Not in float16: gradients divided by `count` would vanish before the scaler multiplies them.
    """
    dtype = factor_dtype(weight)
    if count is None or not len(hiddens) or hiddens.device.type != "cpu" or dtype == torch.float16:
        return linear_cross_entropy(hiddens, weight, bias, targets, count)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    train = torch.is_grad_enabled() and (hiddens.requires_grad or weight.requires_grad or bias.requires_grad)
    with torch.autocast("cpu", enabled=False):
        return BlockedCrossEntropy.apply(hiddens[:, None], None, weight, bias, targets, count, train, dtype)


class SplitCrossEntropyLoss(nn.Module):
    """Mean (or summed) negative log-likelihood of targets, in nats, under a split or a plain softmax.

    Args:
        hidden_size: H, the width of the decoder's weight.
        splits: the first word of each cluster, ascending; empty for one softmax over all words.

    Attributes:
        tail_vectors, tail_bias: (K, H) and (K,), the tombstones; row k-1 belongs to cluster k.
            Absent without splits.

    Raises:
        ValueError: the splits do not ascend from 1, or reach past the vocabulary.
    """

    def __init__(self, hidden_size: int, splits: list[int] | tuple[int, ...] = ()) -> None:
        super().__init__()
        self.splits = [int(split) for split in splits]
        if any(a >= b for a, b in pairwise([0, *self.splits])):
            raise ValueError(f"splits {self.splits}: have to ascend from 1 at least; sort them, each once")
        if self.splits:
            self.tail_vectors = nn.Parameter(torch.zeros(len(self.splits), hidden_size))
            self.tail_bias = nn.Parameter(torch.zeros(len(self.splits)))

    def forward(
        self,
        weight: Tensor,
        bias: Tensor | None,
        hiddens: Tensor,
        targets: Tensor,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss of `targets` in nats: a scalar, or (N,) without a reduction.

        Args:
            weight, bias: the decoder's, (V, H) and (V,) or None.
            hiddens: (N, H), or (T, B, H).
            targets: (N,), or (T, B), of integers in [0, V).
            reduction: "mean" over the N positions, "sum", or "none": one loss per position.
        """
        hiddens, targets = hiddens.flatten(0, -2), targets.reshape(-1)  # (N, H), (N,)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction {reduction!r}: use 'mean', 'sum' or 'none'")
        count = {"mean": targets.numel(), "sum": 1, "none": None}[reduction]
        if not self.splits:
            return blocked_cross_entropy(hiddens, weight, bias, targets, count)

        weights, biases = self.clusters(weight, bias)
        edges = torch.tensor(self.splits, device=targets.device)
        cluster = torch.bucketize(targets, edges, right=True)  # (N,): 0 in the head, else 1 .. K
        # In the head a word of cluster k is its tombstone, entry s_1 + k - 1.
        head_targets = torch.where(cluster == 0, targets, self.splits[0] + cluster - 1)
        total = blocked_cross_entropy(hiddens, *self.head(weights[0], biases[0]), head_targets, count)
        for k, first in enumerate(self.splits, start=1):
            hit = (cluster == k).nonzero().squeeze(1)  # a synchronisation on CUDA: the sizes decide the work
            if hit.numel():
                loss = blocked_cross_entropy(hiddens[hit], weights[k], biases[k], targets[hit] - first, count)
                total = total.index_add(0, hit, loss) if count is None else total + loss
        return total

    def logprob(self, weight: Tensor, bias: Tensor | None, hiddens: Tensor) -> Tensor:
        """Log-probabilities of every word: (N, H) -> (N, V), in nats."""
        if not self.splits:
            return F.log_softmax(linear(hiddens, weight, bias), dim=-1)
        weights, biases = self.clusters(weight, bias)
        head = F.log_softmax(linear(hiddens, *self.head(weights[0], biases[0])), dim=-1)  # (N, s_1 + K)
        words, tombstones = head.split([self.splits[0], len(self.splits)], dim=-1)
        tails = [
            tombstones[:, k : k + 1] + F.log_softmax(linear(hiddens, w, b), dim=-1)
            for k, (w, b) in enumerate(zip(weights[1:], biases[1:], strict=True))
        ]
        return torch.cat([words, *tails], dim=-1)  # (N, V)

    def clusters(self, weight: Tensor, bias: Tensor | None) -> tuple[tuple[Tensor, ...], tuple]:
        """The decoder's rows by cluster, the head's words first: views, K + 1 of them.

        By one `split`, not by K + 1 slices: its backward pass joins the clusters' gradients in one pass over (V, H),
        while every slice would add a matrix of zeros of that size.
        """
        if self.splits[-1] >= weight.size(0):
            raise ValueError(
                f"splits {self.splits}: the last one has to lie below the vocabulary's size, {weight.size(0)}"
            )
        edges = [0, *self.splits, weight.size(0)]
        sizes = [b - a for a, b in pairwise(edges)]
        biases = bias.split(sizes) if bias is not None else (None,) * len(sizes)
        return weight.split(sizes), biases

    def head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The head's matrix and bias, its words before the tombstones: (s_1 + K, H) and (s_1 + K,)."""
        bias = weight.new_zeros(weight.size(0)) if bias is None else bias
        return torch.cat([weight, self.tail_vectors]), torch.cat([bias, self.tail_bias])


if __name__ == "__main__":
    not_a_command(__file__)
