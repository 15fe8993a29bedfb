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
                function=SimpleNamespace(
                    Module=lambda: SimpleNamespace(load=self.load, get_function=self.get_function)
                ),
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
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
            flags += ["-Werror"] if self.text == persistent.SOURCE.read_text() else []
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
    inputs = Inputs(
        *(x if x is None else x.to(device, x.dtype if x.dtype == torch.bool else torch.float32) for x in inputs)
    )
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


CASES = [  # H, B, T, processors, dropped: units per block, tiles per warp, chunks and unused units differ
    (20, 3, 5, 132, False),
    (20, 3, 1, 132, True),
    (37, 20, 3, 5, True),
    (50, 27, 2, 4, False),
    (150, 9, 2, 10, True),
]


@pytest.mark.parametrize(("H", "B", "T", "processors", "dropped"), CASES)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients_have_the_error_of_tf32(cell, H, B, T, processors, dropped, stand_in):
    """Every output and gradient, from a carried state, with and without weight drop or the mask of h."""
    stand_in.processors, stand_in.order = processors, H + B
    inputs = random_inputs(cell, H, B, T, dropped)
    found = kernels_result(cell, inputs)
    assert excess(cell, inputs, found) < FACTOR
    (_, grid, _, cooperative), (_, back, _, too) = stand_in.launches
    assert cooperative
    assert too
    assert grid <= processors
    assert back == -(-H // 16)


@pytest.mark.parametrize("cell", CELLS)
def test_the_order_of_threads_changes_no_bit(cell, stand_in):
    """In turn, or shuffled and at different paces."""
    stand_in.processors, inputs = 5, random_inputs(cell, 37, 20, 3, True)
    expected = kernels_result(cell, inputs)
    for stand_in.order in range(1, 4):
        for x, y in zip(kernels_result(cell, inputs), expected, strict=True):
            assert torch.equal(x, y)


WAIT = "    while (arrived(count) < n * gridDim.x) {\n    }\n"
READ, SYNC = "      if (chunk + 1 < CHUNKS) __syncthreads();", "      __syncthreads();\n"
WRONG = {  # what is wrong with a text: what is replaced, by what
    "blocks do not wait": (WAIT, ""),
    "a block does not wait before it arrives": (
        "  __syncthreads();\n  if (threadIdx.x == 0) {\n",
        "  if (threadIdx.x == 0) {\n",
    ),
    "a block does not wait after the others": ("    }\n  }\n  __syncthreads();\n}", "    }\n  }\n}"),
    "sums are read too early, forward": (f"(w, received, chunk, partial);\n{SYNC}", "(w, received, chunk, partial);\n"),
    "sums are read too early, backward": (
        f"(w, passed_on, chunk, partial);\n{SYNC}",
        "(w, passed_on, chunk, partial);\n",
    ),
    "sums are overwritten too early, forward": (f"= y[j][g];\n      }}\n{READ}", "= y[j][g];\n      }\n"),
    "sums are overwritten too early, backward": (f": 0.f);\n      }}\n{READ}", ": 0.f);\n      }\n"),
    "one half of the exchange, forward": ("(t + 1) % 2 * S::EXCHANGE", "t % 2 * S::EXCHANGE"),
    "one half of the exchange, backward": ("passed_on = exchange + t % 2 * S::EXCHANGE", "passed_on = exchange"),
    "the mask of weight drop": ("keep && !keep[i] ? 0.f : raw", "raw"),
    "the power of two": ("* down * factor", "* factor"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_text_is_noticed(wrong, stand_in):
    """Each barrier is needed, and the test above notices when one is missing."""
    old, new = WRONG[wrong]
    assert stand_in.text.count(old) == 1
    stand_in.text, stand_in.processors = stand_in.text.replace(old, new), 4
    inputs = random_inputs("LSTM", 50, 27, 4, True)
    for stand_in.order in range(1, 9):
        if not excess("LSTM", inputs, kernels_result("LSTM", inputs)) < FACTOR:
            return
    pytest.fail("the results are right")


def test_the_check_of_arguments_fails_for_wrong_ones(stand_in):
    """One too few for the kernel."""
    kernels = persistent.find_kernels("GRU", 20, 3, None)
    with pytest.raises(AssertionError, match="do not fit"):
        kernels.run("forward", torch.zeros(60, 20), None, scale=1.0, T=1)


@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1e9])
def test_gradients_of_any_size_keep_their_precision(factor, stand_in):
    """Half precision ends at 65504 and has few bits below 6e-5: they are scaled before they are rounded."""
    inputs = random_inputs("LSTM", 20, 3, 5, False)
    inputs = inputs._replace(d_out=inputs.d_out * factor, d_last=inputs.d_last * factor)
    assert excess("LSTM", inputs, kernels_result("LSTM", inputs)) < FACTOR


def test_gradients_of_zero_and_without_end(stand_in):
    """Zeros stay zeros. Gradients that explode from step to step are bounded, not infinite. NaN stays NaN."""
    inputs = random_inputs("LSTM", 20, 3, 5, False)
    zero = inputs._replace(d_out=0 * inputs.d_out, d_last=0 * inputs.d_last)
    assert all(not gradient.any() for gradient in kernels_result("LSTM", zero)[2:])
    # all gates half open, so a gradient grows by some 10^4 per step through a large matrix
    steep = inputs._replace(
        y=torch.zeros(5, 3, 80).double(), h=0 * inputs.h, c=0 * inputs.c, weight=1e4 * torch.ones_like(inputs.weight)
    )
    assert all(x.isfinite().all() for x in kernels_result("LSTM", steep))
    assert float(kernels_result("LSTM", steep)[2].abs().max()) > 1e3 * float(steep.d_out.abs().max())
    broken = inputs._replace(d_out=inputs.d_out * torch.nan)
    assert all(gradient.isnan().any() for gradient in kernels_result("LSTM", broken)[2:])


LAYERS = {"LSTM": {}, "GRU": {}, "Mogrifier": {"rounds": 0}}


def learn(layer: torch.nn.Module, x: Tensor, hidden: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs over two segments, the second one from where the first one ends, and the gradients of the parameters."""
    outputs = []
    for part in x.chunk(2):
        out, hidden = layer(part, hidden)
        outputs.append(out)
    loss = torch.cat(outputs).square().sum() + sum(tensor.square().sum() for tensor in hidden)
    gradients = torch.autograd.grad(loss, list(layer.parameters()))
    return [x.detach().double() for x in (torch.cat(outputs), *hidden, *gradients)]


@pytest.mark.parametrize("dropped", [0.0, 0.4])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_learns_the_same(kind, dropped, stand_in, monkeypatch):
    """As without the kernels: two segments, and the gradient of every parameter. The same masks are drawn for both."""
    options = {"dropoutr": dropped} if kind == "Mogrifier" else {"wdrop": dropped}
    layer = make_layer(kind, 7, 20, False, **LAYERS[kind], **options).float().train()
    draw_keep, draws = persistent.draw_keep, []

    def drop_weight(raw: Tensor, p: float, training: bool) -> Tensor:
        keep, scale = draw_keep(raw, p)
        return raw if keep is None else raw * keep * scale

    monkeypatch.setattr("layers.recurrent.drop_weight", drop_weight)
    monkeypatch.setattr(persistent, "draw_keep", lambda raw, p: draws.append(p) or draw_keep(raw, p))
    x, results = torch.randn(6, 3, 7), []
    for layer.persistent in (False, True):
        torch.manual_seed(1)
        results.append(learn(layer, x, layer.init_hidden(3)))
    assert len(stand_in.launches) == 4
    assert draws == ([] if kind == "Mogrifier" else [dropped] * 2)
    for found, expected in zip(results[1], results[0], strict=True):
        assert error(found, expected) < 2e-3


@pytest.mark.parametrize("kind", LAYERS)
def test_only_training_in_float32_uses_the_kernels(kind, stand_in):
    """Not evaluation, float64 and autocast, in which a Mogrifier stays in float32. Rounds are not served."""
    layer = make_layer(kind, 7, 20, False, **LAYERS[kind]).float()
    layer.persistent = True
    layer.eval()(torch.randn(2, 3, 7), layer.init_hidden(3))
    assert not stand_in.launches
    double = copy.deepcopy(layer).double().train()
    with pytest.warns(RuntimeWarning, match="float32"):
        double(torch.randn(2, 3, 7).double(), double.init_hidden(3))
    assert not stand_in.launches
    with torch.autocast("cpu", torch.bfloat16):
        layer.train()(torch.randn(2, 3, 7), layer.init_hidden(3))
    assert len(stand_in.launches) == (kind == "Mogrifier")
    stand_in.launches.clear()
    if kind == "Mogrifier":
        rounds = make_layer(kind, 7, 20, False, rounds=2).float().train()
        rounds.persistent = True
        rounds(torch.randn(2, 3, 7), rounds.init_hidden(3))
        assert not stand_in.launches


def refuse(*_: object) -> None:
    raise RuntimeError("no compiler")


@pytest.mark.parametrize("why", ["blocks", "wide", "cupy", "compiler"])
def test_what_is_not_served_is_said_once(why, stand_in, monkeypatch):
    """The layer then runs as without the flag."""
    match = {"blocks": "same time", "wide": "registers", "cupy": "pip install -r", "compiler": "no compiler"}[why]
    if why == "blocks":
        stand_in.fit = 0
    if why == "wide":
        stand_in.processors = 1
    if why == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    if why == "compiler":
        monkeypatch.setattr(nvrtc, "compile_ptx", refuse)
    layer = make_layer("LSTM", 7, 20, False).float().train()
    x, hidden = torch.randn(2, 3, 7), layer.init_hidden(3)
    expected, _ = layer(x, hidden)
    layer.persistent = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(layer(x, hidden)[0], expected)
    (warning,) = caught
    assert re.search(match, str(warning.message))
    assert not stand_in.launches


PUBLISHED = [  # cell, H, B
    ("LSTM", 1150, 20),
    ("LSTM", 1150, 80),
    ("LSTM", 400, 20),
    ("LSTM", 1000, 128),
    ("GRU", 1150, 20),
    ("MELIS", 951, 64),
    ("MELIS", 912, 64),
]


@pytest.mark.parametrize(("cell", "H", "B"), PUBLISHED)
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_published_sizes_are_served(cell, H, B, card):
    """Every unit has a block, every block a processor; the weights have their registers."""
    sizes = choose_sizes(cell, H, B, card)
    rows = persistent.GATES[cell] * sizes.forward.units
    for direction, tiles in ((sizes.forward, -(-rows // 16)), (sizes.backward, 1)):
        assert (direction.blocks - 1) * direction.units < H <= direction.blocks * direction.units
        assert direction.blocks <= card.processors
        assert direction.shared_bytes <= card.shared_bytes
        assert tiles * 16 >= (rows if direction is sizes.forward else direction.units)


def test_more_processors_mean_fewer_units_per_block():
    """1150 units of 4 gates: three tiles of 16 rows on 132 processors, two on 148."""
    assert choose_sizes("LSTM", 1150, 20, H100).forward[:2] == (12, 96)
    assert choose_sizes("LSTM", 1150, 20, CARDS["B200"]).forward[:2] == (8, 144)
    assert choose_sizes("GRU", 1150, 20, CARDS["A100"]).forward[:2] == (16, 72)
    assert choose_sizes("LSTM", 1, 1, H100).forward[:2] == (4, 1)


@pytest.mark.parametrize(
    ("H", "B", "card", "reason"),
    [
        (1150, 20, Card((7, 5), 132, 65536), "8.0"),
        (1840, 128, H100, "registers"),
        (1150, 20, Card((8, 6), 30, 101376), "registers"),
        (1150, 2000, H100, "shared memory"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(H, B, card, reason):
    """An old GPU, enwik8's width, a small GPU, a batch without end."""
    with pytest.raises(NotServedError, match=reason):
        choose_sizes("LSTM", H, B, card)


def cuda_test(function):
    """Marks a test that needs a GPU; without one it is reported as skipped, with the reason."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    return pytest.mark.cuda(skip(function))


@cuda_test
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("H", "B", "T"), [(20, 3, 5), (150, 9, 2), (400, 80, 7), (1150, 20, 4), (951, 64, 4)])
@pytest.mark.parametrize("cell", CELLS)
def test_on_a_gpu_outputs_and_gradients_have_the_error_of_tf32(cell, H, B, T, dropped):
    """As on the CPU above, and the second time the same bits: the barrier's counter begins at zero again."""
    inputs = random_inputs(cell, H, B, T, dropped)
    found = kernels_result(cell, inputs, "cuda")
    assert excess(cell, inputs, found) < FACTOR
    kernels = [kernels_result(cell, inputs, "cuda")[:1] for _ in range(20)]
    assert all(torch.equal(again[0], found[0]) for again in kernels)


@cuda_test
@pytest.mark.parametrize("kind", LAYERS)
def test_on_a_gpu_a_graph_repeats_the_kernels(kind):
    """Captured once, replayed with other inputs: what the layer gives without a graph."""
    layer = make_layer(kind, 16, 48, False, **LAYERS[kind]).float().cuda().train()
    layer.persistent = True
    static, stream = torch.randn(9, 4, 16, device="cuda"), torch.cuda.Stream()
    hidden = layer.init_hidden(4)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        learn(layer, static, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = learn(layer, static, hidden)
    for _ in range(3):
        static.copy_(torch.randn_like(static))
        graph.replay()
        for found, expected in zip(results, learn(layer, static, hidden), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@cuda_test
def test_on_a_gpu_a_layer_that_is_not_served_still_runs():
    """Wider than the registers of any GPU: cuDNN, and one warning."""
    layer = make_layer("LSTM", 16, 4096, False).float().cuda().train()
    layer.persistent = True
    with pytest.warns(RuntimeWarning, match="registers"):
        layer(torch.randn(2, 3, 16, device="cuda"), layer.init_hidden(3))
