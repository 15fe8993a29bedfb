"""What bench.py times: the plain step, the floor, and the toolkit's own work. This is the clock."""

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds of one call, from an idle device to an idle device, and what it returns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    found = work()
    wait()
    return (time.perf_counter() - start) * 1000, found
