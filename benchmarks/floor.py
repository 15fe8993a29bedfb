"""The floor of a training step: its matrix products and nothing else, each by the fastest way that torch has.

Shapes: N rows (T·B), I inputs and O outputs of a weight (O, I).
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks import timed
from model import build
from products import has_onednn

REPEATS = 3  # of each way; its fastest time decides
Way = tuple[str, Callable[[], Tensor]]  # a library's name, and a product by it


def shapes(args: Namespace, ntoken: int, targets: Tensor) -> list[tuple[int, int, int]]:
    """(N, I, O) of every weight that a step multiplies by; `targets` (T, B) of one batch.

    Recurrent matrices count with all rows at once, though no LSTM can do that. The decoder counts once, tied or not,
    with the rows of all experts; of a split softmax the head counts for all rows, each cluster for the targets in it.
    Looking words up in the embedding is no product.
    """
    with torch.device("meta"):
        model, criterion = build(vars(args), ntoken)
    N, K, splits = targets.numel(), args.n_experts, criterion.splits
    parameters = [*model.rnns.parameters(), *(criterion.parameters() if K else ())]  # K: prior and latents
    sizes = [(N, p.size(1), p.size(0)) for p in parameters if p.dim() == 2]
    E = model.decoder.weight.size(1)
    sizes.append((N * (K or 1), E, splits[0] + len(splits) if splits else ntoken))
    for start, end in pairwise([*splits, ntoken] if splits else []):
        rows = int(((targets >= start) & (targets < end)).sum())
        sizes += [(rows, E, end - start)] if rows else []
    return sizes


def ways(a: Tensor, b: Tensor) -> list[Way]:
    """a @ b by each library: `torch.mm`, into memory that is there, and on the CPU oneDNN."""
    out = a.new_empty(len(a), b.size(1))
    ways: list[Way] = [("torch.mm", lambda: torch.mm(a, b, out=out))]
    if a.device.type == "cpu" and has_onednn():
        # oneDNN multiplies by the transpose of its second argument, and copies a transposed first one.
        ways += [("oneDNN", lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))]
    return ways


def products(x: Tensor, weight: Tensor, dy: Tensor) -> list[list[Way]]:
    """The ways to compute the output (N, O), the input's gradient (N, I), and the weight's, (O, I) or (I, O)."""
    return [ways(x, weight.t()), ways(dy, weight), ways(dy.t(), x) + ways(x.t(), dy)]


def make_floor(sizes: list[tuple[int, int, int]], device: torch.device) -> tuple[Callable[[], None], list[str]]:
    """The products of one step, each by its fastest way, and the names of the libraries: three per weight."""
    chosen = []
    for N, I, O in sizes:
        x, weight, dy = (torch.randn(size, device=device) for size in ((N, I), (O, I), (N, O)))
        for candidates in products(x, weight, dy):
            chosen += [min(candidates, key=lambda way: min(timed(way[1], device)[0] for _ in range(REPEATS)))]

    def floor() -> None:
        for _, product in chosen:
            product()

    return floor, [library for library, _ in chosen]
