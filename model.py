"""The language model: word-type dropout, the recurrent layers, the decoder, and the criterion beside them.

Shapes: T time, B batch, E embedding (`emsize`), H hidden (`nhid`), V vocabulary (`ntoken`), N = T·B. Time comes
first: a batch of words is (T, B), and column b goes on where column b of the batch before it ended.

    words (T, B) -> embedding, word-type dropout, locked dropout        (T, B, E)
                 -> layer 1, locked dropout -> ... -> layer L           (T, B, E when tied, else H)
                 -> locked dropout -> output                            (N, E)
    The decoder's weight (tied to the embedding) and bias belong to the model. The criterion multiplies by them,
    because a split softmax never needs all of the logits.

Method: Merity, Keskar, Socher, arXiv 1708.02182 ("AWD"), section 4 for the dropouts.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.gru import GRU
from layers.lstm import LSTM
from layers.mogrifier import Mogrifier
from layers.qrnn import QRNN
from layers.recurrent import Hidden, RecurrentLayer, truncated_normal_
from layers.rlstm import RLSTM
from layers.weight_drop import ElementDropout, LockedDropout
from mos import MixtureOfSoftmaxes
from splitcross import SplitCrossEntropyLoss, default_splits
from utils import not_a_command

Criterion = SplitCrossEntropyLoss | MixtureOfSoftmaxes  # the output layer, made by `build` beside the model
# The choices of --model.
LAYERS: dict[str, type[RecurrentLayer]] = {"LSTM": LSTM, "GRU": GRU, "QRNN": QRNN, "Mogrifier": Mogrifier}
CELLS: dict[str, type[Mogrifier]] = {"lstm": Mogrifier, "rlstm": RLSTM}  # the choices of --cell, with --model Mogrifier
# The settings that are dropout probabilities. dropoutl belongs to the mixture, dropoutr to some kinds of layers.
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop", "dropoutl", "dropoutr")


def kind_of_layer(name: str, cell: str = "lstm") -> type[RecurrentLayer]:
    """The class of a kind of layer, a Mogrifier's by its cell; raises ValueError when there is no such kind."""
    if name not in LAYERS:
        raise ValueError(f"--model {name!r}: use one of {', '.join(LAYERS)}")
    if cell not in CELLS:
        raise ValueError(f"--cell {cell!r}: use one of {', '.join(CELLS)}")
    return CELLS[cell] if LAYERS[name] is Mogrifier else LAYERS[name]


class Decoder(nn.Module):
    """Weight (V, E) and bias (V,) of the output layer; a tied weight belongs to the embedding and is saved there."""

    def __init__(self, encoder: nn.Embedding, nhid: int, tie_weights: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(encoder.num_embeddings))
        if tie_weights:
            self.tied_to = (encoder,)  # in a tuple, which makes it no submodule: the parameter has one name only
        else:
            self.weight = nn.Parameter(torch.empty(encoder.num_embeddings, nhid))

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "tied_to" in self.__dict__:
            return self.tied_to[0].weight
        return super().__getattr__(name)

    def forward(self, output: Tensor) -> Tensor:
        """(N, E) -> all logits, (N, V), of a model without a split softmax."""
        return F.linear(output, self.weight, self.bias)


def embedded_dropout(encoder: nn.Embedding, words: Tensor, p: float, training: bool) -> Tensor:
    """Embedding with dropout of whole word types (AWD, section 4.3): (T, B) -> (T, B, E).

    One draw per type and batch, scaled by 1/(1-p). The words of the batch look up their draws: multiplying the mask
    into the (V, E) matrix would pass over all of it, forward and backward.
    """
    if words.is_cuda:  # torch's backward pass of an embedding has a race on CUDA for 1,025 to 3,072 words
        embedded = encoder.weight.index_select(0, words.flatten()).view(*words.shape, -1)
    else:
        embedded = encoder(words)
    if not training or p == 0:
        return embedded
    keep = encoder.weight.new_empty(encoder.num_embeddings, 1).bernoulli_(1 - p).div_(1 - p)  # (V, 1)
    return embedded * keep[words]  # (T, B, E) * (T, B, 1)


class RNNModel(nn.Module):
    """Embedding, `nlayers` recurrent layers, decoder, and the dropouts between them.

    Args:
        rnn_type, cell: keys of `LAYERS` and `CELLS`.
        ntoken, ninp, nhid, nlayers: V, E, H and the number of layers.
        dropout, dropouth, dropouti: locked dropout after the last layer, between layers, on the embedding.
        dropoute: dropout of whole word types.  wdrop: weight drop.
        tie_weights: the decoder's weight is the embedding's; the last layer is then E wide.
        nhidlast: another width of the last layer; 0: E if tied, else H.
        mixture: the criterion is a mixture, which takes any width; the decoder's weight is then E wide.
        options: further settings of this kind of layer (`RecurrentLayer.options`).

    Raises:
        ValueError: there is no such kind of layer, or the widths do not fit each other or a tied weight.
    """

    def __init__(
        self, rnn_type: str, ntoken: int, ninp: int, nhid: int, nlayers: int,
        dropout: float = 0.4, dropouth: float = 0.3, dropouti: float = 0.65, dropoute: float = 0.1,
        wdrop: float = 0.5, tie_weights: bool = True, nhidlast: int = 0, mixture: bool = False, cell: str = "lstm",
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        kind, self.dropoute = kind_of_layer(rnn_type, cell), dropoute
        drop: type[nn.Module] = LockedDropout if kind.locked else ElementDropout
        self.drop_input, self.drop_between, self.drop_output = map(drop, (dropouti, dropouth, dropout))
        self.encoder = nn.Embedding(ntoken, ninp, _weight=torch.empty(ntoken, ninp))
        last = nhidlast or (ninp if tie_weights or mixture else nhid)
        if tie_weights and last != ninp and not mixture:
            raise ValueError(
                f"--nhidlast {last}: with a tied weight the last layer has to be as wide as --emsize {ninp}; give "
                "--untied or --n_experts too, or leave it out"
            )
        sizes = [ninp, *[nhid] * (nlayers - 1), last]
        if kind.summed and last != nhid:
            raise ValueError(
                f"--nhid {nhid}: a {rnn_type}'s layers are summed, and have to be as wide as the last, {last}; "
                f"give --nhid {last}"
            )
        self.rnns = nn.ModuleList(kind(sizes[i], sizes[i + 1], wdrop, first=i == 0, **options) for i in range(nlayers))
        self.width = last  # of the criterion's input
        self.decoder = Decoder(self.encoder, ninp if mixture else last, tie_weights)
        self.reset_parameters()

    @property
    def layers(self) -> list[RecurrentLayer]:
        return cast(list[RecurrentLayer], list(self.rnns))

    def reset_parameters(self) -> None:
        """Zero for the decoder's bias; layers draw their own weights.

        The embedding and an untied decoder are uniform ±0.1, or if the kind of layer says so truncated normals of
        deviation 1/sqrt(width), as in LAMB, the code of Melis et al.
        """
        nn.init.zeros_(self.decoder.bias)
        tied = self.decoder.weight is self.encoder.weight
        for weight in [self.encoder.weight] if tied else [self.encoder.weight, self.decoder.weight]:
            if self.layers[0].normal_embedding:
                truncated_normal_(weight, weight.size(1) ** -0.5)
            else:
                nn.init.uniform_(weight, -0.1, 0.1)
        for layer in self.layers:
            layer.reset_parameters()

    def forward(
        self, words: Tensor, hidden: list[Hidden], return_h: bool = False
    ) -> tuple[Tensor, list[Hidden]] | tuple[Tensor, list[Hidden], list[Tensor], list[Tensor]]:
        """Runs over a batch.

        Args:
            words: (T, B), integers in [0, V).
            hidden: one entry per layer, from `init_hidden` or from the batch before.
            return_h: also return `raw` and `dropped`, for the regularisation and the cache pointer.

        Returns:
            output: (N, E), the input of the criterion (or the decoder).
            hidden: the state after this batch, still attached to the graph: `detach` it.
            raw: every layer's output, (T, B, ·); where layers are summed, the last one is the sum.
            dropped: the same after their dropouts.
        """
        x = self.drop_input(embedded_dropout(self.encoder, words, self.dropoute, self.training))  # (T, B, E)
        new_hidden: list[Hidden] = []
        raw: list[Tensor] = []
        dropped: list[Tensor] = []
        for i, (layer, carried) in enumerate(zip(self.layers, hidden, strict=True)):
            last = i == len(hidden) - 1
            x, carried = layer(x, carried)  # (T, B, H)
            if layer.summed and last:
                x = sum(raw, x)
            raw.append(x)
            x = self.drop_output(x) if last else self.drop_between(x)
            dropped.append(x)
            if layer.residual and not last:
                x = sum(dropped[:-1], x)
            new_hidden.append(carried)
        output = x.flatten(0, 1)  # (N, E)
        return (output, new_hidden, raw, dropped) if return_h else (output, new_hidden)

    def init_hidden(self, batch_size: int) -> list[Hidden]:
        """The state before the first word of a text: zeros, one entry per layer."""
        return [layer.init_hidden(batch_size) for layer in self.layers]


def detach(hidden: list[Hidden]) -> list[Hidden]:
    """The same values without their graph: backpropagation is truncated here."""
    return [tuple(tensor.detach() for tensor in carried) for carried in hidden]


def start_again(hidden: list[Hidden], columns: Tensor) -> list[Hidden]:
    """The hidden state with zeros in the columns (B,) that are True, as at a text's first word."""
    if not columns.any():
        return hidden
    columns = columns.to(hidden[0][0].device)[:, None]  # (B, 1)
    return [tuple(tensor.masked_fill(columns, 0) for tensor in carried) for carried in hidden]


def parts_of(weights: nn.ModuleDict) -> tuple[RNNModel, Criterion]:
    """The model and the criterion in all weights of a run, or in their mean."""
    return cast(RNNModel, weights["model"]), cast(Criterion, weights["criterion"])


def build(args: dict[str, Any], ntoken: int) -> tuple[RNNModel, Criterion]:
    """The model that the settings describe, and its output layer, the criterion; both freshly initialised.

    Raises:
        ValueError: the settings do not go together, or not with a vocabulary of `ntoken` words.
    """
    older = {"n_experts": 0, "nhidlast": 0, "splits": None, "cell": "lstm", "chrono": 0.0}  # files can lack these
    args = {**older, **dict.fromkeys(DROPOUTS, 0.0), **args}
    n_experts, splits, options = args["n_experts"], args["splits"], kind_of_layer(args["model"], args["cell"]).options
    dropouts = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
    model = RNNModel(
        args["model"], ntoken, args["emsize"], args["nhid"], args["nlayers"], tie_weights=args["tied"],
        nhidlast=args["nhidlast"], mixture=n_experts > 0, cell=args["cell"],
        **{name: args[name] for name in (*dropouts, *options)},
    )  # fmt: skip
    if n_experts:
        if splits:
            raise ValueError(f"--n_experts {n_experts}: goes with one softmax only; leave --splits out")
        return model, MixtureOfSoftmaxes(model.width, args["emsize"], n_experts, args["dropoutl"])
    splits = default_splits(ntoken) if splits is None else splits
    if splits and splits[-1] >= ntoken:
        raise ValueError(f"--splits {splits}: the last one has to be below the vocabulary's size, {ntoken}")
    return model, SplitCrossEntropyLoss(model.width, splits)


if __name__ == "__main__":
    not_a_command(__file__)
