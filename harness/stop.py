"""How a run is told to stop: a signal is noted, and obeyed between two steps, by all ranks at once."""

import signal
import time
from types import FrameType

from harness.ranks import ALONE, Ranks


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
