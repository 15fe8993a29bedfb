"""What the parts of a language model are called in other programs, and what of it makes a saved model of ours.

    word_language_model of PyTorch, and what came of it    rnn.weight_ih_l1                    -> rnns.1.weight_ih_l0
    awd-lstm-lm, LSTM                                      rnns.1.module.weight_hh_l0_raw      -> rnns.1.weight_hh_l0
    awd-lstm-lm, QRNN                                      rnns.1.linear.module.weight_raw     -> rnns.1.linear.weight
    fastai, LSTM                                           0.rnns.1.module.weight_ih_l0        -> rnns.1.weight_ih_l0
    fastai and MultiFiT, QRNN                              0.rnns.1.layers.0.linear.weight_raw -> rnns.1.linear.weight
    fastai, the decoder                                    1.decoder.bias                      -> decoder.bias

The rows of torch's LSTM and GRU and of every QRNN here are in the order of ours, so that no number moves, but for the
tombstones of a split softmax: the original counts them from the last one.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridges.describe import describe, describe_weights, shown
from bridges.pickles import Bag
from bridges.torchfiles import Contents, Stored
from harness.files import FORMATS, MODEL_FORMAT
from splitcross import default_splits
from utils import UserError

DEPTH = 20  # of modules in modules
HOLDERS = ("model", "state_dict", "model_state_dict", "model_state", "net", "learner")  # what may hold the model
RULES = [  # (their name, ours)
    (r"^((module|model|_orig_mod)\.)+", ""),
    (r"^0\.(encoder|rnns)", r"\1"),
    (r"^1\.decoder\.", "decoder."),
    (r"^rnn\.((?:weight|bias)_(?:ih|hh))_l(\d+)$", r"rnns.\2.\1_l0"),
    (r"^rnn\.layers\.(\d+)\.", r"rnns.\1."),
    (r"^(rnns\.\d+)\.layers\.0\.", r"\1."),
    (r"\.module\.", "."),
]
COPY = re.compile(r"encoder_(dp\.emb|with_dropout\.embed)\.weight")  # fastai's second name of the embedding
GATED = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
OURS = re.compile(rf"encoder\.weight|decoder\.(weight|bias)|rnns\.\d{{1,3}}\.({'|'.join(GATED)}|linear\.(weight|bias))")
LAYER = re.compile(r"rnns\.(\d{1,3})\.(.*)")
TORCHS = ("torch.nn.modules.rnn.LSTM", "torch.nn.modules.rnn.GRU", "torch.nn.modules.rnn.RNN")
MISSING_PARTS = {"_reverse": "is bidirectional", "weight_hr": "has an LSTM with a projection of its state"}


class NotConvertibleError(Exception):
    """Why a model cannot become a saved model of ours."""


class Foreign(NamedTuple):
    """The model that was found in a file.

    weights: by their names there; module: None for weights alone; criterion: the split softmax beside it, as a module
    or as weights alone.
    """

    weights: dict[str, Stored]
    module: Bag | None = None
    criterion: Bag | dict[Any, Any] | None = None


class Converted(NamedTuple):
    """The settings and weights of a saved model, and the name of the layout."""

    args: dict[str, Any]
    model: dict[str, Tensor]
    criterion: dict[str, Tensor]
    layout: str


def convert(contents: Contents) -> Converted:
    """What a file holds, as the parts of a saved model.

    Raises:
        UserError: it holds something else, or a model that ours cannot be.
    """
    format = contents.value.get("format") if isinstance(contents.value, dict) else None
    if isinstance(format, str) and format in FORMATS:
        hint = "no need to convert it" if format == MODEL_FORMAT else "give the model itself"
        raise UserError(f"{contents.path}: is {FORMATS[format]} of this toolkit; {hint}")
    found = find_model(contents.value)
    if not found:
        what = describe(contents.value)
        raise UserError(f"{contents.path}: holds {what}, not a language model; docs/convert.md says what is converted")
    try:
        return convert_model(contents, found)
    except NotConvertibleError as error:
        raise UserError(f"{contents.path}: {error}; it cannot be converted, docs/convert.md says what can") from None


def find_model(value: Any, seen: tuple[int, ...] = ()) -> Foreign | None:
    """The model in what a file holds: a module, its weights by name, or one of them within a list, dict or object.

    seen: the objects around `value`, by their ids.
    """
    if isinstance(value, Bag) and isinstance(value.state.get("_modules"), dict):
        return Foreign(dict(tensors_of(value)), value)
    if isinstance(value, Bag):
        value = value.entries or {name: value.state[name] for name in HOLDERS if name in value.state}
    parts = []
    if isinstance(value, list | tuple):
        parts = list(value[:5])
    elif isinstance(value, dict):
        parts = [value[name] for name in HOLDERS if name in value]
    for part in parts if len(seen) < 3 and id(value) not in seen else []:
        if not is_split(part) and (model := find_model(part, (*seen, id(value)))):
            beside = [*parts, value.get("criterion")] if isinstance(value, dict) else parts
            return model._replace(criterion=next(filter(is_split, beside), None))
    if isinstance(value, dict) and any(isinstance(part, Stored) for part in value.values()):
        return Foreign({str(name): part for name, part in value.items() if isinstance(part, Stored)})
    return None


def is_split(value: Any) -> bool:
    """Whether an object is a split softmax, or one without splits."""
    return "splits" in value.state if isinstance(value, Bag) else isinstance(value, dict) and "tail_vectors" in value


def tensors_of(module: Bag) -> Iterator[tuple[str, Stored]]:
    """The parameters and buffers of a module by name; one that has two places is named after the first."""
    seen: set[int] = set()

    def walk(module: Bag, prefix: str, depth: int) -> Iterator[tuple[str, Stored]]:
        seen.add(id(module))
        for part in ("_parameters", "_buffers"):
            for name, value in entries_of(module, part):
                if isinstance(value, Stored):
                    yield f"{prefix}{name}", value
        for name, child in entries_of(module, "_modules"):
            if isinstance(child, Bag) and id(child) not in seen and depth < DEPTH:
                yield from walk(child, f"{prefix}{name}.", depth + 1)

    yield from walk(module, "", 0)


def entries_of(module: Bag, part: str) -> list[tuple[Any, Any]]:
    found = module.state.get(part)
    return list(found.items()) if isinstance(found, dict) else []


def our_name(name: str) -> str:
    for theirs, ours in RULES:
        name = re.sub(theirs, ours, name)
    return name


def rename(weights: dict[str, Stored]) -> tuple[dict[str, Stored], list[Stored]]:
    """The weights under our names, and copies of the embedding.

    A weight that is dropped in training is there as `..._raw`; a copy without that ending has holes of the last batch.

    Raises:
        NotConvertibleError: there are other weights, or not all.
    """
    theirs = {our_name(name): name for name in weights}
    if len(theirs) < len(weights):
        raise NotConvertibleError("has two models, or two weights for one part of a model")
    named = {ours: weights[name] for ours, name in theirs.items()}
    raw = {name.removesuffix("_raw"): weight for name, weight in named.items() if name.endswith("_raw")}
    named = {name: weight for name, weight in named.items() if not name.endswith("_raw")} | raw
    copies = [named.pop(name) for name in list(named) if COPY.fullmatch(name)]
    for part, problem in MISSING_PARTS.items():
        if any(part in name for name in named):
            raise NotConvertibleError(problem)
    odd = {theirs.get(name, name): weight for name, weight in named.items() if not OURS.fullmatch(name)}
    if odd or "encoder.weight" not in named or not any(map(LAYER.fullmatch, named)):
        raise NotConvertibleError(
            f"holds {describe_weights(odd or weights)}: no plain LSTM, GRU or QRNN language model"
        )
    if "decoder.weight" not in named and "decoder.bias" not in named:
        raise NotConvertibleError("holds an embedding and layers without the decoder, which gives probabilities")
    return named, copies


def shape_of(named: dict[str, Stored]) -> dict[str, Any]:
    """The settings that the shapes tell; `last`: the last layer's width; `window`: that of a QRNN's first layer.

    Raises:
        NotConvertibleError: a kind or a width that ours cannot have.
    """
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, weight in named.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = weight.shape
    if sorted(layers) != list(range(len(layers))):
        raise NotConvertibleError(f"lacks a layer: it has the layers {sorted(layers)[:5]}")
    decoder = named.get("decoder.weight", named["encoder.weight"]).shape
    if len(named["encoder.weight"].shape) != 2 or len(decoder) != 2:
        raise NotConvertibleError("has an embedding or a decoder that is no matrix")
    (_, emsize), widths, kinds, windows = named["encoder.weight"].shape, [], set(), []
    inputs = emsize
    for i in range(len(layers)):
        kind, columns, width = kind_of(layers[i])
        windows.append(columns // inputs if kind == "QRNN" and inputs else 1)
        if columns != windows[-1] * inputs or windows[-1] > (2 if i == 0 else 1):
            raise NotConvertibleError(f"has a layer {i} of {columns} inputs on {inputs} features")
        kinds.add(kind)
        widths.append(width)
        inputs = width
    if decoder[1] != inputs:
        raise NotConvertibleError(f"has a last layer of {inputs} and a decoder of {decoder[1]} features")
    if len(kinds) > 1 or len(set(widths[:-1])) > 1:
        raise NotConvertibleError(f"has layers of different kinds or widths ({widths[:5]})")
    shape = {"model": kinds.pop(), "emsize": emsize, "nhid": widths[0], "nlayers": len(widths)}
    return {**shape, "last": inputs, "window": windows[0]}


def kind_of(layer: dict[str, tuple[int, ...]]) -> tuple[str, int, int]:
    """The kind of a layer, the columns of its input weight, and its width."""
    matrix = layer.get("linear.weight") or layer.get("weight_ih_l0") or ()
    recurrent = layer.get("weight_hh_l0", ())
    if len(matrix) != 2 or ("linear.weight" not in layer and (len(recurrent) != 2 or not recurrent[1])):
        raise NotConvertibleError("has a layer without its weight")
    if "linear.weight" in layer:
        return "QRNN", matrix[1], matrix[0] // 3
    kind = {4: "LSTM", 3: "GRU"}.get(recurrent[0] // recurrent[1])
    if not kind:
        raise NotConvertibleError("has plain RNN layers (RNN_TANH or RNN_RELU)")
    return kind, matrix[1], recurrent[1]


def convert_model(contents: Contents, found: Foreign) -> Converted:
    """The parts of a saved model. Raises NotConvertibleError if ours cannot be that model."""
    named, copies = rename(found.weights)
    check_module(found.module)
    shape, layout = shape_of(named), layout_of(found)
    if sum(weight.size for weight in [*named.values(), *copies]) > 8 * contents.size:  # a tied weight has several names
        raise NotConvertibleError("claims to hold more weights than it has bytes")
    if not all(same(contents, copy, named["encoder.weight"]) for copy in copies):
        raise NotConvertibleError("has an embedding and a copy of it that differ")
    tied = same(contents, named.get("decoder.weight"), named["encoder.weight"])
    if tied:
        named.pop("decoder.weight", None)
    model = {name: read(contents, name, weight) for name, weight in named.items()}
    V = len(model["encoder.weight"])
    model.setdefault("decoder.bias", torch.zeros(V))
    for i in range(shape["nlayers"]):
        fill_layer(model, f"rnns.{i}.", shape["model"])
    if shape["model"] == "QRNN" and shape.pop("window") == 1:  # ours looks at x_{t-1} too
        weight = model["rnns.0.linear.weight"]
        model["rnns.0.linear.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    splits, criterion = convert_criterion(contents, found.criterion, V)
    if found.criterion is None and layout == "awd-lstm-lm" and default_splits(V):
        raise NotConvertibleError(f"has {V:,} words, for which awd-lstm-lm has a split softmax, without that")
    args = {name: shape[name] for name in ("model", "emsize", "nhid", "nlayers")}
    if shape["last"] != (shape["emsize"] if tied else shape["nhid"]):
        args["nhidlast"] = shape["last"]
    return Converted({**args, "tied": tied, "splits": splits}, model, criterion, layout)


def same(contents: Contents, weight: Stored | None, other: Stored) -> bool:
    """Whether two weights are the same numbers; None: the weight is not there, as it is the other one."""
    if weight is None or weight == other:
        return True
    if weight.shape != other.shape:
        return False
    return torch.equal(contents.read_tensor(weight).float(), contents.read_tensor(other).float())


def read(contents: Contents, name: str, stored: Stored) -> Tensor:
    """A weight in float32."""
    tensor = contents.read_tensor(stored).float()
    if not tensor.isfinite().all():
        raise NotConvertibleError(f"has nan or infinite numbers in {name}")
    return tensor


def fill_layer(model: dict[str, Tensor], prefix: str, kind: str) -> None:
    """Zeros for biases that a layer does not have."""
    weight = "linear.weight" if kind == "QRNN" else "weight_hh_l0"
    for bias in ("linear.bias",) if kind == "QRNN" else ("bias_ih_l0", "bias_hh_l0"):
        model.setdefault(f"{prefix}{bias}", torch.zeros(len(model[f"{prefix}{weight}"])))


def check_module(module: Bag | None) -> None:
    """Raises NotConvertibleError for settings that change what a module computes and leave no trace in its weights."""
    pending, seen = [module] if module else [], set[int]()
    while pending:
        bag = pending.pop()
        if id(bag) in seen:
            continue
        seen.add(id(bag))
        pending += [child for _, child in entries_of(bag, "_modules") if isinstance(child, Bag)]
        if bag.of not in TORCHS and any(
            str(name).startswith("weight_ih_l") for name, _ in entries_of(bag, "_parameters")
        ):
            raise NotConvertibleError(f"has recurrent layers of a class that is not torch's, {shown(bag.of)}")
        if bag.of.startswith("torchqrnn.") and bag.state.get("zoneout"):
            raise NotConvertibleError("has a QRNN with zoneout, which scales the forget gate in evaluation too")
        if bag.state.get("output_gate") is False:
            raise NotConvertibleError("has a QRNN without output gate")


def convert_criterion(
    contents: Contents, criterion: Bag | dict[Any, Any] | None, V: int
) -> tuple[list[int], dict[str, Tensor]]:
    """The splits of a split softmax, and its tombstones in our order: the first row for the first cluster."""
    if isinstance(criterion, Bag):
        stored, splits = dict(tensors_of(criterion)), criterion.state["splits"]
        splits = splits[1:-1] if isinstance(splits, list) else []  # without 0 and 10^8, its first and last
    else:
        stored, splits = {str(name): part for name, part in (criterion or {}).items()}, default_splits(V)
    if not stored:
        return [], {}
    if not splits or not all(type(split) is int and split < V for split in splits):
        raise NotConvertibleError(f"has a split softmax whose splits do not fit {V:,} words: {describe(splits)}")
    if set(stored) != {"tail_vectors", "tail_bias"} or not all(isinstance(part, Stored) for part in stored.values()):
        raise NotConvertibleError("has an output layer that is no split softmax")
    return splits, {name: read(contents, name, weight).flip(0) for name, weight in stored.items()}


def layout_of(found: Foreign) -> str:
    """The program that wrote the model, as its names tell."""
    first = next(iter(found.weights))
    if re.search(r"(^|\.)0\.(encoder|rnns)", first):
        return "fastai"
    return "word_language_model" if any("rnn.weight" in name for name in found.weights) else "awd-lstm-lm"
