"""The parts of a .state compared with what a fresh run has, before torch computes with them.

torch believes a state: its fused Adam reads and writes past the end of moments that are smaller than their weights.
A part that does not fit raises ValueError, which says what is wrong.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import harness.files as files
from model import parts_of
from optim import OPTIMIZERS, TWO_TAILED

if TYPE_CHECKING:
    from harness.checkpoint import SavedRun

MOST = 2**53  # of steps, rows, epochs
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # of a hidden state


def check_state(run: "SavedRun", state: dict[str, Any]) -> None:
    """Raises ValueError (or KeyError for a part that is missing) unless `run` can go on from this state."""
    stored, args = state["args"], run.args
    batch_size, samples = stored["batch_size"], stored.get("samples", 1)
    rows = len(run.corpus.train) // batch_size
    check_position(state["at"], rows)
    if state["mean"] is not None:
        check_mean(run, state["mean"])
        if ("short" in state["mean"]) != (args.average == TWO_TAILED):
            raise ValueError("its mean is of another kind")
        if args.average == TWO_TAILED:
            check_mean(run, state["mean"]["short"], most=state["mean"]["count"])
    if stored["optimizer"] == args.optimizer:
        check_optimizer(run, state)
    if run.scaler.is_enabled() and state["scaler"]:
        check_like(state["scaler"], run.scaler.state_dict(), "scaler")
    if state["offsets"] is not None:
        check_tensor(state["offsets"], (batch_size,), [torch.int64], "offsets", 0, rows - 1)
    if (batch_size, samples) == (args.batch_size, args.samples):
        check_hidden(state["hidden"], parts_of(run.weights)[0].init_hidden(batch_size * samples))
    check_generators(state["generators"], run.device)


def check_number(value: Any, name: str, least: float, most: float, kinds: Sequence[type] = (int, float)) -> None:
    if type(value) not in kinds or not least <= value <= most:  # false for nan
        raise ValueError(f"its {name} is {str(value)[:80]}")


def check_tensor(
    tensor: Any, shape: Sequence[int], dtypes: Sequence[torch.dtype], name: str,
    least: float = -math.inf, most: float = math.inf,
) -> None:  # fmt: skip
    """A tensor of this shape and one of these dtypes, its numbers finite and within these limits."""
    if not isinstance(tensor, Tensor) or tensor.shape != torch.Size(shape) or tensor.dtype not in dtypes:
        found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"its {name} is {found}, not {dtypes[0]} {tuple(shape)}")
    if not (tensor.isfinite().all() and (tensor >= least).all() and (tensor <= most).all()):
        raise ValueError(f"its {name} holds numbers that cannot be")


def check_like(value: Any, fresh: Any, name: str) -> None:
    """Plain data of the same form: keys and lengths; a switch for a switch, a finite number for a number."""
    if isinstance(fresh, dict):
        if not isinstance(value, dict) or value.keys() != fresh.keys():
            raise ValueError(f"its {name} has not the keys {', '.join(map(str, fresh))}")
        for key in fresh:
            check_like(value[key], fresh[key], f"{name} {key}")
    elif isinstance(fresh, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(fresh):
            raise ValueError(f"its {name} has not {len(fresh)} values")
        for i, (one, fresh_one) in enumerate(zip(value, fresh, strict=True)):
            check_like(one, fresh_one, f"{name} {i}")
    elif fresh is None or isinstance(fresh, bool):
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"its {name} is {str(value)[:80]}")
    else:
        largest = torch.finfo(torch.float32).max
        check_number(value, name, -largest, largest)


def check_position(at: dict[str, Any], rows: int) -> None:
    """The plain numbers of `checkpoint.Position`; `rows`: of the text in columns, the last one is only a target."""
    for name in ("epoch", "row", "batch", "step", "loss_count"):
        check_number(at[name], name, int(name == "epoch"), rows - 1 if name == "row" else MOST, [int])
    check_number(at["lr"], "lr", 0, 1e38)
    check_number(at["epoch_s"], "epoch_s", 0, MOST)
    losses = at["history"] if isinstance(at["history"], list) else [None]
    for name, loss in [("loss_sum", at["loss_sum"]), *(("history", loss) for loss in losses)]:
        check_number(loss, name, -1e38, 1e38)
    if at["best_loss"] is not None:
        check_number(at["best_loss"], "best_loss", -1e38, 1e38)
    if not isinstance(at.get("initial_save_digest", at.get("before", "")), str):
        raise ValueError("its initial_save_digest is no text")


def check_mean(run: "SavedRun", mean: dict[str, Any], most: int = MOST) -> None:
    """A running mean, of `most` weights at most: as many tensors as the run has, of the same shapes."""
    check_number(mean["count"], "mean's count", 0, most, [int])
    fresh, weights = run.weights.state_dict(), mean["weights"]
    if not isinstance(weights, dict) or files.fit_names(weights, run.weights).keys() != fresh.keys():
        raise ValueError("its mean is of other weights")
    for name, tensor in files.fit_names(weights, run.weights).items():
        check_tensor(tensor, fresh[name].shape, [torch.float32], f"mean of {name}")


def check_optimizer(run: "SavedRun", state: dict[str, Any]) -> None:
    """Its groups of settings and, for each weight that has been trained, every moment that this optimizer keeps."""
    optimizer, weights = state["optimizer"], [*run.weights.named_parameters()]
    fresh = run.optimizer.state_dict()
    check_like(optimizer["param_groups"], fresh["param_groups"], "optimizer's groups")
    moments = optimizer["state"]
    if not isinstance(moments, dict) or not all(type(i) is int and 0 <= i < len(weights) for i in moments):
        raise ValueError("its optimizer has moments of other weights")
    kept = kept_moments(run.args.optimizer)
    fitted = files.fit_order(optimizer, state["weights"], [name for name, _ in weights])["state"]
    for i, entry in fitted.items():
        name, weight = weights[i]
        entry = {key: value for key, value in entry.items() if value is not None}
        if entry and entry.keys() != kept.keys():
            raise ValueError(f"its optimizer has not the moments {', '.join(kept)} of {name}")
        for key, value in entry.items():
            scalar = kept[key].dim() == 0  # how many steps
            check_tensor(
                value, () if scalar else weight.shape, [torch.float32], f"{key} of {name}", 0 if scalar else -math.inf
            )


def kept_moments(name: str) -> dict[str, Tensor]:
    """What an optimizer keeps of a weight: found by a step over a weight of two numbers."""
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.zeros(2)
    optimizer = OPTIMIZERS[name].kind([weight], lr=0.0)
    optimizer.step()
    return {key: value for key, value in optimizer.state[weight].items() if value is not None}


def check_hidden(hidden: list[Any], fresh: list[tuple[Tensor, ...]]) -> None:
    """A tuple of tensors per layer, of all columns."""
    if [len(layer) if isinstance(layer, list | tuple) else -1 for layer in hidden] != [*map(len, fresh)]:
        raise ValueError("its hidden state is of other layers")
    for i, (layer, fresh_layer) in enumerate(zip(hidden, fresh, strict=True)):
        for tensor, fresh_tensor in zip(layer, fresh_layer, strict=True):
            check_tensor(tensor, fresh_tensor.shape, FLOATS, f"hidden state of layer {i}")


def check_generators(states: dict[str, Any], device: torch.device) -> None:
    """The states of random generators: of one process, or a row for each."""
    check_tensor(states["lengths"], torch.get_rng_state().shape, [torch.uint8], "generator of lengths")
    fresh = {"cpu": torch.get_rng_state()}
    if device.type == "cuda" and "cuda" in states:
        fresh["cuda"] = torch.cuda.get_rng_state(device)
    for name, one in fresh.items():
        rows = states[name].shape[:-1][:1] if isinstance(states[name], Tensor) else ()
        check_tensor(states[name], (*rows, *one.shape), [torch.uint8], f"generator of {name}")
    for bytes_of_one in (states["lengths"], *torch.atleast_2d(states["cpu"])):
        generator = torch.Generator()
        generator.set_state(bytes_of_one.clone())  # raises RuntimeError for some
        draws = [torch.randn(1, generator=generator, dtype=dtype) for dtype in (torch.float32, torch.float64)]
        if not all(draw.isfinite() for draw in draws):
            raise ValueError("its generators draw nan")
