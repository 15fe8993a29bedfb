"""Which of --graphs, --padded and --persistent make a training step fastest, if it has the losses of the plain step."""

import sys
from collections.abc import Callable
from statistics import median

import torch

from benchmarks import timed
from benchmarks.work import Work

COMPARED, TIMED = 20, 50  # steps; in the first ones nothing has had time to drift apart
TOLERANCE = 0.02  # of a loss: products of other widths are rounded differently, in TF32


def choices(model: str) -> tuple[str, ...]:
    """The flags to try for a kind of model: --padded is for the QRNN, --persistent for the others."""
    other = "--padded" if model == "QRNN" else "--persistent"
    return "", other, "--graphs", f"--graphs {other}"


def fastest(make_work: Callable[[str], Work], flags: tuple[str, ...], device: torch.device) -> str:
    """The choice with the shortest step; what was measured goes to stderr.

    Args:
        make_work: the training step with these flags; each one starts from the same weights and draws the same masks.
        flags: the choices, without flags first.
    """
    expected: list[float] = []
    times_ms: dict[str, float] = {}
    for choice in flags:
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
