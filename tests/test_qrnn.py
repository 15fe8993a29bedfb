"""The QRNN on the CPU against a slow float64 reference."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import qrnn_reference as reference
import torch
from torch import nn

from layers import qrnn
from layers.qrnn import forget_mult

SIZES = [(1, 1, 1), (1, 3, 5), (2, 1, 7), (9, 4, 3), (70, 2, 33)]
# relative beyond 1: a few roundings to the dtype; for the wide ones of sums in another order
ROOT = Path(__file__).parent.parent
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=[1, 40, 2**15], ids=lambda grain: f"grain{grain}")
def _grain(request, monkeypatch):
    """Blocks of one step, of a few and of all: with two threads or more, GRAIN elements each at least."""
    monkeypatch.setattr(qrnn, "GRAIN", request.param)


@pytest.mark.usefixtures("_grain")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("with_c0", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_match_the_reference(dtype, with_c0, size):
    """Outputs and every gradient, for all dtypes, sizes and block lengths."""
    inputs = reference.random_inputs(*size, with_c0)
    ours = reference.results(forget_mult, inputs, dtype)
    assert ours[0].dtype == ours[2].dtype == dtype
    theirs = reference.results(reference.forget_mult, inputs, torch.float64)
    for x, expected in zip(ours, theirs, strict=True):
        assert x.shape == expected.shape
        torch.testing.assert_close(x.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("_grain")
@pytest.mark.parametrize("with_c0", [False, True])
def test_gradcheck(with_c0):
    """Analytic gradients are the numerical ones, of the first c too."""
    inputs = [x for x in reference.random_inputs(5, 2, 3, with_c0) if x is not None]
    assert torch.autograd.gradcheck(forget_mult, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(which):
    """A loss on out alone, or on c_last alone as without truncation, reaches y and c0."""
    y, c0 = (x.requires_grad_() for x in reference.random_inputs(6, 2, 3))
    ours = torch.autograd.grad(forget_mult(y, c0)[which].sum(), (y, c0))
    theirs = torch.autograd.grad(reference.forget_mult(y, c0)[which].sum(), (y, c0), materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_double_backward_is_an_error():
    """A second derivative is refused, not silently wrong."""
    inputs = [x.requires_grad_() for x in reference.random_inputs(3, 2, 2)]
    (gradient,) = torch.autograd.grad(forget_mult(*inputs)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_twice_with_a_retained_graph():
    """Nothing that was saved is overwritten by the first backward."""
    inputs = [x.requires_grad_() for x in reference.random_inputs(4, 2, 3)]
    output = forget_mult(*inputs)[0].sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    second = torch.autograd.grad(output, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_left_as_they_were_and_may_be_strided():
    """Transposed inputs give what contiguous ones give, and neither is written to."""
    inputs = reference.random_inputs(5, 4, 3)
    before = [x.clone() for x in inputs]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert not strided[0].is_contiguous()
    ours, expected = (reference.results(forget_mult, given, torch.float64) for given in (strided, inputs))
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(strided, before, strict=True))


def test_the_graph_does_not_grow_with_time():
    """A node for the whole recurrence, not one per step."""

    def nodes(T: int) -> int:
        out, _ = forget_mult(torch.randn(T, 2, 9, requires_grad=True), torch.zeros(2, 3))
        seen, todo = set(), [out.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo.extend(parent for parent, _ in node.next_functions)
        return len(seen)

    assert nodes(1) == nodes(50) <= 3


def test_autocast_keeps_the_recurrence_in_float32():
    """Under bfloat16 autocast a slow c moves, and is right; in bfloat16 itself it would stand still."""
    T, slow = 2000, -7.0  # σ(-7) = 0.0009: each step is below bfloat16's resolution once c passes 0.25
    layer = qrnn.QRNN(2, 1)
    with torch.no_grad():
        layer.linear.weight.zero_()
        layer.linear.bias.copy_(torch.tensor([20.0, slow, 20.0]))
    with torch.autocast("cpu", torch.bfloat16):
        out, (c,) = layer(torch.zeros(T, 1, 2), layer.init_hidden(1))
    expected = 1 - (1 - torch.sigmoid(torch.tensor(slow)).double()) ** T
    assert c.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert abs(c.item() - expected.item()) < 1e-4


@pytest.mark.parametrize("window", [1, 2])
def test_layer_matches_its_formula(window):
    """W · [x_t, x_{t-1}] + b, rows z, f, o, through the gates; the input before the first is carried."""
    torch.manual_seed(0)
    layer = qrnn.QRNN(3, 4, first=window == 2).double()
    x, c, x_last = torch.randn(6, 2, 3).double(), torch.randn(1, 2, 4).double(), torch.randn(1, 2, 3).double()
    out, hidden = layer(x, (c, x_last) if window == 2 else (c,))
    rows = []
    for t in range(6):
        before = x[t - 1] if t else x_last[0]
        columns = torch.cat([x[t], before], -1) if window == 2 else x[t]
        rows.append(columns @ layer.linear.weight.T + layer.linear.bias)
    expected, c_last = reference.forget_mult(torch.stack(rows), c[0])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(hidden[0], c_last[None], rtol=0, atol=1e-13)
    assert len(hidden) == window
    if window == 2:
        assert torch.equal(hidden[1], x[-1:])


@pytest.mark.parametrize("window", [1, 2])
def test_two_halves_are_one_whole(window):
    """A sequence cut anywhere, its hidden tensors carried, gives the outputs of the sequence in one piece."""
    torch.manual_seed(0)
    layer = qrnn.QRNN(3, 4, first=window == 2)
    x = torch.randn(7, 2, 3)
    whole, end = layer(x, layer.init_hidden(2))
    for cut in range(1, 7):
        first, hidden = layer(x[:cut], layer.init_hidden(2))
        second, hidden = layer(x[cut:], hidden)
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(hidden, end, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_parameters_and_what_it_carries(dtype):
    """The names that a saved model promises; carried tensors of the parameters' dtype that own their memory."""
    layer = qrnn.QRNN(3, 4, first=True).to(dtype)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "linear.weight": (12, 6),
        "linear.bias": (12,),
    }
    _, hidden = layer(torch.randn(5, 2, 3).to(dtype), layer.init_hidden(2))
    for x, shape in zip(hidden, [(1, 2, 4), (1, 2, 3)], strict=True):
        assert x.dtype == dtype
        assert x.shape == shape
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    (c,) = qrnn.QRNN(3, 4).init_hidden(5)
    assert c.shape == (1, 5, 4)
    assert not c.any()


def test_layer_calls_its_linear_module():
    """Weight drop replaces `linear`: the layer uses what stands there, and its deep copy does too."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = qrnn.QRNN(3, 4)
    x, hidden = torch.randn(5, 2, 3), layer.init_hidden(2)
    plain = layer(x, hidden)[0]
    weights = layer.linear.state_dict()
    layer.linear = Doubled(3, 12)
    layer.linear.load_state_dict(weights)
    doubled = layer(x, hidden)[0]
    assert not torch.equal(plain, doubled)
    assert torch.equal(copy.deepcopy(layer)(x, hidden)[0], doubled)
    expected, _ = forget_mult(2 * nn.functional.linear(x, **weights), hidden[0][0])
    torch.testing.assert_close(doubled, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forget_mult(torch.rand(3, 2, 4)), r"\(3, 2, 4\)"),
        (lambda: forget_mult(torch.rand(3, 6)), r"\(3, 6\)"),
        (lambda: forget_mult(torch.rand(0, 2, 6)), r"\(0, 2, 6\)"),
        (lambda: forget_mult(torch.ones(3, 2, 6, dtype=torch.int64)), "int64"),
        (lambda: forget_mult(torch.rand(3, 2, 6), torch.rand(2, 6)), r"c0 has shape \(2, 6\); \(2, 2\)"),
        (lambda: forget_mult(torch.rand(3, 2, 6), torch.rand(1, 2, 2)), r"c0 has shape \(1, 2, 2\)"),
        (lambda: forget_mult(torch.rand(3, 2, 6), torch.rand(2, 2, device="meta")), "c0 is on meta"),
    ],
)
def test_bad_arguments_are_named(call, message):
    """What does not fit is refused before a kernel could read past its end."""
    with pytest.raises(ValueError, match=message):
        call()


def test_the_cpu_loads_nothing_of_cuda():
    """A layer trained on the CPU imports neither the launch code nor what it needs."""
    code = """
import sys, torch
before = set(sys.modules)
from layers import qrnn
layer = qrnn.QRNN(3, 4, first=True)
layer(torch.randn(5, 2, 3), layer.init_hidden(2))[0].sum().backward()
unwanted = {"qrnn_cuda", "cupy", "pynvrtc", "cuda"}
print([name for name in set(sys.modules) - before if unwanted & set(name.split("."))])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_device_of_another_kind_takes_the_scan():
    """Only CUDA devices are asked for kernels (an Apple GPU, say, has none)."""
    assert qrnn.pick_kernels(SimpleNamespace(device=torch.device("mps"))) is None
