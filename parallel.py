"""Data-parallel training: the processes that torchrun starts ("ranks"), and all that they tell each other.

    torchrun --nproc_per_node=2 main.py --data data/penn --batch_size 20 --dropouti 0.4 --save PTB.pt
    torchrun --nproc_per_node=2 main.py --resume PTB.pt

Every rank holds all of the weights and trains on its own columns of the batch. The gradients are averaged
before each step, so the weights stay the same on all ranks, bit for bit; so do all decisions, since they rest
on numbers that every rank has from the others. Rank 0 alone prints and writes.

Tensors of a GPU go by NCCL; what the host has to know (losses, a signal to stop, states) goes by Gloo, from
CPU to CPU, and waits for no GPU. Without torchrun there is one rank, and nothing here does anything.
"""

import contextlib
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils import LostRankError, RunError, UserError, torchrun_rank_and_size

PATIENCE = timedelta(minutes=30)  # a rank that lets the others wait for longer is lost: it hangs
FAREWELL_S = 10.0  # then a rank leaves without the others
LARGE = 1 << 20  # elements; a gradient of more is averaged where it lies, the others side by side
REASONS = ("", "--max_minutes", "SIGINT", "SIGTERM")  # to stop; the later one wins
SEED_STRIDE = 1_000_003  # torch's CPU generator looks at the lower 32 bits of a seed
# What torch, Gloo and NCCL say when another rank has gone; and when it is this one that cannot go on.
LOST = re.compile(
    r"(closed|reset) by|closed the connection|socket closed|pair closure|broken pipe|refused|timed? ?out"
    r"|remote process|unreachable|no route",
    re.IGNORECASE,
)
FAILED_HERE = re.compile(
    r"server socket|gai error|no space|out of memory|cannot allocate|too many open files", re.IGNORECASE
)
# Flags that may well differ between machines.
OF_ONE_MACHINE = ("data", "save", "output", "resume", "device", "tensorboard", "keep_last")


class Ranks:
    """This process among `size` alike; `Ranks()` is one that is alone.

    Collective methods (they say so) return once every rank has called them.

    Raises:
        LostRankError: in a collective method, when another rank has ended or cannot be reached.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.store: dist.Store | None = None  # where ranks meet before they are a process group

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def here(self) -> int:
        """How many of them run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    # Before the start: what is wrong on all ranks alike, all of them find out by themselves.

    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError unless every rank gets as many columns."""
        if batch_size % self.size:
            below = batch_size - batch_size % self.size
            raise UserError(
                f"--batch_size {batch_size}: is the whole batch, dealt out to {self.size} processes; give a "
                f"multiple of {self.size}, such as {below or below + self.size}, or another --nproc_per_node"
            )

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
        if name == "cpu":
            return name
        there = torch.cuda.device_count()
        if self.here > there:
            raise UserError(
                f"--nproc_per_node {self.here}: takes a GPU for each process, there are {there} here; start "
                "fewer, or give --device cpu"
            )
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"

    @contextlib.contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Rank 0 runs what is inside, then the others do: they find the cache that it has left.

        Waiting takes as long as it takes, and a signal ends it.
        """
        if self.size == 1:
            yield
            return
        try:
            with others_alive(), killable():
                self.store = next(dist.rendezvous("env://", self.rank, self.size, timeout=PATIENCE))[0]
        except ValueError as error:
            reason = str(error).rpartition("rendezvous: ")[2]
            raise UserError(
                f"WORLD_SIZE {self.size}: {reason}; start with torchrun, which says where rank 0 is, or "
                "unset RANK and WORLD_SIZE"
            ) from None
        while self.rank and not self.is_set("rank 0 was here"):
            time.sleep(0.02)
        yield
        if self.leads:
            with others_alive():
                self.store.set("rank 0 was here", "")

    def is_set(self, key: str) -> bool:
        with others_alive():
            return self.store.check([key])

    def start(self, device: torch.device) -> None:
        """Makes one process group of the ranks, after `rank_0_first`. Collective."""
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with others_alive(), killable():
            dist.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.size, timeout=PATIENCE
            )

    def check_alike(self, facts: dict[str, Any]) -> None:
        """Raises UserError when ranks would not do the same: other flags, files or a state. Collective.

        `facts`: plain data, under names for a person. Ranks that part here would wait for each other, or mix
        up what they exchange: machines without a common disk, say, where one finds a state to go on with.
        """
        if self.size == 1:
            return
        found = [{}] * self.size
        with others_alive():
            dist.all_gather_object(found, facts)
        for rank, others in enumerate(found):
            for name, first in found[0].items():
                if others.get(name) != first:
                    raise UserError(
                        f"{name}: {first} on rank 0, {others.get(name)} on rank {rank}; start all ranks with "
                        "the same command, --data and --save on a disk that all machines share"
                    )

    def end(self) -> None:
        """The last word between the ranks: from here on each may take its time.

        A rank that leaves closes its connections, so none does while another is still in a collective.
        """
        if self.size == 1:
            return
        deadline = time.monotonic() + FAREWELL_S
        with contextlib.suppress(RuntimeError):  # rank 0 held the store and has left: so it has seen them all
            self.store.add("left", 1)
            while self.store.add("left", 0) < self.size and time.monotonic() < deadline:
                time.sleep(0.01)
        dist.destroy_process_group()

    # What is dealt out.

    def columns(self, batch_size: int) -> slice:
        """This rank's share of the columns: shares differ by one at most, and may be empty."""
        return slice(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def seed(self, seed: int, step: int = 0) -> None:
        """Makes this rank's dropout masks its own. Initial weights are drawn before, alike on all ranks."""
        torch.manual_seed((seed + SEED_STRIDE * self.rank + step) % 2**63)

    # What is shared.

    def gather(self, tensor: Tensor) -> Tensor:
        """The small tensors (...) of all ranks in the order of ranks: (size, ...), on the CPU. Collective."""
        mine = tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with others_alive():
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
        """The weightiest reason to stop that any rank has, so that all stop at once. Collective."""
        return REASONS[self.most(REASONS.index(reason))]

    def any(self, condition: bool) -> bool:
        """Whether it is so on any rank: clocks differ, and all have to do the same. Collective."""
        return bool(self.most(int(condition)))

    def most(self, number: int) -> int:
        """The largest number of all ranks. Collective: some 0.2 ms between two processes, at every step."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        with others_alive():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def from_rank_0(self, number: float | None) -> float | None:
        """Rank 0's number or None, on all ranks. Collective."""
        if self.size == 1:
            return number
        mine = torch.tensor(math.nan if number is None else number, dtype=torch.float64)
        found = self.gather(mine)[0].item()
        return None if math.isnan(found) else found

    def join_columns(self, hidden: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """The carried state of all columns, (1, B, ·) a tensor, from every rank's. Collective."""
        if self.size == 1:
            return hidden
        return [tuple(torch.cat([*self.gather(tensor)], dim=1) for tensor in layer) for layer in hidden]

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Averages the gradients over ranks, in place. Collective.

        A parameter that this rank's columns have not touched counts with zeros. An infinity (fp16) becomes
        one on all ranks, which then skip the step together.
        """
        if self.size == 1:
            return
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.contiguous()  # as they are, but for an odd layout
        large = [p.grad for p in parameters if p.numel() > LARGE]
        small = [p.grad for p in parameters if p.numel() <= LARGE]
        joined = torch.cat([gradient.flatten() for gradient in small])
        with others_alive():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in (joined, *large)]:
                work.wait()
        for tensor in (joined, *large):
            tensor.div_(self.size)
        for gradient, part in zip(small, joined.split([g.numel() for g in small]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def check_same(self, parameters: list[Tensor]) -> None:
        """Raises RunError when a weight is not the same on all ranks, bit for bit. Collective.

        Sums of the bits as integers: exact, in whatever order a device adds them up.
        """
        if self.size == 1:
            return
        sums = self.gather(
            torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in parameters])
        )
        if (sums != sums[0]).any():
            raise RunError(
                "the weights are no longer the same on all ranks: the devices do not compute alike; use "
                "machines of one kind, and go on with --resume from the last state"
            )


ALONE = Ranks()


def find_ranks() -> Ranks:
    """This process among those that torchrun started; alone without torchrun."""
    return Ranks(*torchrun_rank_and_size())


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """Inside ranks talk to each other.

    Raises:
        LostRankError: another one cannot be reached, or keeps silent for too long.
        RunError: it fails here: no memory, no port, no space in /dev/shm, ... This rank has to say so.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # dist's own errors are RuntimeErrors; Gloo's are nothing else
        text = re.sub(r"^\[\S*\] ", "", str(error))  # without the place in C++
        nccl = text.rpartition("Last error:\n")[2].strip()  # its own words come last
        reason = (nccl or text).partition("\n")[0]
        network = isinstance(error, dist.DistNetworkError | dist.DistStoreError) or LOST.search(str(error))
        if network and not FAILED_HERE.search(reason):
            raise LostRankError(
                f"another rank has ended or cannot be reached ({reason.split('. ')[0]}); it, or torchrun, "
                "says why"
            ) from None
        raise RunError(
            f"cannot work with the other ranks ({reason}); mend that, and go on with --resume"
        ) from None


@contextlib.contextmanager
def killable() -> Iterator[None]:
    """Inside SIGTERM ends the process at once: torch, waiting for the others, runs no Python handler."""
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
