"""What a CUDA graph does, done on the CPU: a function's operations are recorded once and repeated into the same memory.

No Python of the function runs when it is repeated, and numbers are those of the first time. As in a capture on CUDA,
reading a value while recording is an error, and recording changes nothing: what it has changed is put back.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique"}
ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::empty_like", "aten::new_empty_strided"}


class CaptureError(RuntimeError):
    """Something that CUDA refuses while it captures."""


class Recorder(TorchDispatchMode):
    """Notes every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, function._schema.name
        by_mask = name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in READS or by_mask:
            raise CaptureError(f"{name}: waits for a value of the device")
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result


class EmulatedGraph:
    """A recorded function."""

    def __init__(self, function: Callable[[], object]) -> None:
        with Recorder() as recorder:
            function()
        self.operations = recorder.operations

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, results in self.operations:
            schema = function._schema
            if schema.name in ALLOCATIONS:
                continue
            again = function(*args, **kwargs)
            if len(schema.returns) == 1:
                results, again = (results,), (again,)
            for returned, old, new in zip(schema.returns, results or (), again or (), strict=True):
                if returned.alias_info is None:  # else it is a view, or was written in place
                    for slot, value in zip(tensors(old), tensors(new), strict=True):
                        slot.copy_(value)


def tensors(value: Any) -> list[Tensor]:
    """A tensor, or those in a list."""
    values = value if isinstance(value, list | tuple) else [value]
    return [x for x in values if isinstance(x, Tensor)]


class EmulatedCapture:
    """Stands in for `CudaCapture`. `kept()`: all tensors that a step changes; recording has to leave them alone."""

    def __init__(self, kept: Callable[[], list[Tensor]]) -> None:
        self.kept, self.on_stream = kept, contextlib.nullcontext

    def __call__(self, function: Callable[[], object]) -> EmulatedGraph:
        before, generator = [tensor.detach().clone() for tensor in self.kept()], torch.get_rng_state()
        graph = EmulatedGraph(function)
        with torch.no_grad():
            for tensor, value in zip(self.kept(), before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(generator)
        return graph
