"""The QRNN's CUDA kernels: what can be proved of them without a GPU, and what `-m cuda` checks with one.

Without: the text, built by g++ behind `cuda_shim.h`, runs on the CPU through the very launch code, in which a
stand-in takes the place of CuPy; and NVRTC, nvcc and ptxas compile it for the architectures in use.
"""

import contextlib
import copy
import ctypes
import functools
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from test_qrnn import TOLERANCE, assert_are_the_references, each_dtype, random_inputs, results

from layers import nvrtc, qrnn, qrnn_cuda
from layers.qrnn import forget_mult

HERE = Path(__file__).parent
KERNELS = [f"forget_mult_{way}_{dtype}" for way in ("forward", "backward") for dtype in qrnn_cuda.NAMES.values()]
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    """qrnn.cu, built by g++ for the CPU."""
    if shutil.which("g++") is None:
        pytest.fail("these tests build qrnn.cu with g++ (12 or newer); install it: apt-get install g++")
    folder = tmp_path_factory.mktemp("shim")
    lines = [f'#include "{HERE / "cuda_shim.h"}"', f'#include "{qrnn_cuda.SOURCE}"']
    (folder / "all.cpp").write_text("\n".join([*lines, *(f"EXPORT({name})" for name in KERNELS), ""]))
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", "all.cpp", "-o", "all.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"g++ does not build qrnn.cu: {done.stderr[:2000]}")
    return ctypes.CDLL(str(folder / "all.so"))


class StandIn:
    """In the place of CuPy and of torch's CUDA state: records launches, and executes them on the CPU.

    Attributes:
        launches: (kernel, grid, block, stream, device that was current) of each.
        geometry: a grid and a block to run with instead of the launch's own; None for its own.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.launches, self.geometry, self.current = library, [], None, "no guard"
        self.loaded = []
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(
                Device=lambda index: contextlib.nullcontext(),
                Stream=SimpleNamespace(from_external=lambda stream: f"cupy of {stream}"),
                function=SimpleNamespace(Module=lambda: self),
            )
        )

    def load(self, ptx: bytes) -> None:
        assert isinstance(ptx, bytes)
        self.loaded.append((ptx, self.current))

    def get_function(self, name: str):
        return functools.partial(self.call, name)

    def call(self, name, grid, block, args, shared_mem=0, stream=None, enable_cooperative_groups=False):
        """As cupy.cuda.function.Function: grid and block tuples of int, arguments numpy scalars by value."""
        assert all(type(n) is int for n in (*grid, *block, shared_mem))
        assert len(grid) == len(block) == 1
        self.launches.append((name, grid, block, stream, self.current))
        letters = ctypes.create_string_buffer(32)
        count = getattr(self.library, f"describe_{name}")(letters)
        given = "".join({np.uintp: "p", np.int64: "i"}.get(type(x), "?") for x in args)
        assert given == letters.raw[:count].decode(), f"{name}: arguments do not fit its parameters"
        values = [np.array(x) for x in args]
        addresses = (ctypes.c_void_p * count)(*(x.ctypes.data for x in values))
        grid, block = self.geometry or (grid[0], block[0])
        launch = getattr(self.library, f"launch_{name}")
        launch(ctypes.c_longlong(grid), ctypes.c_longlong(block), addresses)

    @contextlib.contextmanager
    def device(self, index):
        """torch.cuda.device."""
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def stand_in(library, monkeypatch) -> StandIn:
    """The launch code at work on CPU tensors; each test starts with nothing loaded or cached."""
    stand_in = StandIn(library)
    monkeypatch.setitem(sys.modules, "cupy", stand_in.cupy)
    monkeypatch.setattr(torch.cuda, "device", stand_in.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"torch's stream of {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(nvrtc, "compile_ptx", lambda source, architecture, options: architecture.encode())
    monkeypatch.setattr(qrnn, "pick_kernels", lambda x: qrnn_cuda)
    forget_caches()
    yield stand_in
    forget_caches()


def forget_caches() -> None:
    for cached in (nvrtc.load_module, nvrtc.find_kernel, qrnn_cuda.available, nvrtc.warn_once):
        cached.cache_clear()


@each_dtype
@pytest.mark.parametrize(
    ("size", "with_c0", "geometry"),
    [
        ((1, 1, 1), False, None),
        ((1, 3, 5), True, (1, 1)),
        ((2, 1, 7), False, (1, 32)),
        ((9, 4, 3), True, (3, 7)),
        ((16, 2, 5), False, (50, 16)),
        ((70, 2, 131), True, None),
        ((70, 2, 131), False, (3, 7)),
    ],
)
def test_kernels_match_the_reference(stand_in, dtype, size, with_c0, geometry):
    """Outputs and every gradient of the CUDA text, for odd sizes, all dtypes and any grid and block."""
    stand_in.geometry = geometry
    inputs = random_inputs(*size, with_c0)
    ours = results(forget_mult, inputs, dtype)
    assert [launch[0] for launch in stand_in.launches] == [
        f"forget_mult_forward_{qrnn_cuda.NAMES[dtype]}",
        f"forget_mult_backward_{qrnn_cuda.NAMES[dtype]}",
    ]
    assert_are_the_references(ours, inputs, dtype)


@pytest.mark.parametrize("geometry", [(1, 1), (3, 7), (50, 16)])
def test_each_lane_is_walked_once(stand_in, geometry):
    """Threads share the lanes without doing any twice: three exponentials per step and lane, no more."""
    stand_in.geometry = geometry
    count = ctypes.c_longlong.in_dll(stand_in.library, "exp_calls")
    count.value = 0
    forget_mult(torch.randn(5, 4, 3 * 33))
    assert count.value == 3 * 5 * 4 * 33


def test_kernels_agree_with_the_scan_on_extremes(stand_in, monkeypatch):
    """Saturated activations, ±1e4 before them, give no NaN, and what the scan gives."""
    y = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    y = torch.cartesian_prod(y, y, y).T.reshape(3, 49, 7).permute(1, 0, 2).reshape(7, 7, 21)
    kernel = results(forget_mult, [y, None], torch.float32)
    assert len(stand_in.launches) == 2
    monkeypatch.setattr(qrnn, "pick_kernels", lambda x: None)
    scan = results(forget_mult, [y, None], torch.float32)
    for x, expected in zip(kernel, scan, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_as_torch_rounds(stand_in):
    """To the nearest, ties to even; infinities and NaNs survive. With f = 0 and o = 1 the float32 c0 is out."""
    patterns = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7F7FFFFF, 0x80000001]
    c0 = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)[None]
    y = torch.tensor([0.0, -1e4, 1e4]).repeat_interleave(8).bfloat16().view(1, 1, 24)
    out, c_last = forget_mult(y, c0)
    torch.testing.assert_close(out[0], c0.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(c_last, c0, rtol=0, atol=0, equal_nan=True)
    assert stand_in.launches


def test_strided_inputs_are_made_contiguous(stand_in):
    """Transposed, sliced and expanded inputs give what contiguous ones give."""
    y, c0 = random_inputs(5, 4, 3)
    expected = reference.forget_mult(y, c0)
    wide = torch.zeros(4, 5, 18).double()
    wide[..., ::2] = y.transpose(0, 1)
    found = forget_mult(wide[..., ::2].transpose(0, 1), c0.T.contiguous().T)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    y.requires_grad_()
    ours = torch.autograd.grad(forget_mult(y, c0)[0].sum(), y)  # sum() sends an expanded gradient
    theirs = torch.autograd.grad(reference.forget_mult(y, c0)[0].sum(), y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert len(stand_in.launches) == 3


@pytest.mark.parametrize(("lanes", "blocks"), [(1, 1), (128, 1), (129, 2), (31_000, 243), (2**40, 2**33)])
def test_a_launch_covers_all_lanes_on_torchs_stream_and_device(stand_in, monkeypatch, lanes, blocks):
    """Grid, block, stream, and the device of the tensor current while launching, for a second GPU as well."""
    launched = lambda name, *a, stream, **_: seen.append((name, *a, stream, stand_in.current))  # noqa: E731
    monkeypatch.setattr(stand_in, "call", launched)
    for index in (0, 1):
        seen = []
        like = SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float16)
        qrnn_cuda.launch("forget_mult_forward", like, lanes, None, 7)
        (name, grid, block, values, stream, current) = seen[0]
        assert (name, grid, block) == ("forget_mult_forward_half", (blocks,), (128,))
        assert values == (0, 7)
        assert [type(x) for x in values] == [np.uintp, np.int64]
        assert stream == f"cupy of torch's stream of {index}"
        assert current == index
    assert stand_in.current == "no guard"


@pytest.mark.parametrize(
    "arguments",
    [
        lambda y, c, T, B, H: (y, c, None, c, c, T, B),
        lambda y, c, T, B, H: (y, c, c, c, T, c, B, H),
        lambda y, c, T, B, H: (y, c, c, c, c, T, B, H, H),
    ],
    ids=["one too few", "out of order", "one too many"],
)
def test_the_stand_in_notices_wrong_arguments(stand_in, arguments):
    """The check that guards the launch code does fail when the arguments do not fit the kernel."""
    y, c = torch.zeros(1, 1, 3), torch.zeros(1, 1, 1)
    with pytest.raises(AssertionError, match="do not fit"):
        qrnn_cuda.launch("forget_mult_forward", y, 1, *arguments(y, c, 1, 1, 1))


def test_a_module_per_device_and_a_compilation_per_architecture(stand_in, monkeypatch):
    """Three GPUs, two of a kind: three modules, each loaded on its device, two compilations."""
    compiled = []
    compile_ptx = functools.cache(lambda _, name, options: compiled.append(name) or name.encode())
    monkeypatch.setattr(nvrtc, "compile_ptx", compile_ptx)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (12, 0), (8, 0)][index])
    for index in (0, 1, 2, 0, 1, 2):
        assert qrnn_cuda.available(index)
    assert stand_in.loaded == [(b"compute_80", 0), (b"compute_120", 1), (b"compute_80", 2)]
    assert compiled == ["compute_80", "compute_120"]


@pytest.mark.parametrize("missing", ["cupy", "pynvrtc.compiler", "cuda.pathfinder"])
def test_without_the_packages_one_warning_names_the_command(monkeypatch, missing):
    """A CUDA tensor then takes the scan; the warning comes once per process, two devices or not."""
    forget_caches()
    nvrtc.compile_ptx.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, missing, None)  # importing it raises ImportError
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in (0, 1, 0):
            assert qrnn.pick_kernels(SimpleNamespace(device=torch.device("cuda", index))) is None
    forget_caches()
    (warning,) = caught
    assert "python -m pip install -r requirements-cuda.txt" in str(warning.message)
    assert missing.split(".")[0] in str(warning.message)
    assert (HERE.parent / "requirements-cuda.txt").exists()


def test_a_driver_that_fails_leaves_the_scan(stand_in, monkeypatch):
    """Whatever NVRTC or the driver raises becomes the warning's reason."""
    monkeypatch.setattr(nvrtc, "compile_ptx", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning, match="division by zero"):
        assert not qrnn_cuda.available(0)


def ptxas() -> str:
    """The ptxas of the package nvidia-cuda-nvcc, else the one on the PATH."""
    packaged = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "ptxas")
    found = packaged if packaged.exists() else shutil.which("ptxas")
    if not found:
        pytest.fail("there is no ptxas here; python -m pip install -r tests/requirements.txt brings it")
    return str(found)


def ptxas_report(ptx: bytes, architecture: str | int, folder: Path) -> tuple[list[tuple[str, ...]], str]:
    """(name, bytes of stack, of spill stores, of spill loads, registers) of each kernel; and all that ptxas says."""
    (folder / "x.ptx").write_bytes(ptx.rstrip(b"\0"))
    command = [ptxas(), "-v", f"-arch=sm_{architecture}", "x.ptx", "-o", "x.cubin"]
    report = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    entries = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    return entries, report


def check_ptx(ptx: bytes, architecture: int, folder: Path) -> None:
    """All kernels are there, for this architecture; ptxas needs no stack, no spills, at most 168 registers.

    Three blocks of 128 threads then fit a processor; B·H = 31,000 lanes bring two or three to each of 100.
    """
    assert f".target sm_{architecture}".encode() in ptx
    entries, _ = ptxas_report(ptx, architecture, folder)
    assert sorted(name for name, *_ in entries) == sorted(KERNELS)
    for name, *memory, registers in entries:
        assert memory == ["0", "0", "0"], name
        assert int(registers) <= 168, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_the_kernels(architecture, tmp_path):
    """NVRTC through pynvrtc, as at run time, for the architectures in use."""
    check_ptx(nvrtc.compile_ptx(qrnn_cuda.SOURCE, f"compute_{architecture}"), architecture, tmp_path)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on the PATH (NVRTC compiles the same text)")
@pytest.mark.parametrize("architecture", [ARCHITECTURES[0], ARCHITECTURES[-1]])
def test_nvcc_compiles_the_kernels(architecture, tmp_path):
    """nvcc on the same text with the same options."""
    command = ["nvcc", "-ptx", f"-arch=compute_{architecture}", *nvrtc.OPTIONS, str(qrnn_cuda.SOURCE)]
    subprocess.run([*command, "-o", str(tmp_path / "nvcc.ptx")], check=True, capture_output=True)
    check_ptx((tmp_path / "nvcc.ptx").read_bytes(), architecture, tmp_path)


def cuda_test(function):
    """Marks a test that needs a GPU; without one it is reported as skipped, with the reason."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    return pytest.mark.cuda(skip(function))


def require_kernels(index: int = 0) -> None:
    assert qrnn_cuda.available(index), "the kernels do not load: the warning says why"


@cuda_test
@each_dtype
@pytest.mark.parametrize(("size", "with_c0"), [((1, 1, 1), False), ((9, 4, 3), True), ((70, 20, 1550), True)])
def test_on_a_gpu_the_kernels_match_the_scan(dtype, size, with_c0, monkeypatch):
    """Outputs and all gradients, and that it was the kernels that gave them."""
    require_kernels()
    inputs = [None if x is None else x.cuda() for x in random_inputs(*size, with_c0)]
    with monkeypatch.context() as patch:
        patch.setattr(qrnn, "scan_forward", None)
        patch.setattr(qrnn, "scan_backward", None)
        ours = results(forget_mult, inputs, dtype)
    monkeypatch.setattr(qrnn, "pick_kernels", lambda x: None)
    theirs = results(forget_mult, inputs, dtype)
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@cuda_test
def test_on_a_gpu_work_is_ordered_by_torchs_current_stream():
    """On a side stream the kernel waits for what was queued there before it, and nothing else does."""
    require_kernels()
    y, c0 = (x.cuda() for x in random_inputs(50, 8, 64))
    expected = forget_mult(y, c0)[0]
    late, side = torch.zeros_like(y), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s of clock cycles
        late.copy_(y)
        out = forget_mult(late, c0)[0]
    side.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@cuda_test
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_on_two_gpus_each_runs_its_own():
    """Tensors of the second GPU while the first is current, forward and backward."""
    for index in (0, 1):
        require_kernels(index)
    inputs = random_inputs(9, 4, 33)
    first, second = (results(forget_mult, [x.cuda(index) for x in inputs], torch.float32) for index in (0, 1))
    for x, expected in zip(second, first, strict=True):
        assert x.device.index == 1
        torch.testing.assert_close(x.cpu(), expected.cpu())


@cuda_test
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_autocast_and_deepcopy(dtype):
    """Half precision in memory, c float32, gradients finite; a deep copy gives the same."""
    require_kernels()
    torch.manual_seed(0)
    layer = qrnn.QRNN(32, 48, first=True).cuda()
    x = torch.randn(70, 4, 32, device="cuda")
    exact = layer(x, layer.init_hidden(4))[0]
    with torch.autocast("cuda", dtype):
        out, hidden = layer(x, layer.init_hidden(4))
        again, _ = copy.deepcopy(layer)(x, layer.init_hidden(4))
    out.float().sum().backward()
    assert (out.dtype, hidden[0].dtype) == (dtype, torch.float32)
    assert torch.equal(out, again)
    assert torch.isfinite(layer.linear.weight.grad).all()
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


@cuda_test
def test_on_a_gpu_the_kernels_are_faster_than_the_scan(monkeypatch):
    """Forward and backward, at the size of a layer of the published model; bench.py has the times of whole steps."""
    require_kernels()
    y = random_inputs(70, 20, 1550, with_c0=False)[0].cuda().float().requires_grad_()
    times = []
    for pick in (qrnn.pick_kernels, lambda x: None):
        monkeypatch.setattr(qrnn, "pick_kernels", pick)
        for rounds in (5, 20):  # the first ones warm up
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(rounds):
                forget_mult(y)[0].sum().backward()
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    assert times[0] < times[1]
