"""Mixture of softmaxes: an output layer whose log-probabilities can have a higher rank than the embedding.

Yang, Dai, Salakhutdinov, Cohen, arXiv 1711.03953, section 3. With h, the last layer's output after its dropout:

    π = softmax(P·h)                      prior of the K experts
    l_k = tanh(L_k·h + b_k)               their latents, one locked dropout over all of them
    p(w) = Σ_k π_k · softmax_w(W·l_k + b)

Shapes: N positions (T·B), H features of the last layer, K experts, E embedding, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.weight_drop import LockedDropout
from products import Linear, exact_or_bf16, linear
from splitcross import BlockedCrossEntropy, SplitCrossEntropyLoss, block_rows
from utils import not_a_command


def mixture_losses(latents: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The loss of each position, (N,), written plainly; arguments as in `BlockedCrossEntropy`."""
    logprob = F.log_softmax(linear(latents, weight, bias), dim=-1)  # (N, K, V)
    chosen = logprob.gather(2, targets[:, None, None].expand(-1, latents.size(1), 1)).squeeze(2)  # (N, K)
    return -(log_prior + chosen).logsumexp(1)


class MixtureOfSoftmaxes(nn.Module):
    """The criterion: mean (or summed) negative log-likelihood of targets, in nats, under the mixture.

    Args:
        hidden_size: H, of the last layer.
        emsize: E, the width of the decoder's weight.
        n_experts: K.
        dropoutl: locked dropout on the latents.

    Attributes:
        prior.weight (K, H); latent.weight (K·E, H), the rows of the first expert first; latent.bias (K·E,).
    """

    def __init__(self, hidden_size: int, emsize: int, n_experts: int, dropoutl: float = 0.0) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.splits: list[int] = []
        self.prior = Linear(hidden_size, n_experts, bias=False)
        self.latent = Linear(hidden_size, n_experts * emsize)
        self.dropout = LockedDropout(dropoutl)

    def experts(self, hiddens: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """(N, H), T rows of `columns` columns -> latents (N, K, E) and log prior (N, K)."""
        latents = torch.tanh(self.latent(hiddens))  # (N, K·E)
        latents = self.dropout(latents.view(-1, columns, latents.size(1)))  # (T, B, K·E), one mask per column
        dtype = self.prior.weight.dtype  # under autocast the two are in half precision
        log_prior = F.log_softmax(self.prior(hiddens).to(dtype), dim=-1)
        return latents.to(dtype).reshape(len(hiddens), self.n_experts, -1), log_prior

    def forward(
        self, weight: Tensor, bias: Tensor | None, hiddens: Tensor, targets: Tensor, reduction: str = "mean"
    ) -> Tensor:
        """The loss of `targets` in nats: a scalar, or (N,) without a reduction.

        Args:
            weight, bias: the decoder's, (V, E) and (V,) or None.
            hiddens: (N, H), or (T, B, H).
            targets: (T, B), of integers in [0, V); or (N,), when nothing is dropped.
            reduction: "mean" over the N positions, "sum", or "none": one loss per position.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction {reduction!r}: use 'mean', 'sum' or 'none'")
        columns = targets.size(1) if targets.dim() == 2 else 1
        latents, log_prior = self.experts(hiddens.flatten(0, -2), columns)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        targets, dtype = targets.reshape(-1), exact_or_bf16(weight)
        with torch.autocast(hiddens.device.type, enabled=False):
            if torch.is_grad_enabled() and reduction != "none":
                count = len(targets) if reduction == "mean" else 1
                return BlockedCrossEntropy.apply(latents, log_prior, weight, bias, targets, count, True, dtype)
            step = max(1, block_rows(len(weight)) // self.n_experts)
            blocks = zip(latents.split(step), log_prior.split(step), targets.split(step), strict=True)
            losses = torch.cat([mixture_losses(x, prior, weight, bias, target) for x, prior, target in blocks])
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()

    def logprob(self, weight: Tensor, bias: Tensor | None, hiddens: Tensor) -> Tensor:
        """Log-probabilities of every word: (N, H) -> (N, V), in nats."""
        latents, log_prior = self.experts(hiddens, 1)
        logprob = F.log_softmax(linear(latents, weight, bias), dim=-1)  # (N, K, V)
        return (logprob + log_prior[:, :, None]).logsumexp(1)


def sampled(
    criterion: SplitCrossEntropyLoss | MixtureOfSoftmaxes, samples: int
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """The loss of a batch in which each column is repeated `samples` times, every copy under its own dropout mask.

    The loss of a position is -log of the mean of its samples' probabilities (Melis, Circling Back to Recurrent Models
    of Language, arXiv 2211.01848): the samples are experts of equal prior.

    Returns:
        loss(weight, bias, hiddens (T·B·samples, H), targets (T, B)) -> the mean over positions, in nats.
    """

    def loss(weight: Tensor, bias: Tensor | None, hiddens: Tensor, targets: Tensor) -> Tensor:
        targets, columns, splits = targets.reshape(-1), targets.size(1) * samples, criterion.splits
        if splits:
            each = criterion(weight, bias, hiddens, targets.repeat_interleave(samples), reduction="none")
            return -((-each).view(-1, samples).logsumexp(1) - math.log(samples)).mean()
        latents, log_prior = hiddens[:, None], hiddens.new_zeros(len(hiddens), 1)  # (N·samples, 1, E) and (·, 1)
        if isinstance(criterion, MixtureOfSoftmaxes):
            latents, log_prior = criterion.experts(hiddens, columns)
        latents = latents.to(weight.dtype).reshape(len(targets), -1, latents.size(2))  # (N, samples·K, E)
        log_prior = log_prior.to(weight.dtype).reshape(len(targets), -1) - math.log(samples)
        bias, dtype = weight.new_zeros(len(weight)) if bias is None else bias, exact_or_bf16(weight)
        with torch.autocast(hiddens.device.type, enabled=False):
            return BlockedCrossEntropy.apply(latents, log_prior, weight, bias, targets, len(targets), True, dtype)

    return loss


if __name__ == "__main__":
    not_a_command(__file__)
