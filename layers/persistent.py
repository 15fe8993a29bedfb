"""All time steps of an LSTM, a GRU or Melis's LSTM in one kernel launch per direction (`--persistent`).

The kernels are in `persistent.cu`. The recurrent weights stay in the registers of the whole GPU from the first step to
the last. cuDNN reads them again in every step at widths such as 1150. `choose_sizes` says how a layer is spread over a
GPU, and which layers are served.

Only training uses the kernels. Weight drop is part of them: they read the raw matrix and the mask, and no dropped copy
is kept. Everything can be captured in a CUDA graph: nothing is read from the device, and the kernels are compiled and
loaded by the first call, which is never captured (harness/graphs.py).

Shapes: T time, B batch, E input features, H hidden, G gates.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers import nvrtc

SOURCE = Path(__file__).with_name("persistent.cu")
GATES = {"LSTM": 4, "GRU": 3, "MELIS": 4}  # G of each kind of cell
WARPS, THREADS = 8, 256  # per block
TILE = 16  # rows and columns of a tile of the weights
WEIGHT_REGISTERS = 144  # the most per thread that hold weights: with more, others have no place (255 in all)
COUNTER_WORDS = 32  # of the barrier, at the start of the scratch memory
NO_REGISTERS = "the recurrent weights do not fit the GPU's registers"


class NotServedError(Exception):
    """The kernels do not serve this layer on this GPU; the message says why."""


class Card(NamedTuple):
    """What a GPU has. capability: (major, minor); shared_bytes: shared memory per block, at most."""

    capability: tuple[int, int]
    processors: int
    shared_bytes: int


class Direction(NamedTuple):
    """How the forward or the backward pass is spread over a GPU.

    units: per block. shared_bytes: per block. scratch_words: of 32 bits, of the barrier and the exchange.
    """

    units: int
    blocks: int
    shared_bytes: int
    scratch_words: int


class Sizes(NamedTuple):
    """A layer's sizes. cell: a key of GATES."""

    cell: str
    H: int
    B: int
    forward: Direction
    backward: Direction

    def options(self) -> tuple[str, ...]:
        """The constants that the compiler is given."""
        units = f"-DUNITS_FORWARD={self.forward.units}", f"-DUNITS_BACKWARD={self.backward.units}"
        return f"-DCELL={self.cell}", f"-DH={self.H}", f"-DB={self.B}", *units


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def make_direction(units: int, rows: int, k_tiles: int, numbers: int, H: int, B: int, card: Card) -> Direction:
    """One direction with so many units per block; the same formulas as in `Sizes` of persistent.cu.

    Args:
        rows: of the block's matrix.
        k_tiles: tiles along the dimension that is summed over.
        numbers: kept in shared memory per cell.

    Raises:
        NotServedError: it does not fit.
    """
    blocks, row_tiles, batch_tiles = ceil_div(H, units), ceil_div(rows, TILE), ceil_div(B, 8)
    if blocks > card.processors or 4 * ceil_div(k_tiles, WARPS) * row_tiles > WEIGHT_REGISTERS:
        raise NotServedError(NO_REGISTERS)
    chunks = ceil_div(batch_tiles, 3)
    columns = 8 * ceil_div(batch_tiles, chunks)  # of a chunk
    cells = ceil_div(units * min(B, columns), THREADS)  # per thread and chunk
    partial = WARPS * row_tiles * TILE * (columns + 2)
    shared_bytes = 4 * (partial + numbers * chunks * cells * THREADS)
    if shared_bytes > card.shared_bytes:
        raise NotServedError(f"a batch of {B} columns does not fit its shared memory")
    return Direction(units, blocks, shared_bytes, COUNTER_WORDS + 2 * k_tiles * batch_tiles * 64)


def choose_sizes(cell: str, H: int, B: int, card: Card) -> Sizes:
    """How a layer of H units is spread over a GPU for batches of B columns.

    Forward, a block has as few tiles of weights as the number of processors allows, because a step takes the time of
    its products. Backward, it has one tile of units: fewer would leave rows of the tile unused.

    Raises:
        NotServedError: the GPU is too old or too small.
    """
    if card.capability < (8, 0):
        raise NotServedError("it needs a GPU of compute capability 8.0 or newer")
    gates, unit_tiles = GATES[cell], ceil_div(H, TILE)
    row_tiles = next(n for n in range(1, H + 1) if ceil_div(H, max(1, TILE * n // gates)) <= card.processors)
    units = TILE * row_tiles // gates
    forward = make_direction(units, gates * units, unit_tiles, 2, H, B, card)
    backward = make_direction(TILE, TILE, gates * unit_tiles, 3, H, B, card)
    return Sizes(cell, H, B, forward, backward)


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels of a layer, loaded on CUDA device `index`; forward and backward: CuPy's Functions."""

    index: int
    sizes: Sizes
    forward: Any
    backward: Any

    def run(self, name: str, weight: Tensor, *others: Tensor | None, scale: float, T: int) -> None:
        """Launches one direction. The scratch memory is zeroed on the stream, so each launch counts from 0."""
        direction: Direction = getattr(self.sizes, name)
        scratch = torch.zeros(direction.scratch_words, dtype=torch.int32, device=weight.device)
        arguments = (weight, *others, scratch, scale, T)
        blocks, shared = direction.blocks, direction.shared_bytes
        nvrtc.launch(getattr(self, name), self.index, blocks, THREADS, arguments, shared, cooperative=True)


def load_kernels(cell: str, H: int, B: int, index: int) -> Kernels:
    """Compiles and loads. Raises NotServedError, and what `nvrtc.load_module`, CuPy and the driver raise."""
    properties: Any = torch.cuda.get_device_properties(index)
    shared_bytes = properties.shared_memory_per_block_optin
    card = Card((properties.major, properties.minor), properties.multi_processor_count, shared_bytes)
    sizes = choose_sizes(cell, H, B, card)
    import cupy

    driver, functions = cupy.cuda.driver, []
    for name in ("forward", "backward"):
        function = nvrtc.find_kernel(index, f"persistent_{name}", SOURCE, sizes.options())
        direction: Direction = getattr(sizes, name)
        with torch.cuda.device(index), cupy.cuda.Device(index):
            limit = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function.ptr, limit, direction.shared_bytes)
            fit = driver.occupancyMaxActiveBlocksPerMultiprocessor(function.ptr, THREADS, direction.shared_bytes)
        if direction.blocks > fit * card.processors:  # CuPy would launch fewer blocks, and only warn
            raise NotServedError("its blocks cannot run at the same time")
        functions.append(function)
    return Kernels(index, sizes, *functions)


@functools.cache
def find_kernels(cell: str, H: int, B: int, index: int) -> Kernels | None:
    """The kernels for a layer and a batch on CUDA device `index`. None: there are none, and one warning says why."""
    try:
        return load_kernels(cell, H, B, index)
    except NotServedError as error:
        reason = str(error)
    except ImportError as error:
        reason = f"{error}; to install it: {nvrtc.INSTALL}"
    except Exception as error:  # of NVRTC or the driver; training works without the kernels
        reason = f"{error}; to reinstall the packages: {nvrtc.INSTALL}"
    nvrtc.warn_once(f"--persistent has no effect on layers of {H} units with {B} columns: {reason}")
    return None


def pick_kernels(cell: str, x: Tensor, weight: Tensor) -> Kernels | None:
    """The kernels for an input x (T, B, E) and a recurrent matrix (G·H, H). None: the layer runs without them."""
    if torch.is_autocast_enabled(x.device.type) or {x.dtype, weight.dtype} != {torch.float32}:
        nvrtc.warn_once("--persistent has no effect except in float32")
        return None
    return find_kernels(cell, weight.size(1), x.size(1), x.device.index)


class Recurrence(torch.autograd.Function):
    """The recurrence of one layer over all steps, from the product W·x + b of all steps.

    Args:
        y: (T, B, G·H), the product. It is overwritten by the gates, so nothing else may use it.
        h, c: (B, H), the state before the first step; c of a GRU: None.
        weight: (G·H, H), raw.
        bias: (3H,), added to the recurrent product; of a GRU only, otherwise None.
        mask: (B, H), multiplied into h before each step; or None.
        keep: (G·H, H) of bool, the elements of the weight that are not dropped; None: all.
        scale: the factor of those elements.

    Returns:
        out (T, B, H), and if c is given c after the last step, (B, H).
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, y: Tensor, h: Tensor, c: Tensor | None, weight: Tensor, bias: Tensor | None,
        mask: Tensor | None, keep: Tensor | None, scale: float,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        T, (B, H) = len(y), h.shape
        out = y.new_empty(T + 1, B, H)  # h before the first step, then after each one
        out[0] = h
        states, inner = out, None
        if c is None:
            inner = y.new_empty(T, B, H)  # the recurrent product of the new gate
        else:
            states = y.new_empty(T + 1, B, H)
            states[0] = c
        kernels.run("forward", weight, keep, bias, mask, y, states, out, inner, scale=scale, T=T)
        ctx.save_for_backward(y, out, states, inner, weight, mask, keep)
        ctx.kernels, ctx.scale = kernels, scale
        return out[1:] if c is None else (out[1:], states[-1].clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor | None = None) -> tuple[Tensor | None, ...]:
        gates, out, states, inner, weight, mask, keep = ctx.saved_tensors
        (T, B, H), d_out = d_out.shape, d_out.contiguous()
        largest = torch.linalg.vector_norm(d_out, torch.inf)
        d_c = None
        if d_last is not None:
            d_last = d_last.contiguous()
            largest, d_c = torch.maximum(largest, torch.linalg.vector_norm(d_last, torch.inf)), torch.empty_like(d_last)
        d_gates, d_h = torch.empty_like(gates), d_out.new_empty(B, H)
        d_inner = None if inner is None else inner.clone()
        given = keep, mask, gates, states, d_inner, d_out, d_last, largest
        ctx.kernels.run("backward", weight, *given, d_gates, d_h, d_c, scale=ctx.scale, T=T)

        before = (out[:-1] if mask is None else out[:-1] * mask).flatten(0, 1)  # (N, H)
        rows, d_bias = d_gates.flatten(0, 1), None  # (N, G·H)
        if d_inner is None:
            d_weight = rows.T @ before
        else:  # the new gate's rows have another gradient
            d_weight, new = torch.empty_like(weight), d_inner.flatten(0, 1)  # (N, H)
            torch.mm(rows[:, : 2 * H].T, before, out=d_weight[: 2 * H])
            torch.mm(new.T, before, out=d_weight[2 * H :])
            d_bias = torch.cat([rows[:, : 2 * H].sum(0), new.sum(0)])
        if keep is not None:
            d_weight = torch.ops.aten.native_dropout_backward(d_weight, keep, ctx.scale)
        return None, d_gates, d_h, d_c, d_weight, d_bias, None, None, None


def draw_keep(weight: Tensor, p: float) -> tuple[Tensor | None, float]:
    """The mask of weight drop with probability p, True where an element is kept, and the factor of those elements.

    On CUDA `F.dropout` draws its mask by the same function. So a run draws the same masks with and without the kernels.
    """
    if p == 0:
        return None, 1.0
    _, keep = torch.native_dropout(weight.detach(), p, True)
    return keep, 1 / (1 - p)


def gated(
    kernels: Kernels, x: Tensor, hidden: tuple[Tensor, ...], weights: list[Tensor], wdrop: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An LSTM or a GRU: x (T, B, E) and the state before it, (1, B, H) each -> out (T, B, H) and the state after it.

    weights: input (G·H, E), recurrent, raw (G·H, H), and their biases (G·H,); wdrop: the probability of weight drop.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    keep, scale = draw_keep(weight_hh, wdrop)
    if len(hidden) == 1:  # a GRU needs both biases
        y = F.linear(x, weight_ih, bias_ih)
        out = Recurrence.apply(kernels, y, hidden[0][0], None, weight_hh, bias_hh, None, keep, scale)
        return out, (out[-1:].clone(),)
    y = F.linear(x, weight_ih, bias_ih + bias_hh)
    out, c = Recurrence.apply(kernels, y, hidden[0][0], hidden[1][0], weight_hh, None, None, keep, scale)
    return out, (out[-1:].clone(), c[None])


def melis(
    kernels: Kernels, x: Tensor, h: Tensor, c: Tensor, mask: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """As `MogrifierScan` without rounds; weights: weight_ih (4H, E), weight_hh (4H, H), bias (4H,)."""
    weight_ih, weight_hh, bias = weights
    y = F.linear(x, weight_ih, bias)
    return Recurrence.apply(kernels, y, h, c, weight_hh, None, mask, None, 1.0)
