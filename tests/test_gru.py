"""The GRU's scan: torch's own GRU in float64, its gradients by finite differences."""

import pytest
import torch
from torch import Tensor, nn

from layers.gru import COLUMNS, GRUScan
from model import GRU

E, H = 5, 6


def draw(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def weights() -> list[Tensor]:
    return [draw(3 * H, E), draw(3 * H, H), draw(3 * H), draw(3 * H)]


def torch_gru(x: Tensor, h: Tensor, parts: list[Tensor]) -> Tensor:
    return torch.gru(x, h[None], parts, True, 1, 0.0, False, False, False)[0]


@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 4), (9, 1), (9, 4)])
def test_output_and_all_gradients_are_torchs(T, B):
    """Of the input, the state before, both matrices and both biases; every step has a gradient of its own."""
    x, h, parts, weight = draw(T, B, E), draw(B, H), weights(), torch.randn(T, B, H).double()
    out, expected = GRUScan.apply(x, h, *parts), torch_gru(x, h, parts)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, h, *parts]
    found = torch.autograd.grad((out * weight).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), inputs), rtol=1e-10, atol=1e-10)


def test_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(GRUScan.apply, (draw(4, 3, E), draw(3, H), *weights()))


def test_saturated_gates_have_no_gradient_and_no_nan():
    """z at 1 passes h on as it is, however large the rest."""
    x, h = draw(3, 2, E), draw(2, H)
    zeros = torch.zeros(3 * H, E).double(), torch.zeros(3 * H, H).double(), torch.zeros(3 * H).double()
    bias = torch.tensor([0.0, 1e4, 1e4]).double().repeat_interleave(H)
    out = GRUScan.apply(x, h, zeros[0], zeros[1], bias, zeros[2])
    assert torch.equal(out, h.expand_as(out))
    d_x, d_h = torch.autograd.grad(out.sum(), [x, h])
    assert not d_x.any()
    assert torch.equal(d_h, torch.full_like(h, 3))


@pytest.mark.parametrize("wdrop", [0.0, 0.5])
def test_the_layer_trains_by_the_scan_and_evaluates_by_torch(monkeypatch, wdrop):
    """The same values either way, and the state to carry is the last output's."""
    layer, x = GRU(E, H, wdrop, True).double(), draw(7, 3, E)
    layer.reset_parameters()
    layer.eval()
    scanned, (h,) = layer(x, layer.init_hidden(3))
    assert "GRUScan" in scanned.grad_fn.name()
    assert torch.equal(h, scanned[-1:])
    wide, _ = layer(draw(2, COLUMNS + 1, E), layer.init_hidden(COLUMNS + 1))
    assert "GRUScan" not in wide.grad_fn.name()
    monkeypatch.setattr(GRUScan, "apply", None)
    with torch.no_grad():
        out, (last,) = layer(x, layer.init_hidden(3))
    torch.testing.assert_close(out, scanned.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h.detach(), rtol=1e-12, atol=1e-12)


def test_three_layers_in_float32_are_torchs_to_rounding():
    """A float32 step of three layers, wide and deep enough for roundings to add up: scan and torch's GRU agree."""
    torch.manual_seed(0)
    layers = [nn.GRU(width, 40) for width in (24, 40, 40)]
    x = torch.randn(30, 8, 24)
    own = expected = x
    for layer in layers:
        parts = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
        own, expected = GRUScan.apply(own, torch.zeros(8, 40), *parts), layer(expected)[0]
    parameters = [p for layer in layers for p in layer.parameters()]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(own.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
