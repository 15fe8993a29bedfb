"""persistent.cu and its launches: what can be proved of them without a GPU, and what `-m cuda` checks with one.

Without: the text, built by g++ behind `cuda_fibers.h`, runs on the CPU through the very launch code, in which a
stand-in takes the place of CuPy; and NVRTC and ptxas compile it for the architectures in use.

The kernels round the factors of their products to 11 bits, as TF32 does. So they are compared with float64 definitions,
and the error may be as large as TF32's own.
"""

import contextlib
import copy
import ctypes
import functools
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
from test_qrnn_cuda import ptxas
from torch import Tensor
from toys import make_layer

from layers import nvrtc, persistent
from layers.persistent import Card, NotServedError, Recurrence, choose_sizes

HERE = Path(__file__).parent
CELLS = list(persistent.GATES)
H100 = Card((9, 0), 132, 232448)
CARDS = {  # capability, processors, shared memory per block
    "A100": Card((8, 0), 108, 166912),
    "RTX 4090": Card((8, 9), 128, 101376),
    "H100": H100,
    "B200": Card((10, 0), 148, 232448),
    "RTX 5090": Card((12, 0), 170, 101376),
}
FACTOR = 1.5  # how far above TF32's error ours may be: both come from few random numbers


class StandIn:
    """In the place of CuPy and of torch's CUDA state: builds the text for each choice of sizes and runs it on the CPU.

    Attributes:
        text: persistent.cu, which a test may change.
        processors, fit: of the GPU, and how many blocks run on one at a time.
        order: of the threads; see cuda_fibers.h.
        launches: (kernel, grid, shared bytes, cooperative) of each.
    """

    built: dict[tuple[str, bytes], ctypes.CDLL] = {}  # noqa: RUF012 - of all tests
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, persistent.SOURCE.read_text()
        self.processors, self.fit, self.order, self.launches, self.limits = 132, 1, 0, [], {}
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(
                Device=lambda index: contextlib.nullcontext(),
                Stream=SimpleNamespace(from_external=lambda stream: stream),
                function=SimpleNamespace(Module=lambda: SimpleNamespace(load=self.load, get_function=self.get_function)),
                driver=self,
            )
        )

    def load(self, options: bytes) -> None:
        key = self.text, options
        if key not in self.built:
            place = self.folder / f"{len(self.built)}"
            kernels = [f"EXPORT(persistent_{way})" for way in ("forward", "backward")]
            lines = [f'#include "{HERE / "cuda_fibers.h"}"', self.text, *kernels]
            place.with_suffix(".cpp").write_text("\n".join([*lines, ""]))
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
            command = ["g++", *flags, *options.decode().split(), f"{place}.cpp", "-o", f"{place}.so"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"g++ does not build persistent.cu: {done.stderr[:2000]}")
            self.built[key] = ctypes.CDLL(f"{place}.so")
        self.library = self.built[key]

    def get_function(self, name: str):
        function = functools.partial(self.call, self.library, name)
        function.ptr = name
        return function

    def funcSetAttribute(self, ptr: str, attribute: int, value: int) -> None:  # noqa: N802 - CuPy's name
        self.limits[ptr] = value

    def occupancyMaxActiveBlocksPerMultiprocessor(self, ptr: str, threads: int, shared: int) -> int:  # noqa: N802
        return self.fit

    def call(self, library, name, grid, block, args, shared_mem=0, stream=None, enable_cooperative_groups=False):
        """As cupy.cuda.function.Function."""
        assert (len(grid), block, stream) == (1, (persistent.THREADS,), "the stream")
        assert shared_mem <= self.limits[name]
        assert grid[0] <= self.processors
        self.launches.append((name, grid[0], shared_mem, enable_cooperative_groups))
        letters = ctypes.create_string_buffer(32)
        count = getattr(library, f"describe_{name}")(letters)
        given = "".join({np.uintp: "p", np.int64: "i", np.float32: "f"}[type(x)] for x in args)
        assert given == letters.raw[:count].decode(), f"{name}: arguments do not fit its parameters"
        values = [np.array(x) for x in args]
        addresses = (ctypes.c_void_p * count)(*(x.ctypes.data for x in values))
        launch = getattr(library, f"launch_{name}")
        launch.restype = ctypes.c_bool
        assert launch(grid[0], block[0], shared_mem, self.order, addresses), "the threads wait for ever"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.fail("these tests build persistent.cu with g++ (12 or newer); install it: apt-get install g++")
    return tmp_path_factory.mktemp("fibers")


@pytest.fixture
def stand_in(folder, monkeypatch) -> StandIn:
    """The launch code at work on CPU tensors; nothing is loaded or cached, and new memory is NaN."""
    stand_in = StandIn(folder)
    monkeypatch.setitem(sys.modules, "cupy", stand_in.cupy)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: "the stream")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties(stand_in.processors))
    monkeypatch.setattr(nvrtc, "compile_ptx", lambda source, architecture, options: " ".join(options).encode())
    forget_caches()
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    yield stand_in
    torch.use_deterministic_algorithms(False)
    forget_caches()


def properties(processors: int) -> SimpleNamespace:
    return SimpleNamespace(major=9, minor=0, multi_processor_count=processors, shared_memory_per_block_optin=232448)


def forget_caches() -> None:
    for cached in (nvrtc.load_module, nvrtc.find_kernel, persistent.find_kernels, nvrtc.warn_once):
        cached.cache_clear()


class Inputs(NamedTuple):
    """Those of Recurrence in float64, and gradients of its outputs."""

    y: Tensor
    h: Tensor
    c: Tensor | None
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    keep: Tensor | None
    d_out: Tensor
    d_last: Tensor | None

    @property
    def scale(self) -> float:
        return 1.0 if self.keep is None else 1 / 0.6


def random_inputs(cell: str, H: int, B: int, T: int, dropped: bool) -> Inputs:
    """Rounded to float32, with gradients as small as those of a mean loss. dropped: with weight drop or a mask of h."""
    G = persistent.GATES[cell]
    generator = torch.Generator().manual_seed(H + B + T)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).double()

    h, c, d_last = torch.tanh(draw(B, H)), draw(B, H), 1e-4 * draw(B, H)
    bias = draw(3 * H) if cell == "GRU" else None
    mask = (torch.rand(B, H, generator=generator) < 0.7) / 0.7 if cell == "MELIS" and dropped else None
    keep = torch.rand(G * H, H, generator=generator) < 0.6 if cell != "MELIS" and dropped else None
    weight = draw(G * H, H) * H**-0.5
    c, d_last = (None, None) if cell == "GRU" else (c, d_last)
    mask = None if mask is None else mask.float().double()
    inputs = Inputs(draw(T, B, G * H), h, c, weight, bias, mask, keep, 1e-4 * draw(T, B, H), d_last)
    return Inputs(*(x if x is None or x.dtype == torch.bool else x.float().double() for x in inputs))


class TF32Product(torch.autograd.Function):
    """h · weightᵀ, and the gradient of h, with factors that are rounded to 11 bits."""

    @staticmethod
    def forward(ctx, h, weight):
        ctx.save_for_backward(h, weight)
        return tf32(h) @ tf32(weight).T

    @staticmethod
    def backward(ctx, d):
        h, weight = ctx.saved_tensors
        return tf32(d) @ tf32(weight), d.T @ h


def tf32(x: Tensor) -> Tensor:
    bits = x.float().view(torch.int32).long() + 0x1000 & ~0x1FFF
    return bits.to(torch.int32).view(torch.float32).double()


def outputs_and_gradients(run, inputs: Inputs) -> list[Tensor]:
    """out, the last c, and the gradients of y, h, c, weight and bias, of those that are there."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs[:5]]
    outputs = [x for x in run(*leaves) if x is not None]
    given = [x.to(outputs[0].dtype) for x in (inputs.d_out, inputs.d_last) if x is not None]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x is not None], given)
    return [x.detach().double() for x in (*outputs, *gradients)]


def definition(cell: str, inputs: Inputs, **how) -> list[Tensor]:
    """From reference.py, in float64."""
    drop = 1.0 if inputs.keep is None else inputs.keep * float(np.float32(inputs.scale))
    mask = 1.0 if inputs.mask is None else inputs.mask

    def run(y, h, c, weight, bias):
        return reference.recurrence(cell, y, h, c, weight * drop, 0.0 if bias is None else bias, mask, **how)

    return outputs_and_gradients(run, inputs)


def kernels_result(cell: str, inputs: Inputs, device: str | None = None) -> list[Tensor]:
    """By the kernels, in float32."""
    inputs = Inputs(*(x if x is None else x.to(device, x.dtype if x.dtype == torch.bool else torch.float32) for x in inputs))
    kernels = persistent.find_kernels(cell, inputs.h.size(1), inputs.h.size(0), inputs.y.device.index)
    assert kernels, "the warning says why"

    def run(y, h, c, weight, bias):
        given = y.clone(), h, c, weight, bias, inputs.mask, inputs.keep, inputs.scale
        found = Recurrence.apply(kernels, *given)
        return found if isinstance(found, tuple) else (found,)

    return [x.cpu() for x in outputs_and_gradients(run, inputs)]


def error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def excess(cell: str, inputs: Inputs, found: list[Tensor]) -> float:
    """The largest error of outputs and gradients, in units of TF32's; NaN where one is."""
    exact, rounded = definition(cell, inputs), definition(cell, inputs, product=TF32Product.apply)
    assert [x.shape for x in found] == [x.shape for x in exact]
    pairs = zip(found, rounded, exact, strict=True)
    return max((error(x, right) / error(like, right) for x, like, right in pairs), key=lambda e: (e != e, e))


CASES = [  # H, B, T, processors: units per block, tiles per warp, chunks and unused units differ
    (20, 3, 5, 132),
    (37, 20, 3, 5),
    (50, 27, 2, 4),
    (150, 9, 2, 10),
]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("H", "B", "T", "processors"), CASES)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients_have_the_error_of_tf32(cell, H, B, T, processors, dropped, stand_in):
    """Every output and gradient, from a carried state."""
    stand_in.processors, stand_in.order = processors, H + dropped
    inputs = random_inputs(cell, H, B, T, dropped)
    found = kernels_result(cell, inputs)
    assert excess(cell, inputs, found) < FACTOR
    (_, grid, _, cooperative), (_, back, _, too) = stand_in.launches
    assert cooperative
    assert too
    assert grid <= processors
    assert back == -(-H // 16)
