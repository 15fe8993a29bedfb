"""Files on disk: the saved model, and beside it the state of the run that made it.

    SAVE         {'format', 'args', 'vocab', 'tokenizer', 'model', 'criterion', 'metrics'}: for evaluation
    SAVE.state   for an exact resume: raw weights, mean, optimizer, generators, position

Both are plain data and tensors, written whole or not at all, and read by corpus/reader.py, which believes nothing:
loading a file runs no code from it.
"""

import math
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from corpus.reader import DamagedError, ForbiddenError, open_file, read_tensors
from harness.flags import DEFAULTS, check_shape, check_stored
from model import DROPOUTS, Criterion, RNNModel, build
from utils import RunError, UserError, map_tensors, new_file_beside, pick_device, replacing

MODEL_FORMAT, STATE_FORMAT, STATS_FORMAT = "awd-lm model 1", "awd-lm state 2", "awd-lm statistics 1"
FORMATS = {
    MODEL_FORMAT: "a saved model",
    STATE_FORMAT: "the state of a run",
    STATS_FORMAT: "the statistics of dynamiceval.py",
}
SETTINGS = {"args": dict, "vocab": list, "tokenizer": str | None}
MODEL_PARTS = {**SETTINGS, "model": dict, "criterion": dict, "metrics": dict}
STATE_PARTS = {
    **SETTINGS,
    "script": str,
    "fingerprint": str,
    "weights": dict,
    "mean": dict | None,
    "optimizer": dict,
    "scaler": dict,
    "generators": dict,
    "hidden": list,
    "at": dict,
    "offsets": Tensor | None,
}


class NotWrittenError(RunError):
    """A file could not be written, for this `reason`; the file that was there before is untouched."""

    def __init__(self, path: str, reason: str) -> None:
        hint = "free some space or give another --save"
        super().__init__(f"{path}: cannot be written ({reason}), what was there is kept; {hint}")
        self.reason = reason


def write(path: str, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file to `path`, whole or not at all; `fill(file)` writes its contents.

    Raises:
        NotWrittenError: the disk does not take it. Other errors of `fill` are raised unchanged.
    """
    try:
        with replacing(path) as file:
            fill(file)
    except OSError as error:
        raise NotWrittenError(path, error.strerror or str(error)) from error


def save(path: str, contents: dict[str, Any]) -> None:
    """Writes plain data and tensors, these as CPU tensors; raises as `write` does."""
    write(path, lambda file: torch.save(map_tensors(Tensor.cpu, contents), file))


def copy(source: str, target: str) -> None:
    """Copies a file, whole or not at all; raises as `write` does."""
    with open(source, "rb") as original:
        write(target, lambda file: shutil.copyfileobj(original, file))


def check_writable(path: str, flag: str, size: int = 0) -> None:
    """Checks that a file of `size` bytes can be made at `path`: better now than after the first epoch.

    Raises:
        UserError: `path` is no name, a folder, a device or a loop of links, or its folder cannot be written to.
        NotWrittenError: there is no space.
    """
    target = os.path.realpath(path)
    if not path:
        raise UserError(f"{flag} '': is no name; give the name of a file")
    if os.path.isdir(target):
        raise UserError(f"{flag} {path}: is a folder; give the name of a file")
    if os.path.islink(target):
        raise UserError(f"{flag} {path}: is a link that leads back to itself; give the name of a file")
    if os.path.exists(target) and not os.path.isfile(target):  # the new file would replace /dev/null itself
        raise UserError(f"{flag} {path}: is a device or pipe; give the name of a file")
    try:
        with new_file_beside(target) as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if size:
            raise NotWrittenError(path, f"{error.strerror}; it takes {size / 2**20:.0f} MiB") from None
        hint = "choose a folder that can be written to"
        raise UserError(f"{flag} {path}: {error.strerror}; {hint}") from None


def load(path: str, flag: str, format: str) -> dict[str, Any]:
    """Reads a file of this format that `save` wrote, onto the CPU.

    Raises:
        UserError: it is missing, no file, damaged, something else, or holds more than plain data and tensors.
    """
    what, place = FORMATS[format], f"{flag} {path}"
    foreign = "; convert.py takes models of other programs" if format == MODEL_FORMAT else ""
    hint = "remove it to warm-start from the model" if format == STATE_FORMAT else "save the model again with main.py"
    try:
        file = open_file(path)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}; give the path of {what}") from None
    try:
        with file:
            contents = read_tensors(file)
    except ForbiddenError:
        raise UserError(
            f"{place}: holds more than tensors and plain data, or something else than {what}; refused, since loading "
            f"it could run code: {hint}{foreign}"
        ) from None
    except DamagedError as error:
        raise UserError(
            f"{place}: is truncated, damaged or not {what} ({error}); use another copy, or train again{foreign}"
        ) from None
    if not isinstance(contents, dict) or contents.get("format") != format:
        hint = "give a file that main.py wrote" if format == MODEL_FORMAT else "remove it to warm-start from the model"
        raise UserError(f"{place}: is not {what} of this toolkit ({format!r}); {hint}{foreign}")
    return contents


def model_contents(
    args: Namespace, vocab: list[str], model: nn.Module, criterion: nn.Module, metrics: dict[str, Any],
    tokenizer: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The contents of a saved model, with the weights to evaluate with; `metrics`: plain data, losses in nats.

    The tensors are the module's own, not copies.
    """
    parts = {
        part: {name: tensor.detach() for name, tensor in module.state_dict().items()}
        for part, module in (("model", model), ("criterion", criterion))
    }
    words = {"vocab": vocab, "tokenizer": tokenizer}
    return {"format": MODEL_FORMAT, "args": vars(args), **words, **parts, "metrics": metrics}


def load_model(path: str, flag: str) -> dict[str, Any]:
    """Reads a saved model and checks its parts, their types, and every tensor's shape.

    Raises:
        UserError: see `load`; or its parts do not fit each other.
        RunError: a weight is not finite.
    """
    saved = {"tokenizer": None, **load(path, flag, MODEL_FORMAT)}  # older models have no tokenizer
    check_parts(saved, MODEL_PARTS, f"{flag} {path}")
    check_tensors(saved, f"{flag} {path}")
    for name in ("valid_loss", "step", "partial"):  # a resumed run reads these metrics
        number = saved["metrics"].get(name, 0)
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"{flag} {path}: its metrics do not say {name} in a number; use another copy")
    return saved


def load_state(path: str, flag: str) -> dict[str, Any]:
    """Reads the state of a run and checks its parts; `checkpoint.restore` checks the rest.

    Raises:
        UserError: see `load`; or its parts do not fit each other.
    """
    state = {"tokenizer": None, **load(path, flag, STATE_FORMAT)}
    check_parts(state, STATE_PARTS, f"{flag} {path}")
    parts: dict[str, dict[str, Any]] = {"model": {}, "criterion": {}}
    for name, tensor in state["weights"].items():
        part, _, rest = str(name).partition(".")
        parts.setdefault(part, {})[rest] = tensor
    check_tensors({**state, **parts}, f"{flag} {path}")
    return state


def check_parts(contents: dict[str, Any], parts: dict[str, Any], place: str) -> None:
    """Raises UserError unless a file has all these parts, each of its type, and the keys of dicts are texts."""
    for name, kind in parts.items():
        part = contents.get(name, Ellipsis)
        if not isinstance(part, kind) or (isinstance(part, dict) and not all(isinstance(key, str) for key in part)):
            raise UserError(f"{place}: its {name!r} is missing or of another type; use another copy")


def check_tensors(saved: dict[str, Any], place: str) -> None:
    """Checks that `args` and `vocab` describe a model, and that the weights are its, float32 and finite.

    The model is built on the meta device, where tensors take no memory.

    Raises:
        UserError: they do not.
        RunError: a weight is not finite.
    """
    args, vocab = saved["args"], saved["vocab"]
    if not vocab or not all(isinstance(word, str) for word in vocab) or len(set(vocab)) != len(vocab):
        raise UserError(f"{place}: its vocabulary is not a list of distinct words; use another copy")
    check_stored(args, place)
    try:
        with torch.device("meta"):
            modules = build({**args, **dict.fromkeys(DROPOUTS, 0.0)}, len(vocab))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{place}: its args describe no model ({error}); use another copy") from None
    for part, module in zip(("model", "criterion"), modules, strict=True):
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        shapes = {strip_raw(name): tuple(getattr(tensor, "shape", ())) for name, tensor in saved[part].items()}
        if expected != shapes:
            odd = sorted(map(str, set(expected.items()) ^ set(shapes.items())))[0]
            raise UserError(f"{place}: its {part} does not fit its args and vocabulary ({odd}); use another copy")
        for name, tensor in saved[part].items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
                raise UserError(f"{place}: its {name} is not of float32; use another copy")
            if not tensor.isfinite().all():
                raise RunError(f"{place}: its {name} holds nan or infinite numbers; use another copy")


def strip_raw(name: str) -> str:
    """A parameter's name without weight drop."""
    return re.sub(r"_raw$", "", str(name))


def fit_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names that they have in `module`: with `_raw` where it drops the weight."""
    names = {strip_raw(name): name for name in module.state_dict()}
    return {names.get(strip_raw(name), name): tensor for name, tensor in tensors.items()}


def fit_order(optimizer: dict[str, Any], stored: Iterable[str], now: list[str]) -> dict[str, Any]:
    """An optimizer's state for the order that the weights have now; the state knows them by their numbers.

    The order depends on --wdrop: `linear.weight, linear.bias` without it, `linear.bias, linear.weight_raw` with it.
    `stored` has the names of the weights in the order of the state, a tied weight twice.
    """
    now = [strip_raw(name) for name in now]
    before = [name for name in map(strip_raw, stored) if name in now]
    return {**optimizer, "state": {now.index(before[i]): state for i, state in optimizer["state"].items()}}


class Opened(NamedTuple):
    """A saved model on a device, in evaluation mode and without dropout."""

    model: RNNModel
    criterion: Criterion
    vocab: list[str]
    args: Namespace  # of the run that made it
    device: torch.device
    tokenizer: str | None


def load_weights(saved: dict[str, Any], model: nn.Module, criterion: nn.Module) -> None:
    """Puts the tensors of a file from `load_model` in their places."""
    model.load_state_dict(fit_names(saved["model"], model))
    criterion.load_state_dict(saved["criterion"])


def to_evaluate(saved: dict[str, Any], device: torch.device) -> Opened:
    """The model of a file from `load_model`."""
    model, criterion = build({**saved["args"], **dict.fromkeys(DROPOUTS, 0.0)}, len(saved["vocab"]))
    load_weights(saved, model, criterion)
    return Opened(
        model=model.to(device).eval(),
        criterion=criterion.to(device).eval(),
        vocab=saved["vocab"],
        args=Namespace(**saved["args"]),
        device=device,
        tokenizer=saved["tokenizer"],
    )


def open_model(args: Namespace) -> Opened:
    """The model that the flags --save and --device name.

    Raises:
        UserError: see `load_model`; a flag contradicts the model's shape; the device is not there.
    """
    saved = load_model(args.save, "--save")
    check_shape(vars(args), saved["args"], args.save)
    saved["args"] = {**DEFAULTS, **saved["args"]}
    return to_evaluate(saved, pick_device(args.device))
