"""The floor of a training step: its matrix products and nothing else, each by the fastest way that torch has.

Shapes: N rows (T·B), I inputs and O outputs of a weight (O, I).
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks import timed
from products import has_onednn

REPEATS = 3  # of each way; its fastest time decides
Way = tuple[str, Callable[[], Tensor]]  # a library's name, and a product by it


def shapes(args: Namespace, ntoken: int, targets: Tensor) -> list[tuple[int, int, int]]:
    """(N, I, O) of every weight that a step multiplies by; `targets` (T, B) of one batch.

    The recurrent matrices count with all rows at once, though no LSTM can do that; the decoder counts once,
    tied or not, with the rows of all experts. Of a split softmax: the head for all rows, each cluster for the
    targets within it. Looking words up in the embedding is no product.
    """
    N, splits, found, K = targets.numel(), args.splits, [], args.n_experts
    last = args.nhidlast or args.emsize
    sizes = [args.emsize, *[args.nhid] * (args.nlayers - 1), last]
    for i, (inputs, nhid) in enumerate(pairwise(sizes)):
        if args.model != "QRNN":
            gates = 3 if args.model == "GRU" else 4
            found += [(N, inputs, gates * nhid), (N, nhid, gates * nhid)]
            for r in range(args.rounds if args.model == "Mogrifier" else 0):
                source, to = (inputs, nhid) if r % 2 else (nhid, inputs)
                found += [(N, source, args.rank), (N, args.rank, to)]
        else:
            found += [(N, inputs if i else 2 * inputs, 3 * nhid)]
    found += [(N, last, K), (N, last, K * args.emsize)] if K else []  # prior and latents of a mixture
    found += [(N * (K or 1), args.emsize, splits[0] + len(splits) if splits else ntoken)]
    for start, end in pairwise([*splits, ntoken] if splits else []):
        rows = int(((targets >= start) & (targets < end)).sum())
        found += [(rows, args.emsize, end - start)] if rows else []
    return found


def ways(a: Tensor, b: Tensor) -> list[Way]:
    """a @ b by each library: `torch.mm`, into memory that is there, and on the CPU oneDNN."""
    out = a.new_empty(len(a), b.size(1))
    found: list[Way] = [("torch.mm", lambda: torch.mm(a, b, out=out))]
    if a.device.type == "cpu" and has_onednn():
        # It multiplies by the transpose of its second argument, a view or not; a transposed first one it copies.
        found += [("oneDNN", lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))]
    return found


def products(x: Tensor, weight: Tensor, dy: Tensor) -> list[list[Way]]:
    """The ways to the output (N, O), to the input's gradient (N, I), and to the weight's, (O, I) or (I, O)."""
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
