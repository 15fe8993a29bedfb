"""Split cross entropy: one softmax, or a frequency-split one whose cost follows the clusters that are hit.

Shapes: N positions (T·B), H features, V vocabulary, K clusters beside the head (the number of splits).
The words are sorted by frequency. With splits `s_1 < ... < s_K` the head is a softmax over the words
`[0, s_1)` and one tombstone a cluster; cluster k holds the words `[s_k, s_{k+1})`, the last one up to V:

    log p(w) = log p(tombstone_k) + log p(w | k)                       (Scales, section 3.2)
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError


def default_splits(ntoken: int) -> list[int]:
    """The splits for a vocabulary of `ntoken` types: none up to 75,000, as published above (Scales)."""
    splits = [4200, 35000, 180000] if ntoken > 500_000 else [2800, 20000, 76000] if ntoken > 75_000 else []
    return [split for split in splits if split < ntoken]


def linear_cross_entropy(
    hiddens: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: str
) -> Tensor:
    """Projection and loss: (N, H), (V, H), (V,), (N,) -> a scalar, or (N,) by "none", in nats."""
    return F.cross_entropy(F.linear(hiddens, weight, bias), targets, reduction=reduction)


class SplitCrossEntropyLoss(nn.Module):
    """Mean (or summed) negative log-likelihood of targets, in nats, under a split or a plain softmax.

    Args:
        hidden_size: H, the width of the decoder's weight.
        splits: the first word of each cluster, ascending; empty for one softmax over all words.

    Attributes:
        tail_vectors, tail_bias: (K, H) and (K,), the tombstones; row k-1 belongs to cluster k.
            Absent without splits.

    Raises:
        UserError: the splits do not ascend from 1, or reach past the vocabulary.
    """

    def __init__(self, hidden_size: int, splits: list[int] | tuple[int, ...] = ()) -> None:
        super().__init__()
        self.splits = [int(split) for split in splits]
        if any(a >= b for a, b in pairwise([0, *self.splits])):
            raise UserError(f"splits {self.splits}: have to ascend from 1 at least; sort them, each once")
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
        cross_entropy: Callable[..., Tensor] = linear_cross_entropy,
    ) -> Tensor:
        """The loss of `targets` in nats: a scalar, or (N,) without a reduction.

        Args:
            weight, bias: the decoder's, (V, H) and (V,) or None.
            hiddens: (N, H), or (T, B, H).
            targets: (N,), or (T, B), of integers in [0, V).
            reduction: "mean" over the N positions, "sum", or "none": one loss a position.
            cross_entropy: `linear_cross_entropy`, or a compiled one.
        """
        hiddens, targets = hiddens.flatten(0, -2), targets.reshape(-1)  # (N, H), (N,)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction {reduction!r}: use 'mean', 'sum' or 'none'")
        if not self.splits:
            return cross_entropy(hiddens, weight, bias, targets, reduction)

        weights, biases = self.clusters(weight, bias)
        edges = torch.tensor(self.splits, device=targets.device)
        cluster = torch.bucketize(targets, edges, right=True)  # (N,): 0 in the head, else 1 .. K
        # In the head a word of cluster k is its tombstone, entry s_1 + k - 1.
        head_targets = torch.where(cluster == 0, targets, self.splits[0] + cluster - 1)
        part = "none" if reduction == "none" else "sum"
        total = cross_entropy(hiddens, *self.head(weights[0], biases[0]), head_targets, part)
        for k, first in enumerate(self.splits, start=1):
            hit = (cluster == k).nonzero().squeeze(1)  # a synchronisation on CUDA: the sizes decide the work
            if hit.numel():
                loss = cross_entropy(hiddens[hit], weights[k], biases[k], targets[hit] - first, part)
                total = total.index_add(0, hit, loss) if part == "none" else total + loss
        return total / targets.numel() if reduction == "mean" else total

    def logprob(self, weight: Tensor, bias: Tensor | None, hiddens: Tensor) -> Tensor:
        """Log-probabilities of every word: (N, H) -> (N, V), in nats."""
        if not self.splits:
            return F.log_softmax(F.linear(hiddens, weight, bias), dim=-1)
        weights, biases = self.clusters(weight, bias)
        head = F.log_softmax(F.linear(hiddens, *self.head(weights[0], biases[0])), dim=-1)  # (N, s_1 + K)
        words, tombstones = head.split([self.splits[0], len(self.splits)], dim=-1)
        tails = [
            tombstones[:, k : k + 1] + F.log_softmax(F.linear(hiddens, w, b), dim=-1)
            for k, (w, b) in enumerate(zip(weights[1:], biases[1:], strict=True))
        ]
        return torch.cat([words, *tails], dim=-1)  # (N, V)

    def clusters(self, weight: Tensor, bias: Tensor | None) -> tuple[tuple[Tensor, ...], tuple]:
        """The decoder's rows by cluster, the head's words first: views, K + 1 of them.

        One `split` rather than K + 1 slices: its backward joins the clusters' gradients in one pass over
        (V, H), where every slice would add a matrix of zeros of that size.
        """
        if self.splits[-1] >= weight.size(0):
            raise UserError(
                f"splits {self.splits}: the last one has to lie below the vocabulary's size, {weight.size(0)}"
            )
        edges = [0, *self.splits, weight.size(0)]
        sizes = [b - a for a, b in pairwise(edges)]
        biases = bias.split(sizes) if bias is not None else (None,) * len(sizes)
        return weight.split(sizes), biases

    def head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The head's own matrix and bias: its words, then the tombstones; (s_1 + K, H) and (s_1 + K,)."""
        bias = weight.new_zeros(weight.size(0)) if bias is None else bias
        return torch.cat([weight, self.tail_vectors]), torch.cat([bias, self.tail_bias])
