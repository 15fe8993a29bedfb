"""Data-parallel training: the processes that torchrun starts ("ranks"), and all that they tell each other.

    torchrun --nproc_per_node=2 main.py --data data/penn --batch_size 20 --dropouti 0.4 --save PTB.pt
    torchrun --nproc_per_node=2 main.py --resume PTB.pt

Every rank holds all of the weights and trains on its own columns of the batch. Rank 0's settings, weights and
position are broadcast at the start, the gradients are averaged before each step, so the weights stay the same on
all ranks; so do all decisions, since they rest on numbers that every rank has from the others. Rank 0 alone
prints and writes.

Tensors of a GPU go by NCCL; what the host has to know (losses, a signal to stop, states) goes by Gloo, from CPU
to CPU, and waits for no GPU. Without torchrun there is one rank, and nothing here does anything.
"""

import os
import signal
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils import UserError, map_tensors

PATIENCE = timedelta(minutes=30)  # a rank that lets the others wait for longer is lost: it hangs
LARGE = 1 << 20  # elements; a gradient of more is averaged where it lies, the others side by side
REASONS = ("", "--max_steps", "--max_minutes", "SIGINT", "SIGTERM")  # to stop; the later one wins
SEED_STRIDE = 1_000_003  # torch's CPU generator looks at the lower 32 bits of a seed


class Ranks:
    """This process among `size` alike; `Ranks()` is one that is alone.

    Collective methods (they say so) return once every rank has called them; when one has ended they raise a
    RuntimeError of torch.distributed.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """How many of them run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def device_name(self, name: str) -> str:
        """The device of this rank: of several, each has a GPU of its own, or all are on the CPU.

        Raises:
            UserError: there are fewer GPUs than ranks on this machine; `name` is a single device.
        """
        if self.size == 1:
            return name
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name not in ("cpu", "cuda"):
            raise UserError(
                f"--device {name}: several processes take a GPU each, or the CPU; give --device cuda or cpu"
            )
        if name == "cuda" and self.local_size > torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node {self.local_size}: takes a GPU for each process, there are "
                f"{torch.cuda.device_count()} here; start fewer, or give --device cpu"
            )
        return name if name == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"

    def start(self, device: torch.device) -> None:
        """Makes one process group of the ranks. Collective.

        Raises:
            UserError: nothing says where rank 0 is.
        """
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # torch runs no Python handler while it waits for the others: SIGTERM ends the process by itself
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except ValueError as error:
            reason = str(error).rpartition("rendezvous: ")[2]
            hint = "start with torchrun, which says where rank 0 is, or unset RANK and WORLD_SIZE"
            raise UserError(f"WORLD_SIZE {self.size}: {reason}; {hint}") from None
        signal.signal(signal.SIGTERM, handler)

    def end(self) -> None:
        """The last word between the ranks: from here on each may take its time. Collective."""
        if self.size > 1:
            self.agree("")
            dist.destroy_process_group()

    # What is dealt out.

    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError unless every rank gets as many columns."""
        if batch_size % self.size:
            below = batch_size - batch_size % self.size
            raise UserError(
                f"--batch_size {batch_size}: is the whole batch, dealt out to {self.size} processes; give a "
                f"multiple of {self.size}, such as {below or below + self.size}, or another --nproc_per_node"
            )

    def columns(self, batch_size: int) -> slice:
        """This rank's share of the columns: shares differ by one at most, and may be empty."""
        return slice(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def seed(self, seed: int, step: int = 0) -> None:
        """Makes this rank's dropout masks its own. Initial weights are drawn before."""
        torch.manual_seed((seed + SEED_STRIDE * self.rank + step) % 2**63)

    # What is shared.

    def from_rank_0(self, tree: Any) -> Any:
        """Rank 0's plain data and CPU tensors, on all ranks. Collective."""
        if self.size == 1:
            return tree
        skeleton = [map_tensors(lambda tensor: tensor.to("meta"), tree)]
        dist.broadcast_object_list(skeleton, device=torch.device("cpu"))
        if not self.is_main:
            tree = map_tensors(lambda tensor: torch.empty_like(tensor, device="cpu"), skeleton[0])
        map_tensors(lambda tensor: dist.broadcast(tensor, 0), tree)
        return tree

    def broadcast_weights(self, parameters: list[Tensor]) -> None:
        """Overwrites the parameters with rank 0's. Collective."""
        for parameter in parameters if self.size > 1 else []:
            dist.broadcast(parameter.data, 0)

    def gather(self, tensor: Tensor) -> Tensor:
        """The small tensors (...) of all ranks in the order of ranks: (size, ...), on the CPU. Collective."""
        mine = tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.stack(parts)

    def each(self, tensor: Tensor) -> Tensor:
        """`gather`, but a rank that is alone gets its tensor back as it is."""
        return tensor if self.size == 1 else self.gather(tensor)

    def sum(self, values: list[float]) -> list[float]:
        """The sums over ranks, in float64, added in the same order on all of them. Collective."""
        if self.size == 1:
            return values
        return self.gather(torch.tensor(values, dtype=torch.float64)).sum(0).tolist()

    def agree(self, reason: str) -> str:
        """The weightiest reason to stop that any rank has, so that all stop at once. Collective: some 0.2 ms."""
        if self.size == 1:
            return reason
        largest = torch.tensor(REASONS.index(reason))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return REASONS[int(largest)]

    def join_columns(self, hidden: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """What all columns carry, (1, B, ·) per tensor, from every rank's share. Collective."""
        if self.size == 1:
            return hidden
        return [tuple(torch.cat([*self.gather(tensor)], dim=1) for tensor in layer) for layer in hidden]

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Averages the gradients over ranks, in place. Collective.

        A parameter that this rank's columns have not touched counts with zeros. An infinity (fp16) becomes one
        on all ranks, which then skip the step together.
        """
        if self.size == 1:
            return
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.contiguous()  # as they are, but for an odd layout
        large = [p.grad for p in parameters if p.numel() > LARGE]
        small = [p.grad for p in parameters if p.numel() <= LARGE]
        joined = torch.cat([gradient.flatten() for gradient in small])
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in (joined, *large)]:
            work.wait()
        for tensor in (joined, *large):
            tensor.div_(self.size)
        for gradient, part in zip(small, joined.split([g.numel() for g in small]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Ranks()


def find_ranks() -> Ranks:
    """This process among those that torchrun started, as it tells them; alone without torchrun."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
        return Ranks(int(rank), int(size))
    return ALONE


# How a run is told to stop: a signal is noted, and obeyed between two steps, by all ranks at once.


class Stop(Exception):  # noqa: N818 - it ends a run, it is no error
    """Training ends here, between two steps: `reason` is "SIGINT", "SIGTERM" or the flag that said so."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Stopper:
    """While entered, Ctrl-C and SIGTERM are noted, and `check` raises Stop at the next safe place.

    A second Ctrl-C interrupts at once; SIGTERM outweighs all other reasons, whatever comes after it.

    Args:
        deadline_s: of `time.monotonic`, for --max_minutes; None: none.
        ranks: one rank's signal or clock stops all of them, at the same `check`.
    """

    def __init__(self, deadline_s: float | None = None, ranks: Ranks = ALONE) -> None:
        self.deadline_s, self.ranks, self.signal = deadline_s, ranks, ""

    def __enter__(self) -> "Stopper":
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal != "SIGTERM":
            self.signal = signal.Signals(number).name

    def check(self, otherwise: str = "") -> None:
        """Raises Stop for a signal, for the deadline, or for the reason given. Collective."""
        late = self.deadline_s is not None and time.monotonic() >= self.deadline_s
        reason = self.ranks.agree(self.signal or ("--max_minutes" if late else otherwise))
        if reason:
            raise Stop(reason)

    def check_sigterm(self) -> None:
        """Raises Stop for SIGTERM alone: what is done at a run's end goes on in spite of all else. Collective."""
        if self.terminated():
            raise Stop("SIGTERM")

    def terminated(self) -> bool:
        """Whether SIGTERM has come, to any of the ranks. Collective."""
        return self.ranks.agree(self.signal) == "SIGTERM"
