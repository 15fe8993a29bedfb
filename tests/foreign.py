"""Files of other programs, made for tests: the classes, attributes and pickles that they had, around random weights.

The classes have the names of the originals, in modules that exist only while a file is written. A reference computes
the log-probabilities of the weights in float64, from each original's own formula.
"""

import contextlib
import copyreg
import pickle
import struct
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

WORDS = ["<unk>", *(f"w{i}" for i in range(39)), "<eos>"]  # those of conftest's corpus


class Weights(NamedTuple):
    """A model, in float32. layers: weight_ih, weight_hh, bias_ih, bias_hh each; a QRNN's weight and bias."""

    kind: str
    embedding: Tensor
    layers: list[list[Tensor]]
    decoder: Tensor
    bias: Tensor
    splits: list[int]
    tail_vectors: Tensor  # (K, E), as the original counts: the last row belongs to the first cluster
    tail_bias: Tensor

    @property
    def tied(self) -> bool:
        return self.decoder is self.embedding


def draw(
    kind: str, sizes: list[int], tied: bool, splits: tuple[int, ...] = (), bias: bool = True, V: int = len(WORDS)
) -> Weights:
    """Random weights of layers of these widths, the embedding's first."""
    torch.manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size) / 2

    layers = []
    for i, (E, H) in enumerate(pairwise(sizes)):
        if kind == "QRNN":
            layers.append([randn(3 * H, (2 if i == 0 else 1) * E), randn(3 * H)])
        else:
            G = {"LSTM": 4, "GRU": 3}[kind]
            layers.append([randn(G * H, E), randn(G * H, H), randn(G * H), randn(G * H)])
    embedding = randn(V, sizes[0])
    decoder = embedding if tied else randn(V, sizes[-1])
    K, H = len(splits), sizes[-1]
    out = randn(V) if bias else torch.zeros(V)
    return Weights(kind, embedding, layers, decoder, out, list(splits), randn(K, H), randn(K))


# The reference


@torch.no_grad()
def reference(w: Weights, x: Tensor) -> Tensor:
    """Log-probabilities in float64 of the words after each of x (T, B): (T, B, V)."""
    h = w.embedding.double()[x]
    for weights in w.layers:
        if w.kind == "QRNN":
            h = run_qrnn(h, *(tensor.double() for tensor in weights))
        else:
            rnn = getattr(nn, w.kind)(h.size(2), weights[1].size(1)).double()
            for parameter, tensor in zip(rnn.parameters(), weights, strict=True):
                parameter.copy_(tensor)
            h = rnn(h)[0]
    decoder, bias = w.decoder.double(), w.bias.double()
    if not w.splits:
        return (h @ decoder.T + bias).log_softmax(-1)
    return split_logprob(h, decoder, bias, [0, *w.splits, 10**8], w.tail_vectors.double(), w.tail_bias.double())


def run_qrnn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    c, rows, before = torch.zeros(x.size(1), len(bias) // 3, dtype=x.dtype), [], torch.zeros_like(x[0])
    for x_t in x:
        source = torch.cat([x_t, before], 1) if weight.size(1) == 2 * x.size(2) else x_t
        z, f, o = (source @ weight.T + bias).chunk(3, 1)
        c = f.sigmoid() * z.tanh() + (1 - f.sigmoid()) * c
        rows.append(o.sigmoid() * c)
        before = x_t
    return torch.stack(rows)


def split_logprob(h: Tensor, weight: Tensor, bias: Tensor, splits: list[int], vectors: Tensor, tails: Tensor) -> Tensor:
    """The original's counting: cluster k has entry -k of the head."""
    first = splits[1]
    head = (h @ torch.cat([weight[:first], vectors]).T + torch.cat([bias[:first], tails])).log_softmax(-1)
    parts = [head[..., :first]]
    for k in range(1, len(splits) - 1):
        rows = slice(splits[k], splits[k + 1])
        parts.append(head[..., -k, None] + (h @ weight[rows].T + bias[rows]).log_softmax(-1))
    return torch.cat(parts, -1)


# The classes of the originals


class RNNModel(nn.Module):
    """Of word_language_model and of awd-lstm-lm."""


class WeightDrop(nn.Module):
    def __init__(self, module: nn.Module, weight: str) -> None:
        super().__init__()
        self.module, self.weights, self.dropout, self.variational = module, [weight], 0.5, False
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters = self.widget_demagnetizer_y2k_edition  # pickled as getattr(self, ...)
        raw = module._parameters.pop(weight)
        module.register_parameter(f"{weight}_raw", nn.Parameter(raw.data))
        module.register_parameter(weight, nn.Parameter(raw.data * (torch.rand_like(raw) < 0.5)))  # the last batch's

    def widget_demagnetizer_y2k_edition(*args: Any, **kwargs: Any) -> None:
        return


class QRNNLayer(nn.Module):
    def __init__(self, linear: nn.Module, window: int, **attributes: Any) -> None:
        super().__init__()
        self.linear, self.window, self.prevX = linear, window, torch.randn(1, 3, 4)
        self.zoneout, self.output_gate, self.save_prev_x, self.use_cuda = 0, True, True, True
        self.__dict__.update(attributes)


class SplitCrossEntropyLoss(nn.Module):
    def __init__(self, w: Weights) -> None:
        super().__init__()
        self.splits, self.verbose, self.stats = [0, *w.splits, 100 * 1000000], False, {}
        self.nsplits = len(self.splits) - 1
        if w.splits:
            self.tail_vectors, self.tail_bias = nn.Parameter(w.tail_vectors), nn.Parameter(w.tail_bias)


class LayerNormLSTM(nn.LSTM):
    """Somebody's own, with the names of torch's."""


class Dictionary:
    def __init__(self, words: list[str]) -> None:
        self.word2idx, self.idx2word = {word: i for i, word in enumerate(words)}, list(words)


class Corpus:
    def __init__(self, words: list[str]) -> None:
        self.dictionary, self.train = Dictionary(words), torch.arange(20)


class Vocab:
    """Of fastai."""

    def __init__(self, words: list[str]) -> None:
        self.itos, self.stoi = list(words), {word: i for i, word in enumerate(words)}


MODULES = {  # where the originals had them
    RNNModel: "model", WeightDrop: "weight_drop", QRNNLayer: "torchqrnn.qrnn", LayerNormLSTM: "custom",
    SplitCrossEntropyLoss: "splitcross", Dictionary: "data", Corpus: "data", Vocab: "fastai.text.transform",
}  # fmt: skip
for _cls, _module in MODULES.items():
    _cls.__module__ = _module


@contextlib.contextmanager
def modules_there() -> Iterator[None]:
    """While entered, the classes can be found under their modules' names, where pickle looks for them."""
    before = dict(sys.modules)
    for cls in MODULES:
        parts = cls.__module__.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            if name not in sys.modules or sys.modules[name] is before.get(name):
                sys.modules[name] = types.ModuleType(name)  # ours of the same name is hidden, too
        setattr(sys.modules[cls.__module__], cls.__name__, cls)
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


# The layouts


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    module = nn.Linear(*reversed(weight.shape))
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    return module


def ends(model: nn.Module, w: Weights) -> nn.Module:
    """The embedding, the decoder and the attributes of both kinds of RNNModel."""
    model.encoder = nn.Embedding(*w.embedding.shape)
    model.encoder.weight = nn.Parameter(w.embedding)
    model.decoder = linear(w.decoder, w.bias)
    if w.tied:
        model.decoder.weight = model.encoder.weight
    model.rnn_type, model.nhid, model.nlayers = w.kind, len(w.layers[0][-1]), len(w.layers)
    return model


def word_language_model(w: Weights) -> nn.Module:
    """PyTorch's example, colorlessgreenRNNs, neural-complexity."""
    model, H = RNNModel(), w.layers[0][1].size(1)
    model.drop = nn.Dropout(0.2)
    model.rnn = getattr(nn, w.kind)(w.embedding.size(1), H, len(w.layers))
    for name, tensor in zip(model.rnn._flat_weights_names, [t for layer in w.layers for t in layer], strict=True):
        setattr(model.rnn, name, nn.Parameter(tensor))
    return ends(model, w)


def awd_lstm_lm(w: Weights, wdrop: bool = True) -> list[Any]:
    """[model, criterion, optimizer], as salesforce's saves them."""
    model, rnns = RNNModel(), []
    for i, weights in enumerate(w.layers):
        if w.kind == "QRNN":
            module = linear(*weights)
            rnns.append(QRNNLayer(WeightDrop(module, "weight") if wdrop else module, 2 if i == 0 else 1))
        else:
            rnn = getattr(nn, w.kind)(weights[0].size(1), weights[1].size(1))
            for name, tensor in zip(rnn._flat_weights_names, weights, strict=True):
                setattr(rnn, name, nn.Parameter(tensor))
            rnns.append(WeightDrop(rnn, "weight_hh_l0") if wdrop else rnn)
    model.rnns = nn.ModuleList(rnns)
    ends(model, w)
    optimizer = torch.optim.ASGD(model.parameters(), lr=30)
    return [model, SplitCrossEntropyLoss(w), optimizer]


def torchqrnn(w: Weights) -> dict[str, Tensor]:
    """A word_language_model with torchqrnn's QRNN, which has its layers within."""
    layers = {f"rnn.layers.{i}.linear.{name}": tensor for i, layer in enumerate(w.layers)
              for name, tensor in zip(("weight", "bias"), layer, strict=True)}  # fmt: skip
    return layers | {"encoder.weight": w.embedding, "decoder.weight": w.decoder, "decoder.bias": w.bias}


def fastai(w: Weights, version: float) -> Any:
    """0.7: without a decoder bias; 1: in a dict, with the copy that weight drop leaves."""
    state: OrderedDict[str, Any] = OrderedDict({"0.encoder.weight": w.embedding})
    state["0.encoder_with_dropout.embed.weight" if version < 1 else "0.encoder_dp.emb.weight"] = w.embedding
    for i, weights in enumerate(w.layers):
        if w.kind == "QRNN":  # MultiFiT
            prefix = f"0.rnns.{i}.layers.0.linear" if version < 2 else f"0.rnns.{i}.linear"
            state |= {f"{prefix}.weight_raw": weights[0], f"{prefix}.module.bias": weights[1]}
            state[f"{prefix}.module.weight"] = weights[0] * 0.5
            continue
        prefix = f"0.rnns.{i}"
        state[f"{prefix}.module.weight_ih_l0"], hh = weights[0], weights[1]
        state[f"{prefix}.module.weight_hh_l0_raw" if version < 1 else f"{prefix}.weight_hh_l0_raw"] = hh
        if version >= 1:
            state[f"{prefix}.module.weight_hh_l0"] = hh * (torch.rand_like(hh) < 0.5)
        state |= {f"{prefix}.module.bias_ih_l0": weights[2], f"{prefix}.module.bias_hh_l0": weights[3]}
    state["1.decoder.weight"] = w.decoder
    if version < 1:
        return state
    return {"model": state | {"1.decoder.bias": w.bias}, "opt": {"state": {0: {"step": 3}}, "lr": [1e-3]}}


# The pickles of the time


def rnn_of_the_time(rnn: nn.RNNBase) -> dict[str, Any]:
    """The attributes that torch 0.3 gave an LSTM or GRU."""
    new = ("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "proj_size")
    state = {name: value for name, value in rnn.__dict__.items() if name not in new}
    return state | {"dropout_state": {}, "_data_ptrs": []}


class Torch03(pickle.Pickler):
    """A parameter is the call Parameter(data) with a state, a tensor of the first kind."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return nn.Parameter, (value.data,), (value.requires_grad, False, OrderedDict())
        if isinstance(value, Tensor):
            where = value._typed_storage(), value.storage_offset(), tuple(value.size()), value.stride()
            return torch._utils._rebuild_tensor, where
        if isinstance(value, nn.RNNBase):
            return copyreg.__newobj__, (type(value),), rnn_of_the_time(value)
        return NotImplemented


class Torch1(pickle.Pickler):
    """As today, but for the attributes of an LSTM."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.RNNBase):
            return copyreg.__newobj__, (type(value),), rnn_of_the_time(value)
        return NotImplemented


class Python2(pickle._Pickler):
    """Text is bytes, an OrderedDict the call OrderedDict(pairs)."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    reducer_override = Torch03.reducer_override

    def save_text(self, text: str) -> None:
        data = text.encode()
        self.write(b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    def save_ordered(self, value: OrderedDict) -> None:
        self.save_reduce(OrderedDict, ([[key, part] for key, part in value.items()],), obj=value)

    dispatch[str], dispatch[OrderedDict] = save_text, save_ordered


ERAS = {"torch 0.3": Torch03, "Python 2": Python2, "torch 1": Torch1, "today": pickle.Pickler}


def save(value: Any, path: Path, zipped: bool = False, era: str = "torch 0.3") -> Path:
    """Writes a file as torch.save did at that time, in the old format or as a zip."""

    class Dumping(ERAS[era]):  # torch derives its pickler from this one
        pass

    def dump(value: Any, file: Any, protocol: int) -> None:
        ERAS[era](file, protocol).dump(value)

    module = types.ModuleType("pickle_of_the_time")
    module.Pickler, module.dump = Dumping, dump
    with modules_there(), warnings.catch_warnings(action="ignore"):  # of sources that are not found
        torch.save(value, path, pickle_module=module, _use_new_zipfile_serialization=zipped)
    return path


def dump(value: Any, path: Path, protocol: int = 4) -> Path:
    """Writes a plain pickle."""
    with modules_there():
        path.write_bytes(pickle.dumps(value, protocol))
    return path
