"""How a run is told to stop: a signal is noted, and obeyed between two steps, by all ranks at once."""

import signal
from types import FrameType

from parallel import ALONE, Ranks


class Stop(Exception):  # noqa: N818 - it ends a run, it is no error
    """Training ends here, between two steps: `reason` is "SIGINT", "SIGTERM" or the flag that said so."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StopSignals:
    """While entered, Ctrl-C and SIGTERM are noted, and `check` raises Stop at the next safe place.

    A second Ctrl-C interrupts at once. One rank's signal stops all `ranks`, at the same `check`.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks

    def __enter__(self) -> "StopSignals":
        self.reason = ""
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.reason == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def check(self, otherwise: str = "") -> None:
        """Raises Stop for a signal, or for the reason given when there was no signal."""
        reason = self.ranks.agree(self.reason or otherwise)
        if reason:
            raise Stop(reason)

    def terminated(self) -> bool:
        """Whether SIGTERM has come, to any of the ranks: it outweighs all other reasons. Collective."""
        return self.ranks.agree(self.reason) == "SIGTERM"
