"""What is written to disk: the saved model, and beside it the state of the run that made it.

    SAVE         {'format', 'args', 'vocab', 'tokenizer', 'model', 'criterion', 'metrics'}: to evaluate with
    SAVE.state   everything that an exact resume needs: raw weights, mean, optimizer, generators, position

Both are plain data and tensors, written whole or not at all, and loaded with `weights_only=True`: loading one
runs no code of whoever made it.
"""

import contextlib
import os
import pickle
import re
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from harness.flags import DEFAULTS, check_shape, check_stored
from model import DROPOUTS, Criterion, RNNModel, build
from utils import RunError, UserError, out_of_memory, pick_device, replacing

MODEL_FORMAT, STATE_FORMAT, STATS_FORMAT = "awd-lm model 1", "awd-lm state 2", "awd-lm statistics 1"
WHAT = {
    **{MODEL_FORMAT: "a saved model", STATE_FORMAT: "the state of a run"},
    STATS_FORMAT: "the statistics of dynamiceval.py",
}
PARTS = {  # of a model
    **{"args": dict, "vocab": list, "tokenizer": str | None, "model": dict, "criterion": dict, "metrics": dict},
}
STATE_PARTS = {
    **{"script": str, "fingerprint": str, "args": dict, "vocab": list, "tokenizer": str | None, "weights": dict},
    "mean": dict | None,
    **{
        "optimizer": dict,
        "scaler": dict,
        "generators": dict,
        "hidden": list,
        "at": dict,
        "offsets": Tensor | None,
    },
}


class NotWrittenError(RunError):
    """A file could not be written: `reason` says why; what lay there before is untouched."""

    def __init__(self, path: str, reason: str) -> None:
        hint = "free some space or give another --save"
        super().__init__(f"{path}: cannot be written ({reason}), what was there is kept; {hint}")
        self.reason = reason


def write(path: str, fill: Callable[[BinaryIO], object]) -> None:
    """Writes what `fill(file)` puts into a file to `path`, whole or not at all.

    Raises:
        NotWrittenError: the disk does not take it. Whatever else goes wrong in `fill` is raised as it is.
    """
    try:
        with replacing(path) as file:
            fill(file)
    except OSError as error:
        raise NotWrittenError(path, error.strerror or str(error)) from error


def save(path: str, contents: dict[str, Any]) -> None:
    """Writes plain data and CPU tensors; raises as `write` does."""
    write(path, lambda file: torch.save(contents, file))


def copy(source: str, target: str) -> None:
    """Copies a file, whole or not at all; raises as `write` does."""
    with open(source, "rb") as original:
        write(target, lambda file: shutil.copyfileobj(original, file))


def check_writable(path: str, flag: str, size: int = 0) -> None:
    """Raises when no file of `size` bytes can be made beside `path`: better now than after the first epoch.

    Raises:
        UserError: it is a folder or a device, or lies where nothing can be written.
        NotWrittenError: there is no space.
    """
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: is a folder; give the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):  # the file would take the place of /dev/null itself
        raise UserError(f"{flag} {path}: is a device or pipe; give the name of a file")
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if size:
            raise NotWrittenError(path, f"{error.strerror}; it takes {size / 2**20:.0f} MiB") from None
        hint = "choose a folder that can be written to"
        raise UserError(f"{flag} {path}: {error.strerror}; {hint}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def load(path: str, flag: str, kind: str) -> dict[str, Any]:
    """Reads a file that `save` wrote, onto the CPU. `kind`: its format.

    Raises:
        UserError: it is missing, truncated, something else, or holds more than plain data and tensors.
    """
    what = WHAT[kind]
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below: an OSError while reading has another meaning
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; give the path of {what}") from None
    try:
        with file, warnings.catch_warnings(action="ignore"):  # torch's, of damaged files
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{flag} {path}: holds more than tensors and plain data, or something else than {what}; "
            "refused, since loading it could run code: save the model again with main.py"
        ) from None
    except Exception as error:  # what a damaged file makes of the reader has no end: IndexError, OSError, ...
        if out_of_memory(error):
            raise
        raise UserError(
            f"{flag} {path}: is truncated, damaged or not {what}; use another copy, or train again"
        ) from None
    if not isinstance(contents, dict) or contents.get("format") != kind:
        hint = (
            "give a file that main.py wrote" if kind == MODEL_FORMAT else "remove it to warm-start from the model"
        )
        raise UserError(f"{flag} {path}: is not {what} of this toolkit ({kind!r}); {hint}")
    return contents


def model_contents(
    args: Namespace, vocab: list[str], model: nn.Module, criterion: nn.Module, metrics: dict[str, Any],
    tokenizer: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a saved model holds: the weights to evaluate with; `metrics`: plain data, losses in nats."""
    parts = {
        part: {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        for part, module in (("model", model), ("criterion", criterion))
    }
    words = {"vocab": vocab, "tokenizer": tokenizer}
    return {"format": MODEL_FORMAT, "args": vars(args), **words, **parts, "metrics": metrics}


def load_model(path: str, flag: str) -> dict[str, Any]:
    """Reads a saved model and checks that it is whole: its parts, their types, and every tensor's shape.

    Raises:
        UserError: see `load`; or its parts do not fit each other.
        RunError: a weight is not finite, so that no figure would mean anything.
    """
    saved = {"tokenizer": None, **load(path, flag, MODEL_FORMAT)}  # older models have none
    check_parts(saved, PARTS, f"{flag} {path}")
    check_tensors(saved, f"{flag} {path}")
    for name in ("valid_loss", "step", "partial"):  # what a run that goes on reads of them
        if not isinstance(saved["metrics"].get(name, 0), int | float):
            raise UserError(f"{flag} {path}: its metrics do not say {name} in a number; use another copy")
    for name, tensor in [*saved["model"].items(), *saved["criterion"].items()]:
        if not tensor.isfinite().all():
            raise RunError(f"{flag} {path}: its {name} holds nan or infinite numbers; use another copy")
    return saved


def load_state(path: str, flag: str) -> dict[str, Any]:
    """Reads the state of a run; what only a run can check, `Run.load_state` does.

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
    """Raises UserError unless all parts of a file are there, each of its type."""
    for name, kind in parts.items():
        if name not in contents or not isinstance(contents[name], kind):
            raise UserError(f"{place}: its {name!r} is missing or of another type; use another copy")


def check_tensors(saved: dict[str, Any], place: str) -> None:
    """Raises UserError unless `args` and `vocab` describe a model, and the tensors are that one's.

    The model is built on the meta device, where no size costs memory.
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
        found = {strip_raw(name): tuple(getattr(tensor, "shape", ())) for name, tensor in saved[part].items()}
        if expected != found:
            odd = sorted(map(str, set(expected.items()) ^ set(found.items())))[0]
            raise UserError(f"{place}: its {part} does not fit its args and vocabulary ({odd}); use another copy")


def strip_raw(name: str) -> str:
    """The name that a parameter has without weight drop."""
    return re.sub(r"_raw$", "", str(name))


def fit_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names that `module` knows them by: with `_raw` where it drops that weight."""
    names = {strip_raw(name): name for name in module.state_dict()}
    return {names.get(strip_raw(name), name): tensor for name, tensor in tensors.items()}


def fit_order(optimizer: dict[str, Any], stored: Iterable[str], now: list[str]) -> dict[str, Any]:
    """An optimizer's state, which knows weights by their numbers, for the order that they have now.

    A weight that is dropped comes after its layer's bias, else before it. `stored` has a tied weight twice.
    """
    now = [strip_raw(name) for name in now]
    before = [name for name in map(strip_raw, stored) if name in now]
    return {**optimizer, "state": {now.index(before[i]): found for i, found in optimizer["state"].items()}}


class Opened(NamedTuple):
    """A saved model to evaluate with: nothing is dropped, its weights are on the device."""

    model: RNNModel
    criterion: Criterion
    vocab: list[str]
    args: Namespace  # of the run that made it
    device: torch.device
    tokenizer: str | None


def to_evaluate(saved: dict[str, Any], device: torch.device) -> Opened:
    """The model of a file from `load_model`."""
    model, criterion = build({**saved["args"], **dict.fromkeys(DROPOUTS, 0.0)}, len(saved["vocab"]))
    model.load_state_dict(fit_names(saved["model"], model))
    criterion.load_state_dict(saved["criterion"])
    modules = (module.to(device).eval() for module in (model, criterion))
    return Opened(*modules, saved["vocab"], Namespace(**saved["args"]), device, saved["tokenizer"])


def open_model(args: Namespace) -> Opened:
    """What a script evaluates, by its flags --save and --device.

    Raises:
        UserError: see `load_model`; a flag contradicts the model's shape; the device is not there.
    """
    saved = load_model(args.save, "--save")
    check_shape(vars(args), saved["args"], args.save)
    saved["args"] = {**DEFAULTS, **saved["args"]}
    return to_evaluate(saved, pick_device(args.device))
