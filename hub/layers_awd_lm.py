"""The recurrent layers of modeling_awd_lm.py: LSTM, GRU, QRNN, Mogrifier and RLSTM.

Shapes: B rows, T time, E input features, H hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .configuration_awd_lm import AwdLmConfig

Carried = tuple[Tensor, ...]  # what a layer carries from token to token, each tensor (1, B, ·)


def last_of(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """The last step of each row, (B, T, H) -> (1, B, H); `lengths`: the steps of each row, None: T."""
    return sequence[torch.arange(len(sequence)), -1 if lengths is None else lengths - 1][None]


# Layers. forward(x (B, T, E), carried, lengths) -> out (B, T, H), carried after the last step of each row.


class TorchLayer(nn.RNNBase):
    """A layer of torch. Padded rows are packed: of an LSTM's cells torch gives the last one only."""

    def __init__(self, inputs: int, hidden: int, first: bool, config: AwdLmConfig) -> None:
        super().__init__(inputs, hidden, batch_first=True)  # type: ignore[arg-type,call-arg]

    def forward(self, x: Any, carried: Any, lengths: Tensor | None) -> tuple[Tensor, Carried]:
        single = isinstance(self, nn.GRU)
        carried = carried[0] if single and carried else carried
        packed = x
        if lengths is not None:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, carried = super().forward(packed, carried)
        if lengths is not None:
            out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.size(1))
        return out, (carried,) if single else carried


class LSTM(TorchLayer, nn.LSTM):  # type: ignore[misc]
    """Gates: i, f, g, o."""


class GRU(TorchLayer, nn.GRU):  # type: ignore[misc]
    """Gates: r, z, n."""


class QRNN(nn.Module):
    """Bradbury et al., arXiv 1611.01576: z, f, o = W · x_t, in the first layer W · [x_t, x_{t-1}]; fo-pooling."""

    def __init__(self, inputs: int, hidden: int, first: bool, config: AwdLmConfig) -> None:
        super().__init__()
        self.first = first
        self.linear = nn.Linear(inputs * (2 if first else 1), 3 * hidden)

    def forward(self, x: Tensor, carried: Carried | None, lengths: Tensor | None) -> tuple[Tensor, Carried]:
        if carried is None:
            carried = x.new_zeros(1, len(x), self.linear.out_features // 3), torch.zeros_like(x[:, 0])[None]
        inputs, c, cells = x, carried[0][0], []
        if self.first:
            inputs = torch.cat([x, torch.cat([carried[1].transpose(0, 1), x[:, :-1]], dim=1)], dim=-1)
        z, f, o = self.linear(inputs).chunk(3, -1)
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        for t in range(x.size(1)):
            c = torch.lerp(c, z[:, t], f[:, t])
            cells.append(c)
        c = torch.stack(cells, dim=1)
        return o * c, (last_of(c, lengths), *([last_of(x, lengths)] if self.first else []))


def make_round(source: int, to: int, rank: int) -> nn.ParameterDict:
    """A Mogrifier's round: the factors `a` and `b` of a matrix, or with rank 0 the matrix `weight`; a bias."""
    shapes = {"a": (source, rank), "b": (rank, to)} if rank else {"weight": (source, to)}
    return nn.ParameterDict({name: torch.zeros(shape) for name, shape in (shapes | {"bias": (to,)}).items()})


def gate(source: Tensor, weights: Any) -> Tensor:
    """2σ(source · A · B + bias)."""
    product = source @ weights["a"] @ weights["b"] if "a" in weights else source @ weights["weight"]
    return 2 * (product + weights["bias"]).sigmoid()


class Mogrifier(nn.Module):
    """Melis et al., arXiv 1909.01792; without rounds the LSTM of arXiv 1707.05589. Gates: i, f, g, o."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor

    def __init__(self, inputs: int, hidden: int, first: bool, config: AwdLmConfig) -> None:
        super().__init__()
        for name, shape in self.shapes(inputs, hidden).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        sizes = inputs, hidden
        self.rounds = nn.ModuleList(
            make_round(sizes[r % 2 == 0], sizes[r % 2], config.rank) for r in range(config.rounds)
        )

    @staticmethod
    def shapes(E: int, H: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the cell's parameters."""
        return {"weight_ih": (4 * H, E), "weight_hh": (4 * H, H), "bias": (4 * H,)}

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The cell after the rounds: x (B, E), h and c (B, H) -> h, c."""
        i, f, g, o = (F.linear(x, self.weight_ih, self.bias) + F.linear(h, self.weight_hh)).chunk(4, -1)
        f = f.sigmoid()
        c = f * c + torch.minimum(i.sigmoid(), 1 - f) * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def forward(self, x: Tensor, carried: Carried | None, lengths: Tensor | None) -> tuple[Tensor, Carried]:
        zeros = x.new_zeros(len(x), self.weight_hh.size(1))
        h, c = (zeros, zeros) if carried is None else (carried[0][0], carried[1][0])
        outputs, cells = [], []
        for x_t in x.unbind(1):
            for r, weights in enumerate(self.rounds):
                x_t, h = (x_t, gate(x_t, weights) * h) if r % 2 else (gate(h, weights) * x_t, h)
            h, c = self.step(x_t, h, c)
            outputs.append(h)
            cells.append(c)
        out = torch.stack(outputs, dim=1)
        return out, (last_of(out, lengths), last_of(torch.stack(cells, dim=1), lengths))


class RLSTM(Mogrifier):
    """Melis, arXiv 2211.01848, section 2: another cell after the rounds. Rows: i, j, f, o."""

    weight_fu: Tensor
    weight_oc: Tensor

    @staticmethod
    def shapes(E: int, H: int) -> dict[str, tuple[int, ...]]:
        matrices = {"weight_ih": (2 * H, E), "weight_hh": (3 * H, H), "weight_fu": (H, H), "weight_oc": (H, H)}
        return {**matrices, "bias": (4 * H,)}

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        b_ij, b_f, b_o = self.bias.split([2 * c.size(-1), c.size(-1), c.size(-1)])
        from_h = F.linear(h, self.weight_hh)
        i, j = (F.linear(x, self.weight_ih, b_ij) + from_h[:, : len(b_ij)]).chunk(2, -1)
        i, j = i.sigmoid(), j.tanh()
        f = (F.linear(i * j, self.weight_fu, b_f) + from_h[:, len(b_ij) :]).sigmoid()
        c = f * c + torch.minimum(i, 1 - f) * j
        return F.linear(c, self.weight_oc, b_o).sigmoid() * c.tanh(), c


# Kinds, and cells of a Mogrifier that are not the usual one.
LAYERS: dict[str, Any] = {"LSTM": LSTM, "GRU": GRU, "QRNN": QRNN, "Mogrifier": Mogrifier, "rlstm": RLSTM}
