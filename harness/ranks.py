"""Data-parallel training: the processes that torchrun starts ("ranks"), and their communication.

Every rank holds all weights and trains on its own columns of the batch. Rank 0 broadcasts its settings, weights and
position at the start. The gradients are averaged before each step, so the weights stay equal on all ranks. So do all
decisions: they depend only on numbers that all ranks share. Rank 0 alone prints and writes.

Tensors on a GPU are sent by NCCL. Losses, signals to stop and states are sent by Gloo, from CPU to CPU, and wait for no
GPU. Without torchrun there is one rank, and nothing is sent.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils import RunError, UserError, map_tensors

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # a rank that keeps the others waiting for longer counts as hung
LARGE = 1 << 20  # elements; larger gradients are averaged in place, smaller ones joined in one tensor
# Signals that end a process at once, and a run after its state was written; the exit status of each. Of SIGPIPE stdout
# has been closed; SIGUSR1 is what schedulers send before the time is up.
ENDINGS = {"SIGPIPE": 141, "SIGUSR1": 138, "SIGHUP": 129, "SIGTERM": 143}
REASONS = ("", "--max_steps", "--max_minutes", "SIGINT", *ENDINGS)  # to stop; the last one has priority
NO_TIME = ("--max_minutes", *ENDINGS)  # a run that ends for one of these neither validates nor tests
SEED_STRIDE = 1_000_003  # between ranks; torch's CPU generator uses the lower 32 bits of a seed


class Ranks:
    """This process, one of `size`; `Ranks()` is a single process.

    Collective methods ("Collective." in the docstring) return when every rank has called them. If a rank has ended,
    they raise a RuntimeError of torch.distributed.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """The number of ranks on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def device_name(self, name: str) -> str:
        """The device of this rank: each of several ranks has another GPU, or all are on the CPU.

        Raises:
            UserError: there are fewer GPUs than ranks on this machine; or `name` is a single device.
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
        """Joins the ranks in one process group. Collective.

        Raises:
            UserError: the environment does not give the address of rank 0.
        """
        if device.type == "cuda" and device.index is not None:  # streams and graphs are of torch's current GPU
            torch.cuda.set_device(device)
        if self.size == 1:
            return
        check_torchrun()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # While torch waits for the other ranks no Python handler runs, so SIGTERM has to end the process by default.
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            if store := self.own_store():
                dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=self.rank, world_size=self.size)
            else:
                dist.init_process_group(backend, timeout=PATIENCE)
        except ValueError as error:
            reason = str(error).rpartition("rendezvous: ")[2]
            hint = "start with torchrun, which says where rank 0 is, or unset RANK and WORLD_SIZE"
            raise UserError(f"WORLD_SIZE {self.size}: {reason}; {hint}") from None
        signal.signal(signal.SIGTERM, handler)

    def own_store(self) -> dist.Store | None:
        """The store by which the ranks find each other, where torchrun may start them again; None: as torch does it.

        torchrun's own store outlives the ranks, and with it the addresses of those that were killed. So rank 0 opens a
        new one, and the others look for its port until they reach it.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        host, key = os.environ["MASTER_ADDR"], "awd-lm: port of rank 0's store"
        shared = next(dist.rendezvous("env://", timeout=PATIENCE))[0]
        if self.is_main:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
            shared.set(key, str(store.port))
            return store
        end_s = time.monotonic() + PATIENCE.total_seconds()
        while True:
            try:
                port = int(shared.get(key))
                socket.create_connection((host, port), timeout=2).close()
                return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=PATIENCE)
            except OSError:  # the port of a rank 0 that is gone
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.1)

    def end(self) -> None:
        """Ends the communication: from here on no rank waits for another. Collective."""
        if self.size > 1:
            self.wait()
            dist.destroy_process_group()

    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError unless all ranks get the same number of columns."""
        if batch_size % self.size:
            below = batch_size - batch_size % self.size
            raise UserError(
                f"--batch_size {batch_size}: is the whole batch, dealt out to {self.size} processes; give a "
                f"multiple of {self.size}, such as {below or below + self.size}, or another --nproc_per_node"
            )

    def columns(self, batch_size: int) -> slice:
        """This rank's share of the columns; shares differ by one at most, and can be empty."""
        return slice(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def seed(self, seed: int, step: int = 0) -> None:
        """Gives this rank other dropout masks than the others have. Initial weights are drawn before that."""
        torch.manual_seed((seed + SEED_STRIDE * self.rank + step) % 2**63)

    def from_rank_0(self, tree: T) -> T:
        """Rank 0's plain data and CPU tensors, on every rank. Collective."""
        if self.size == 1:
            return tree
        skeleton = [map_tensors(lambda tensor: tensor.to("meta"), tree)]
        dist.broadcast_object_list(skeleton, device=torch.device("cpu"))
        if not self.is_main:
            tree = map_tensors(lambda tensor: torch.empty_like(tensor, device="cpu"), skeleton[0])
        map_tensors(lambda tensor: dist.broadcast(tensor, 0), tree)
        return tree

    def broadcast_weights(self, parameters: Sequence[Tensor]) -> None:
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
        """As `gather`; a single process gets its tensor back unchanged."""
        return tensor if self.size == 1 else self.gather(tensor)

    def sum(self, values: list[float]) -> list[float]:
        """The sums over ranks, in float64, added in the same order on every rank. Collective."""
        if self.size == 1:
            return values
        return self.gather(torch.tensor(values, dtype=torch.float64)).sum(0).tolist()

    def agree(self, reason: str) -> str:
        """Of all ranks' reasons to stop the one with the highest priority. Collective; takes some 0.2 ms."""
        if self.size == 1:
            return reason
        largest = torch.tensor(REASONS.index(reason))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return REASONS[int(largest)]

    def wait(self) -> None:
        """Waits for all ranks. Collective."""
        self.agree("")

    def join_columns(self, hidden: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """The hidden state of all columns, (1, B, ·) per tensor, joined from the ranks' columns. Collective."""
        if self.size == 1:
            return hidden
        return [tuple(torch.cat([*self.gather(tensor)], dim=1) for tensor in layer) for layer in hidden]

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Averages the gradients over ranks, in place. Collective.

        A parameter without a gradient on this rank counts as zeros. An infinite gradient (fp16) becomes infinite on all
        ranks, so that all skip the step.
        """
        if self.size == 1:
            return
        gradients: list[Tensor] = []
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.contiguous()  # most are contiguous already
            gradients.append(parameter.grad)
        large = [gradient for gradient in gradients if gradient.numel() > LARGE]
        small = [gradient for gradient in gradients if gradient.numel() <= LARGE]
        joined = torch.cat([gradient.flatten() for gradient in small])
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in (joined, *large)]:
            work.wait()
        for tensor in (joined, *large):
            tensor.div_(self.size)
        for gradient, part in zip(small, joined.split([g.numel() for g in small]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Ranks()


def find_ranks() -> Ranks:
    """This process's rank from the environment that torchrun or a scheduler sets; a single process without."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
        return Ranks(int(rank), int(size))
    return ALONE


class Stop(Exception):  # noqa: N818 - it ends a run, but is no error
    """Ends training between two steps; `reason` is one of REASONS: a signal, or the flag that set the limit."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Stopper:
    """While entered, Ctrl-C and the signals of ENDINGS are only noted; between two steps `check` raises Stop for them.

    A second Ctrl-C interrupts at once. Of several reasons the last one in REASONS counts, in whatever order they come.

    Args:
        deadline_s: of `time.monotonic`, for --max_minutes; None: no limit.
        ranks: a signal to one rank, or its clock, stops all ranks at the same `check`.
    """

    def __init__(self, deadline_s: float | None = None, ranks: Ranks = ALONE) -> None:
        self.deadline_s, self.ranks, self.signal = deadline_s, ranks, ""

    def __enter__(self) -> "Stopper":
        self.before = {signal.SIGINT: signal.signal(signal.SIGINT, self.note), **handle_endings(self.note, pipe=True)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = max(self.signal, signal.Signals(number).name, key=REASONS.index)

    def check(self, otherwise: str = "") -> None:
        """Raises Stop for a signal, for the deadline, or for the reason given. Collective."""
        late = self.deadline_s is not None and time.monotonic() >= self.deadline_s
        reason = self.ranks.agree(self.signal or ("--max_minutes" if late else otherwise))
        if reason:
            raise Stop(reason)

    def check_ending(self) -> None:
        """Raises Stop for the signals of ENDINGS: nothing else interrupts the last evaluation of a run. Collective."""
        if reason := self.ending():
            raise Stop(reason)

    def ending(self) -> str:
        """The signal of ENDINGS that a rank has received, or "". Collective."""
        reason = self.ranks.agree(self.signal)
        return reason if reason in ENDINGS else ""


def handle_endings(handler: Callable[[int, FrameType | None], object], pipe: bool = False) -> dict[int, Any]:
    """Sets the handler of the signals of ENDINGS; returns those from before. `pipe`: SIGPIPE too.

    SIGHUP and SIGUSR1 stay ignored where they are (nohup).
    """
    before: dict[int, Any] = {}
    for name in ENDINGS:
        number = getattr(signal, name, None)  # Windows has SIGTERM alone
        ignored = name in ("SIGHUP", "SIGUSR1") and signal.getsignal(number) is signal.SIG_IGN if number else True
        if number and not ignored and (pipe or name != "SIGPIPE"):
            before[number] = signal.signal(number, handler)
    return before


def end_with_parent() -> None:
    """Lets this process end when torchrun, which has started it, was killed: as by SIGTERM, or after eight seconds.

    Otherwise it would train and write on, beside the job that comes after.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(8)
        os._exit(ENDINGS["SIGTERM"])

    if under_torchrun():
        threading.Thread(target=watch, daemon=True).start()


def check_torchrun() -> None:
    """Raises RunError when torchrun has ended before `end_with_parent`: torch would look for its store for PATIENCE."""
    if under_torchrun() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=8).close()
        except OSError as error:
            raise RunError(f"torchrun, which has started this process, does not answer ({error.strerror})") from None


def under_torchrun() -> bool:
    """Whether torchrun has started this process; RANK alone may be left over in the environment."""
    return "TORCHELASTIC_RUN_ID" in os.environ
