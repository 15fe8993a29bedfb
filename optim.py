"""The optimizers, the annealed rate, the running means of the weights, and the rule that starts NT-ASGD's.

Method: Merity, Keskar, Socher, arXiv 1708.02182 ("AWD"), section 3 and algorithm 1; Melis, "Two-Tailed Averaging",
arXiv 2209.12581, algorithm 1.
"""

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils import not_a_command


class Optimizer(NamedTuple):
    """A choice of `--optimizer`."""

    kind: Callable[..., torch.optim.Optimizer]
    lr: float  # the rate when none is given
    on_stall: str  # when the validation loss stalls: "average" the weights from then on, or "nothing"
    moments: int  # tensors kept per weight; --beta1 belongs to the first
    fused: bool  # torch has one kernel for the whole step, without temporaries


OPTIMIZERS = {
    "sgd": Optimizer(torch.optim.SGD, lr=30.0, on_stall="average", moments=0, fused=True),  # NT-ASGD
    "adam": Optimizer(torch.optim.Adam, lr=1e-3, on_stall="nothing", moments=2, fused=True),
    "radam": Optimizer(torch.optim.RAdam, lr=1e-3, on_stall="nothing", moments=2, fused=False),  # arXiv 1908.03265
}
TWO_TAILED = "two-tailed"  # of --average


def make_optimizer(
    parameters: Sequence[Tensor], name: str, lr: float, wdecay: float, beta1: float = 0.9
) -> torch.optim.Optimizer:
    """The optimizer `name` with weight decay, over the parameters of model and criterion.

    `beta1`: share of the mean gradient that is kept per step, in one that keeps moments.
    """
    row, device = OPTIMIZERS[name], parameters[0].device.type
    options: dict[str, Any] = {"betas": (beta1, 0.999)} if row.moments else {}
    if row.fused:
        options["fused"] = device in ("cpu", "cuda") or None  # None: torch decides
    else:  # all weights together; for CUDA graphs the count of steps has to be on the device from the first step on
        options |= {"foreach": True, "capturable": device == "cuda"}
    return row.kind(parameters, lr=lr, weight_decay=wdecay, **options)


class Mean:
    """The mean of the weights after each step since it was made; the descent goes on with the raw ones.

    `torch.optim.ASGD` sets its rate after the step, so a rate that is scaled by the batch's length would be one batch
    late. Plain SGD beside this mean does not have that fault.
    """

    def __init__(self, weights: nn.ModuleDict) -> None:
        self.weights, self.count = copy.deepcopy(weights), 0

    @torch.no_grad()
    def update(self, weights: nn.Module) -> None:
        """Adds the weights after one more step to the mean."""
        self.count += 1
        torch._foreach_lerp_(list(self.weights.parameters()), list(weights.parameters()), 1 / self.count)

    def after_validation(self, loss: float, loss_of: Callable[[nn.ModuleDict], float]) -> float:
        """Called after each validation, with its loss. Returns the mean's loss; here the mean is not changed."""
        return loss

    def state(self) -> dict[str, Any]:
        """Plain data and tensors, for the state of a run."""
        return {"count": self.count, "weights": self.weights.state_dict()}

    def restore(self, state: dict[str, Any], fit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """Puts back what `state` gave; `fit` gives the tensors the names that the weights have now."""
        self.count = state["count"]
        self.weights.load_state_dict(fit(state["weights"]))


class TwoTailedMean(Mean):
    """The means of the last L weights and of the last S weights, S <= L; this object is the long one.

    Both take in the weights after every step. After a validation in which the short one is as good as the long one, the
    long one takes its place, and the short one begins anew: S, L = 0, S. So the long one is never much longer than is
    good, and no setting says when averaging begins. Its cost: two copies of the weights, and a second validation.
    """

    def __init__(self, weights: nn.ModuleDict) -> None:
        super().__init__(weights)
        self.short = Mean(weights)

    def update(self, weights: nn.Module) -> None:
        super().update(weights)
        self.short.update(weights)

    def after_validation(self, loss: float, loss_of: Callable[[nn.ModuleDict], float]) -> float:
        """The validation loss of the long mean, which was `loss`, after the two have been compared.

        `loss_of` evaluates the short one. That is not needed if it is empty, or of the same steps as the long one.
        """
        short = self.short
        if not short.count:
            return loss
        short_loss = loss if short.count == self.count else loss_of(short.weights)
        if short_loss > loss:
            return loss
        self.weights, short.weights = short.weights, self.weights  # the next update overwrites the empty one
        self.count, short.count = short.count, 0
        return short_loss

    def state(self) -> dict[str, Any]:
        return {**super().state(), "short": self.short.state()}

    def restore(self, state: dict[str, Any], fit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        super().restore(state, fit)
        self.short.restore(state["short"], fit)


def annealed(done: float, after: int, epochs: int) -> float:
    """The share of the rate that is left after `done` epochs: 1 up to epoch `after`, then a straight line to 0."""
    return (epochs - done) / (epochs - after) if after and done > after else 1.0


def averages_after_stall(args: Namespace) -> bool:
    """Whether a stalled validation loss starts the averaging of weights."""
    if args.no_average or args.average == TWO_TAILED:
        return False
    return args.average or OPTIMIZERS[args.optimizer].on_stall == "average"


def means_kept(args: Namespace) -> int:
    """How many means of the weights a run keeps in the end."""
    return 2 if args.average == TWO_TAILED else int(averages_after_stall(args))


def has_stalled(history: list[float], nonmono: int) -> bool:
    """Whether the last validation loss is above the best one older than `nonmono` epochs (AWD, algorithm 1)."""
    older = history[: max(0, len(history) - 1 - nonmono)]
    return bool(older) and history[-1] > min(older)


if __name__ == "__main__":
    not_a_command(__file__)
