"""The LSTM of dynamic evaluation's short segments against torch's own."""

import pytest
import torch
from torch import Tensor

from layers.lstm import STEPS, ShortLSTM, outer
from model import LSTM

E, H = 3, 5


def draw(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def inputs(T: int) -> list[Tensor]:
    return [draw(T, E), draw(H), draw(H), draw(4 * H, E), draw(4 * H, H), draw(4 * H)]


@pytest.mark.parametrize("T", [1, 2, 7])
def test_all_gradients(T):
    assert torch.autograd.gradcheck(ShortLSTM.apply, inputs(T))


@pytest.mark.parametrize("T", [1, 5, STEPS, STEPS + 1])
def test_a_layer_is_torchs_own_however_short_the_segment(T, monkeypatch):
    """Outputs, state and the gradient of every weight; the short way is taken up to STEPS steps, and only then."""
    taken = []
    monkeypatch.setattr(ShortLSTM, "apply", lambda *args: taken.append(1) or apply(*args))
    torch.manual_seed(0)
    layer, hidden = LSTM(E, H, 0.0, True).double(), tuple(torch.randn(2, 1, 1, H, dtype=torch.float64))
    layer.reset_parameters()
    weights = list(layer.parameters())
    x = draw(T, 1, E)
    out, (h, c) = layer(x, hidden)
    kept = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
    expected = torch.lstm(x, hidden, kept, True, 1, 0.0, True, False, False)
    for found, wanted in zip((out, h, c), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    pairs = [torch.autograd.grad(y.square().sum() + z.sum(), [x, *weights]) for y, z in ((out, c), expected[::2])]
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert len(taken) == (T <= STEPS)


apply = ShortLSTM.apply


def test_several_columns_and_evaluation_take_torchs_way(monkeypatch):
    monkeypatch.setattr(ShortLSTM, "apply", lambda *args: pytest.fail("the short way"))
    layer = LSTM(E, H, 0.0, True).double()
    layer(draw(5, 2, E), layer.init_hidden(2))
    with torch.no_grad():
        layer(draw(5, 1, E), layer.init_hidden(1))


@pytest.mark.parametrize(("T", "n", "m"), [(1, 4, 3), (5, 40, 7), (32, 3, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_outer_product(T, n, m, dtype):
    d, x = torch.randn(T, n, dtype=dtype), torch.randn(T, m, dtype=dtype)
    torch.testing.assert_close(outer(d, x), (d.double().T @ x.double()).to(dtype), rtol=1e-5, atol=1e-5)
