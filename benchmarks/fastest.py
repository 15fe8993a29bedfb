"""Which of --graphs and --padded make a training step fastest, among those that give the losses of the plain step."""

import sys
from collections.abc import Callable
from statistics import median

import torch

from benchmarks import timed
from benchmarks.work import Work

CHOICES = ("", "--padded", "--graphs", "--graphs --padded")
COMPARED, TIMED = 20, 50  # steps; in the first ones nothing has had time to drift apart
TOLERANCE = 0.02  # of a loss: products of other widths are rounded differently, in TF32


def fastest(make_work: Callable[[str], Work], device: torch.device) -> str:
    """The choice with the shortest step; what was measured goes to stderr.

    Args:
        make_work: the training step with these flags; each one starts from the same weights and draws the same masks.
    """
    expected: list[float] = []
    times_ms: dict[str, float] = {}
    for choice in CHOICES:
        losses, ms = measure(make_work(choice), device)
        expected = expected or losses
        apart = max(abs(loss / right - 1) for loss, right in zip(losses, expected, strict=True))
        agrees = apart <= TOLERANCE  # not so if it is nan
        if agrees:
            times_ms[choice] = ms
        verdict = "" if agrees else ": these are not the same steps, so this is not chosen"
        print(f"{choice or 'no flag'}: {ms:.2f} ms, losses apart by {apart:.1%}{verdict}", file=sys.stderr, flush=True)
    return min(times_ms, key=lambda choice: times_ms[choice], default="")


def measure(step: Work, device: torch.device) -> tuple[list[float], float]:
    """The losses of the first steps, and the median of the milliseconds of those after them."""
    losses = [float(step()) for _ in range(COMPARED)]
    return losses, median(timed(step, device)[0] for _ in range(TIMED))
