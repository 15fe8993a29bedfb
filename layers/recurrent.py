"""The interface of every kind of recurrent layer, and the common part of LSTM and GRU.

Shapes: T time, B batch, E input features, H hidden, G gates (4 in an LSTM, 3 in a GRU).

Method: Merity, Keskar, Socher, arXiv 1708.02182 ("AWD"), section 2.
"""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layers import persistent
from layers.weight_drop import drop_weight
from products import exact_or_bf16

# What a layer carries from one batch to the next, each tensor (1, B, ·): LSTM and Mogrifier (h, c), GRU (h,),
# QRNN (c,), its first layer (c, last input).
Hidden = tuple[Tensor, ...]

BLOCK = 8  # steps whose elementwise work a CPU does at once: the intermediate results fit the cache


def truncated_normal_(tensor: Tensor, std: float) -> None:
    """A normal distribution cut off at two deviations, of deviation `std` after the cut."""
    std /= 0.8796256610342398  # the deviation of a standard normal that is cut off at ±2
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def blocks_of_steps(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors (T, ...), cut into blocks of steps; a GPU has one block, which takes the fewest kernels."""
    steps = BLOCK if tensors[0].device.type == "cpu" else len(tensors[0])
    return zip(*(tensor.split(steps) for tensor in tensors), strict=True)


class RecurrentLayer(nn.Module):
    """The interface of a layer. A new kind is a subclass and a row of `LAYERS` in model.py.

    With weight drop a dropped parameter is called `..._raw`, and each of them gets one mask per batch by `drop_weight`.
    A kind without weight drop has 0 in `defaults["wdrop"]`, and another value of the flag is refused.

    Args:
        input_size, hidden_size: E and H.
        wdrop: the probability of weight drop.
        first: whether it is the first layer, the one above the embedding.
        options: the settings that `options` names.
    """

    locked: ClassVar[bool] = True  # whether one dropout mask serves all time steps of a batch
    summed: ClassVar[bool] = False  # whether the softmax is given the sum of all layers' outputs, not the last one
    residual: ClassVar[bool] = False  # whether a layer is given the sum of all outputs before it, not the last one
    normal_embedding: ClassVar[bool] = False  # whether fresh embeddings are normal of deviation 1/sqrt(E), not ±0.1
    options: ClassVar[tuple[str, ...]] = ()  # names of further settings that its constructor takes
    defaults: ClassVar[dict[str, float]] = {}  # settings of main.py whose defaults differ for this kind

    hidden_size: int
    padded: bool = False  # fill up widths to whole 16 bytes, which a GPU multiplies faster; other kinds ignore it
    persistent: bool = False  # train with the kernels of persistent.cu, on a CUDA device; other kinds ignore it

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draws the initial weights."""

    @abstractmethod
    def init_hidden(self, batch_size: int) -> Hidden:
        """The state before a text's first word: zeros, (1, B, ·) each, with the parameters' dtype and device."""

    @abstractmethod
    def forward(self, x: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """x (T, B, E) and the state after the batch before -> out (T, B, H) and the state after this one."""


class WriteInto(torch.autograd.Function):
    """Copies `value` into `slot`, part of a buffer that exists already; for gradients it is the identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slot: Tensor) -> Tensor:
        ctx.mark_dirty(slot)
        return slot.copy_(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class GatedLayer(RecurrentLayer):
    """An LSTM or GRU layer with weight drop on its hidden-to-hidden matrix (AWD, section 2).

    `kernel` computes the recurrence: torch's kernel (oneDNN, cuDNN), or on the CPU one of this folder. The parameters
    belong to this module: the kernel gets the dropped matrix, while the raw one is trained and saved.

    Parameters: weight_ih_l0 (G·H, E), weight_hh_l0_raw (G·H, H) (weight_hh_l0 when `wdrop` is 0),
    bias_ih_l0, bias_hh_l0 (G·H,).
    """

    cell: ClassVar[str]  # its name in persistent.py
    gates: ClassVar[int]  # G
    state_tensors: ClassVar[int]  # tensors carried from batch to batch
    cudnn_mode: ClassVar[int]  # cuDNN's number for this kind of layer

    def __init__(self, input_size: int, hidden_size: int, wdrop: float, first: bool) -> None:
        super().__init__()
        self.hidden_size, self.wdrop = hidden_size, wdrop
        rows = self.gates * hidden_size
        self.weight_ih_l0 = nn.Parameter(torch.empty(rows, input_size))
        self.recurrent_name = "weight_hh_l0_raw" if wdrop else "weight_hh_l0"
        self.register_parameter(self.recurrent_name, nn.Parameter(torch.empty(rows, hidden_size)))
        self.bias_ih_l0 = nn.Parameter(torch.empty(rows))
        self.bias_hh_l0 = nn.Parameter(torch.empty(rows))
        self.slot: Tensor | None = None  # the recurrent matrix's place in cuDNN's flat buffer

    def reset_parameters(self) -> None:
        """Uniform ±1/sqrt(H), as in torch."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    @staticmethod
    @abstractmethod
    def kernel(x: Tensor, hidden: Hidden, weights: list[Tensor], training: bool) -> tuple[Tensor, Hidden]:
        """As `forward`; weights: input, recurrent, and their biases."""

    def flat(self, weight_hh: Tensor) -> Tensor:
        """The recurrent matrix, copied to its place between the other weights in cuDNN's flat buffer."""
        return WriteInto.apply(weight_hh, self.make_flat(weight_hh).detach())

    def make_flat(self, weight_hh: Tensor) -> Tensor:
        """The recurrent matrix's place in cuDNN's flat buffer.

        cuDNN reads its weights from one buffer. If they lie elsewhere, as a dropped matrix does, torch copies all of
        them into a new buffer at every call, and warns. So the buffer is made once, the parameters are moved into it as
        `nn.LSTM.flatten_parameters` would, and per batch only the dropped matrix is copied.
        """
        others = [self.weight_ih_l0, self.bias_ih_l0, self.bias_hh_l0]
        buffers = {p.untyped_storage().data_ptr() for p in others}
        if self.slot is None or buffers != {self.slot.untyped_storage().data_ptr()}:  # new, or moved by .to()
            self.slot = torch.empty_like(weight_hh)
            weights = [self.weight_ih_l0, self.slot, self.bias_ih_l0, self.bias_hh_l0]
            sizes = self.weight_ih_l0.size(1), self.cudnn_mode, self.hidden_size
            with torch.no_grad():  # 4 tensors per layer; no projection, 1 layer, time first, one direction
                torch._cudnn_rnn_flatten_weight(weights, 4, *sizes, 0, 1, False, False)
        return self.slot

    def forward(self, x: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        raw = self.get_parameter(self.recurrent_name)
        by_cudnn = x.device.type == "cuda" and torch.backends.cudnn.is_acceptable(raw)
        if by_cudnn:  # before anything else: it moves the parameters, which a CUDA graph then has to find in place
            self.make_flat(raw)
        weights: list[Tensor] = [self.weight_ih_l0, raw, self.bias_ih_l0, self.bias_hh_l0]
        if self.persistent and self.training and (kernels := persistent.pick_kernels(self.cell, x, raw)):
            return persistent.gated(kernels, x, hidden, weights, self.wdrop)
        weight_hh = drop_weight(raw, self.wdrop, self.training)
        if by_cudnn:
            weight_hh = self.flat(weight_hh)
        weight_ih: Tensor = self.weight_ih_l0
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast and x.device.type == "cpu":  # the layers' own passes round products only, not the state
            dtype = exact_or_bf16(raw)
            weight_ih, weight_hh = weight_ih.to(dtype), weight_hh.to(dtype)
            autocast, x = False, x.to(raw.dtype)
        weights = [weight_ih, weight_hh, self.bias_ih_l0, self.bias_hh_l0]
        with torch.autocast(x.device.type, enabled=autocast):
            return self.kernel(x, hidden, weights, self.training)

    def init_hidden(self, batch_size: int) -> Hidden:
        size = (1, batch_size, self.hidden_size)
        return tuple(self.bias_hh_l0.new_zeros(size) for _ in range(self.state_tensors))
