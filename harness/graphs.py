"""CUDA graphs of the training step, one per batch length: one call starts all kernels of a step.

At the published sizes a GPU computes a step faster than Python can start its kernels one by one. A graph starts them
all at once. It repeats the same kernels with the same addresses and the same numbers. So everything that differs from
step to step is written into tensors that stay in place: the batch, the hidden state, the learning rate.

The first batch of a length runs without a graph, which also does everything that happens only once. The second one is
captured, and from then on the graph is replayed. All graphs share one pool of memory: a graph reads nothing that
another one has left there. The random generator moves on as without graphs, so a resumed run draws the same masks.

While a step is captured its kernels are recorded, not executed. So the step must not read a value from the device.
"""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from model import Hidden

StepResult = tuple[Tensor, list[Hidden], Tensor | None]  # loss, hidden, norm of the gradient; all detached
Step = Callable[[Tensor, Tensor, list[Hidden], Tensor], StepResult]  # source, target (T, B), hidden before it, rate


class Graph(Protocol):
    """A captured function. `replay` repeats its kernels, which write to the same tensors again."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """A way to capture functions; everything beside them has to run inside `on_stream`."""

    def __call__(self, function: Callable[[], object]) -> Graph: ...
    def on_stream(self) -> contextlib.AbstractContextManager[None]: ...


class CudaCapture:
    """Captures functions as CUDA graphs, on one stream and with one pool of memory."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], object]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            function()
        return graph

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Everything inside runs on the stream of the captures: steps without a graph, and evaluation."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)


def fits_graphs(args: Namespace, device: torch.device, ranks: int, scales_loss: bool) -> bool:
    """Whether a run's steps go by graphs: one process on a GPU, and no value that the host has to read in a step."""
    reads_values = args.splits or scales_loss
    return args.graphs and device.type == "cuda" and ranks == 1 and not reads_values


class StepGraphs:
    """Training steps by graphs.

    Args:
        step: a training step without a graph; it must not read a value from the device.
        optimizer: the one that `step` uses. Its rate is a tensor during a step, and a number afterwards.
        capture: `CudaCapture()`, or a replacement for tests without a GPU.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device, capture: Capture) -> None:
        self.step, self.optimizer, self.capture = step, optimizer, capture
        self.rate = torch.zeros((), device=device)  # float32
        self.hidden: list[Hidden] = []
        self.grad_norm: Tensor | None = None
        self.seen: set[int] = set()  # lengths
        self.graphs: dict[int, tuple[Graph, Tensor, Tensor, Tensor]] = {}  # length -> graph, source, target, loss

    def __call__(self, source: Tensor, target: Tensor, hidden: list[Hidden], rate: float) -> StepResult:
        """One step at this rate; as `step`."""
        self.rate.fill_(rate)
        self.take_hidden(hidden)
        length = len(source)
        if length not in self.seen:
            self.seen.add(length)
            loss = self.step_in_place(source, target)
        else:
            if length not in self.graphs:
                self.graphs[length] = self.capture_step(source, target)
            graph, static_source, static_target, static_loss = self.graphs[length]
            static_source.copy_(source)
            static_target.copy_(target)
            graph.replay()
            loss = static_loss.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = rate  # the .state holds numbers
        return loss, self.hidden, self.grad_norm

    def take_hidden(self, hidden: list[Hidden]) -> None:
        """Copies another hidden state (of a new epoch or a resumed run) into the one that stays in place."""
        if not self.hidden:
            self.hidden = [tuple(tensor.clone() for tensor in carried) for carried in hidden]
        elif hidden is not self.hidden:
            copy_into(self.hidden, hidden)

    def capture_step(self, source: Tensor, target: Tensor) -> tuple[Graph, Tensor, Tensor, Tensor]:
        """The graph of a step of this length, its source and target, and its loss."""
        losses: list[Tensor] = []
        source, target = source.clone(), target.clone()
        fused_adam = [group for group in self.optimizer.param_groups if group.get("capturable") is False]
        for group in fused_adam:  # torch refuses to capture it without; the fused kernel ignores the flag
            group["capturable"] = True
        graph = self.capture(lambda: losses.append(self.step_in_place(source, target)))
        for group in fused_adam:
            group["capturable"] = False
        return graph, source, target, losses[0]

    def step_in_place(self, source: Tensor, target: Tensor) -> Tensor:
        """A step with the rate in a tensor, whose results go to the tensors that stay in place; returns the loss."""
        loss, hidden, grad_norm = self.step(source, target, self.hidden, self.rate)
        copy_into(self.hidden, hidden)
        if grad_norm is not None:
            self.grad_norm = grad_norm.clone() if self.grad_norm is None else self.grad_norm.copy_(grad_norm)
        self.optimizer.zero_grad(set_to_none=True)  # gradients in the pool are overwritten by the next graph
        return loss


def copy_into(slots: list[Hidden], hidden: list[Hidden]) -> None:
    """Copies a hidden state, tensor by tensor."""
    for old, new in zip(slots, hidden, strict=True):
        for slot, tensor in zip(old, new, strict=True):
            slot.copy_(tensor)
