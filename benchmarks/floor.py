"""The floor of a training step: its matrix products and nothing else, each by the fastest way that torch has.

Shapes: N rows (T·B), I inputs and O outputs of a weight (O, I).
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.process import timed_ms

REPEATS = 3  # of each way, before the fastest is chosen


def products(args: Namespace, ntoken: int, targets: Tensor) -> list[tuple[int, int, int]]:
    """(N, I, O) of every weight that a step multiplies by; `targets` (T, B) of one batch.

    The recurrent matrices count with all rows at once, though no LSTM can do that; the decoder counts once,
    tied or not. Of a split softmax: the head for all rows, each cluster for the targets within it. Looking
    words up in the embedding is no product.
    """
    N, splits = targets.numel(), args.splits
    shapes = []
    sizes = [args.emsize, *[args.nhid] * (args.nlayers - 1), args.emsize]
    for layer, (inputs, hidden) in enumerate(pairwise(sizes)):
        if args.model == "LSTM":
            shapes += [(N, inputs, 4 * hidden), (N, hidden, 4 * hidden)]
        else:
            shapes += [(N, inputs * (2 if layer == 0 else 1), 3 * hidden)]
    shapes += [(N, args.emsize, splits[0] + len(splits) if splits else ntoken)]
    for start, end in pairwise([*splits, ntoken] if splits else []):
        rows = int(((targets >= start) & (targets < end)).sum())
        shapes += [(rows, args.emsize, end - start)] if rows else []
    return shapes


def ways(a: Tensor, b: Tensor, out: Tensor | None = None) -> dict[str, Callable[[], Tensor]]:
    """The product a @ b by each library: `torch.mm`, into memory that is there, and on the CPU oneDNN."""
    out = a.new_empty(len(a), b.size(1)) if out is None else out
    found = {"mm": lambda: torch.mm(a, b, out=out)}
    if a.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # Multiplies by the transpose of its second argument, which may be a view; a first one that is a
        # transposed view it copies.
        found["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return found


def weight_products(x: Tensor, weight: Tensor, dy: Tensor) -> list[list[tuple[str, Callable[[], Tensor]]]]:
    """Forward, the input's gradient and the weight's: the ways to compute each. x (N, I), weight (O, I), dy (N, O).

    The forward product overwrites `dy`: a matrix of the same shape, of numbers as good as others.
    """
    forward, d_input = ways(x, weight.t(), out=dy), ways(dy, weight)
    d_weight, transposed = ways(dy.t(), x), ways(x.t(), dy)  # an optimizer takes either
    return [[*forward.items()], [*d_input.items()], [*d_weight.items(), *transposed.items()]]


def make_floor(shapes: list[tuple[int, int, int]], device: torch.device) -> tuple[Callable[[], None], list[str]]:
    """The products of one step, each by its fastest way, and the libraries' names: three per shape."""
    chosen = []
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, device=device)
        weight = torch.randn(outputs, inputs, device=device) / inputs**0.5
        dy = torch.randn(rows, outputs, device=device)
        for candidates in weight_products(x, weight, dy):
            times = [min(timed_ms(lambda: work() and None, device) for _ in range(REPEATS)) for _, work in candidates]
            chosen.append(candidates[times.index(min(times))])

    def floor() -> None:
        for _, product in chosen:
            product()

    return floor, [library for library, _ in chosen]
