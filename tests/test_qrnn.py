"""The QRNN on the CPU against a slow float64 reference."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import reference
import torch
from runner import ROOT
from torch import Tensor
from toys import draw

from layers import qrnn
from layers.qrnn import forget_mult

# relative beyond 1: a few roundings to the dtype; for the wide ones of sums in another order
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def random_inputs(T: int, B: int, H: int, with_c0: bool = True) -> list[Tensor | None]:
    """y (T, B, 3H) and c0 (B, H) or None, float64, rounded to what bfloat16 holds: the same for every dtype."""
    generator = torch.Generator().manual_seed(0)
    y, c0 = (torch.randn(size, generator=generator).bfloat16().double() for size in ((T, B, 3 * H), (B, H)))
    return [2 * y, c0 if with_c0 else None]


def results(function: Callable, inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `function` at `inputs` taken as `dtype`, then the gradients of all inputs that are not None.

    The gradients that flow into the outputs are fixed random ones: the same for every implementation.
    """
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator).double().to(x.device)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x for x in inputs if x is not None])]


def assert_are_the_references(found: list[Tensor], inputs: list[Tensor | None], dtype: torch.dtype) -> None:
    """Values, shapes and dtypes of `results`; without c0 the last c has the dtype of the arithmetic."""
    expected = results(reference.forget_mult, inputs, torch.float64)
    for i, (x, wanted) in enumerate(zip(found, expected, strict=True)):
        assert x.shape == wanted.shape
        assert x.dtype == dtype or (i == 1 and inputs[1] is None)
        torch.testing.assert_close(x.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@each_dtype
@pytest.mark.parametrize(
    ("size", "with_c0", "grain"),
    [
        ((1, 1, 1), False, 2**15),
        ((1, 3, 5), True, 1),
        ((2, 1, 7), False, 40),
        ((9, 4, 3), True, 40),
        ((70, 2, 33), False, 1),
        ((70, 2, 33), True, 2**15),
    ],
)
def test_values_and_gradients_are_the_references(dtype, size, with_c0, grain, monkeypatch):
    """In blocks of one step, of a few and of all."""
    monkeypatch.setattr(qrnn, "GRAIN", grain)  # elements per block, with one thread
    inputs = random_inputs(*size, with_c0)
    assert_are_the_references(results(forget_mult, inputs, dtype), inputs, dtype)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(which):
    """A loss on out alone, or on c_last alone as without truncation, reaches y and c0."""
    y, c0 = (x.requires_grad_() for x in random_inputs(6, 2, 3))
    ours = torch.autograd.grad(forget_mult(y, c0)[which].sum(), (y, c0))
    theirs = torch.autograd.grad(reference.forget_mult(y, c0)[which].sum(), (y, c0), materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_double_backward_is_an_error():
    """A second derivative is refused, not silently wrong."""
    inputs = [x.requires_grad_() for x in random_inputs(3, 2, 2)]
    (gradient,) = torch.autograd.grad(forget_mult(*inputs)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_twice_with_a_retained_graph():
    """Nothing that was saved is overwritten by the first backward."""
    inputs = [x.requires_grad_() for x in random_inputs(4, 2, 3)]
    output = forget_mult(*inputs)[0].sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    second = torch.autograd.grad(output, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_left_as_they_were_and_may_be_strided():
    """Transposed inputs give what contiguous ones give, and neither is written to."""
    inputs = random_inputs(5, 4, 3)
    before = [x.clone() for x in inputs]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert not strided[0].is_contiguous()
    ours, expected = (results(forget_mult, given, torch.float64) for given in (strided, inputs))
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


@pytest.mark.parametrize(("E", "H"), [(5, 11), (8, 16), (3, 9)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("wdrop", [0.0, 0.4])
def test_padded_widths_change_no_value(E, H, first, wdrop):
    """Outputs, state and all gradients, with the same masks; nothing of the padding is carried."""
    found = []
    for padded in (False, True):
        torch.manual_seed(0)
        layer = qrnn.QRNN(E, H, wdrop, first).double().train()
        layer.padded = padded
        x, hidden = draw(6, 3, E), tuple(draw(*state.shape) for state in layer.init_hidden(3))
        inputs = [x, *hidden, *layer.parameters()]
        out, carried = layer(x, hidden)
        assert all(state.untyped_storage().nbytes() == 8 * state.numel() for state in carried)
        gradients = torch.autograd.grad((out * draw(*out.shape)).sum() + carried[0].square().sum(), inputs)
        found.append([out, *carried, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
