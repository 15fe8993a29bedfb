"""The work that bench.py times: our step, the plain one, fastai's, the floor; this file is the clock."""

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds of one call, from an idle device to an idle device, and its result."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return (time.perf_counter() - start) * 1000, result
