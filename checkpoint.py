"""What is written to disk: the saved model, and beside it the state of the run that made it.

    SAVE         {'format', 'args', 'vocab', 'model', 'criterion', 'metrics'}: the weights to evaluate with
    SAVE.state   everything that an exact resume needs: raw weights, mean, optimizer, generators, position

Both are plain data and tensors, written whole or not at all, and loaded with `weights_only=True`: loading
one runs no code of whoever made it.
"""

import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from model import RNNModel
from splitcross import SplitCrossEntropyLoss, default_splits
from utils import RunError, UserError, write_whole

FORMAT = "awd-lm model 1"
STATE_FORMAT = "awd-lm state 1"
MODEL_KEYS = {"format": str, "args": dict, "vocab": list, "model": dict, "criterion": dict, "metrics": dict}
STATE_KEYS = (
    *("script", "args", "vocab", "fingerprint", "weights", "average"),
    *("optimizer", "scaler", "generators", "hidden", "progress", "displaced"),
)
ARCHITECTURE = ("model", "emsize", "nhid", "nlayers", "tied")  # what a saved model answers by itself
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")


class NotWrittenError(RunError):
    """A file could not be written: `reason` says why; what lay there before is untouched."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(
            f"{path}: cannot be written ({reason}), what was there is kept; free some space or give another "
            "--save"
        )
        self.reason = reason


def state_path(path: str | Path) -> Path:
    """Where the state of the run lies that saves its model to `path`."""
    return Path(f"{path}.state")


def resume_paths(path: str) -> tuple[str, str]:
    """The model and the state that `--resume path` means: `path` names a model or one of its states.

    `PTB.pt` is that model and its newest state; `PTB.pt.state.1200`, a numbered copy, stands for itself.
    """
    match = re.fullmatch(r"(.+)\.state(\.\d+)?", path)
    if match and not state_path(path).exists():  # a model may be called so
        return match[1], path
    return path, str(state_path(path))


def state_script(save: str) -> str | None:
    """The script whose state lies beside `save`; "" when there is none, None when it does not say.

    Raises:
        UserError: it cannot be read.
    """
    path = state_path(save)
    return load(path, "--resume auto", STATE_FORMAT).get("script") if path.exists() else ""


def save(path: str | Path, contents: dict[str, Any]) -> None:
    """Writes plain data and tensors to `path`, whole or not at all.

    Raises:
        NotWrittenError: it cannot be written; what lay there before is untouched.
    """
    save_bytes(path, lambda file: torch.save(contents, file))


def save_bytes(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes what `write(file)` puts into a file to `path`; raises as `save` does."""
    try:
        write_whole(path, write)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a full disk into a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise NotWrittenError(path, reason) from error


def load(path: str | Path, flag: str, kind: str = FORMAT) -> dict[str, Any]:
    """Reads a file that `save` wrote, onto the CPU.

    Raises:
        UserError: it is missing, truncated, something else, or holds more than plain data and tensors.
    """
    what = "a saved model" if kind == FORMAT else "the state of a run"
    try:
        data = io.BytesIO(Path(path).read_bytes())
        with warnings.catch_warnings(action="ignore"):  # torch's, on files that are refused below
            contents = torch.load(data, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; give the path of {what}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{flag} {path}: holds more than tensors and plain data, or something else than {what}; "
            "refused, since loading it could run code: save the model again with main.py"
        ) from None
    except Exception:  # what a damaged pickle makes of the reader has no end: IndexError, AssertionError, ...
        raise UserError(
            f"{flag} {path}: is truncated, damaged or not {what}; use another copy, or train again"
        ) from None
    if not isinstance(contents, dict) or contents.get("format") != kind:
        raise UserError(
            f"{flag} {path}: is not {what} of this toolkit ({kind!r}); give a file that main.py wrote"
        )
    return contents


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU: a model that was trained on a GPU loads anywhere."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def model_contents(
    args: dict[str, Any],
    vocab: list[str],
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """What a saved model holds: the weights to evaluate with; `metrics`: plain numbers, losses in nats."""
    return {
        "format": FORMAT,
        "args": args,
        "vocab": vocab,
        "model": plain_state_dict(model),
        "criterion": plain_state_dict(criterion),
        "metrics": metrics,
    }


def load_model(path: str | Path, flag: str) -> dict[str, Any]:
    """Reads a saved model and checks that it is whole: its parts, their types, and every tensor's shape.

    Raises:
        UserError: see `load`; or its parts do not fit each other.
    """
    saved = load(path, flag)
    check_parts(saved, path, flag)
    return saved


def load_state(path: str | Path, flag: str, script: str) -> dict[str, Any]:
    """Reads the state of a run of `script`; what only a run can check, `Run.load_state` does.

    Raises:
        UserError: see `load`; or a part is missing, or another script made it.
    """
    state = load(path, flag, STATE_FORMAT)
    missing = [key for key in STATE_KEYS if key not in state]
    if missing:
        raise UserError(f"{flag} {path}: lacks {', '.join(missing)}; remove it to warm-start from the model")
    weights = state["weights"] if isinstance(state["weights"], dict) else {}
    parts = {"model": {}, "criterion": {}}
    for name, tensor in weights.items():
        part, _, rest = str(name).partition(".")
        parts.setdefault(part, {})[rest] = tensor
    check_parts({**state, **parts, "metrics": {}}, path, flag)
    if state["script"] != script:
        raise UserError(
            f"{flag} {path}: is the state of {state['script']}, not of {script}; go on with "
            f"{state['script']} --resume, fine-tune with --output NEW to keep both states, or remove it to "
            "warm-start from the model"
        )
    return state


def check_parts(saved: dict[str, Any], path: str | Path, flag: str) -> None:
    """Raises UserError unless the tensors are those of the model that `args` and `vocab` describe.

    The model is built on the meta device, where no size costs memory.
    """
    for key, kind in MODEL_KEYS.items():
        if not isinstance(saved.get(key), kind):
            raise UserError(f"{flag} {path}: its {key!r} is missing or no {kind.__name__}; use another copy")
    args, vocab = saved["args"], saved["vocab"]
    missing = [name for name in ARCHITECTURE if name not in args]
    if missing:
        raise UserError(f"{flag} {path}: its args lack {', '.join(missing)}; use another copy")
    if not vocab or not all(isinstance(word, str) for word in vocab) or len(set(vocab)) != len(vocab):
        raise UserError(f"{flag} {path}: its vocabulary is not a list of distinct words; use another copy")
    if not isinstance(args["nlayers"], int) or not 0 < args["nlayers"] <= len(saved["model"]):
        raise UserError(f"{flag} {path}: its args say {args['nlayers']!r} layers; use another copy")
    try:
        with torch.device("meta"):
            model, criterion = build(args, vocab, **dict.fromkeys(DROPOUTS, 0.0))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{flag} {path}: its args describe no model ({error}); use another copy") from None
    for part, module in (("model", model), ("criterion", criterion)):
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        found = {strip_raw(name): tuple(getattr(tensor, "shape", ())) for name, tensor in saved[part].items()}
        if expected != found:
            odd = sorted(map(str, set(expected.items()) ^ set(found.items())))[0]
            raise UserError(
                f"{flag} {path}: its {part} does not fit its args and vocabulary ({odd}); use another copy"
            )


def strip_raw(name: str) -> str:
    """The name that a parameter has without weight drop."""
    return re.sub(r"_raw$", "", str(name))


def fit_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names that `module` knows them by: with `_raw` where it drops that weight."""
    names = {strip_raw(name): name for name in module.state_dict()}
    return {names.get(strip_raw(name), name): tensor for name, tensor in tensors.items()}


def build(
    args: dict[str, Any], vocab: list[str], **dropouts: float
) -> tuple[RNNModel, SplitCrossEntropyLoss]:
    """Model and criterion of the architecture in `args`, freshly initialised, with these dropouts."""
    model = RNNModel(
        args["model"],
        len(vocab),
        args["emsize"],
        args["nhid"],
        args["nlayers"],
        tie_weights=args["tied"],
        **dropouts,
    )
    splits = args.get("splits")
    splits = default_splits(len(vocab)) if splits is None else splits
    return model, SplitCrossEntropyLoss(model.decoder.weight.size(1), splits)


def restore(saved: dict[str, Any], **dropouts: float) -> tuple[RNNModel, SplitCrossEntropyLoss]:
    """Model and criterion of a file from `load_model`, with its weights; without dropouts, to evaluate."""
    dropouts = dropouts or dict.fromkeys(DROPOUTS, 0.0)
    model, criterion = build(saved["args"], saved["vocab"], **dropouts)
    model.load_state_dict(fit_names(saved["model"], model))
    criterion.load_state_dict(saved["criterion"])
    return model, criterion


def check_architecture(given: dict[str, Any], stored: dict[str, Any], path: str | Path) -> None:
    """Raises UserError when a flag contradicts what the file says about the model's shape."""
    for name in (*ARCHITECTURE, "splits"):
        if name in given and given[name] != stored.get(name):
            flag = f"--{name} {given[name]}" if name != "tied" else "--tied" if given[name] else "--untied"
            raise UserError(
                f"{flag}: contradicts {path}, which has {stored.get(name)}; leave the "
                "flag out, or train a new model"
            )
