"""The passes that LSTM and GRU have beside torch's on the CPU: when they are taken, and that they give the same."""

import pytest
import torch
from toys import draw, make_layer

from layers.gru import COLUMNS, GRUScan
from layers.lstm import STEPS, LSTMScan

E, H = 5, 6


@pytest.mark.parametrize(
    ("kind", "T", "B", "taken"),
    [
        ("LSTM", 1, 1, True),
        ("LSTM", STEPS, 1, True),
        ("LSTM", STEPS + 1, 1, False),
        ("LSTM", 5, 2, False),
        ("GRU", 1, 1, True),
        ("GRU", 9, COLUMNS, True),
        ("GRU", 9, COLUMNS + 1, False),
    ],
)
def test_output_state_and_gradients_are_torchs(monkeypatch, kind, T, B, taken):
    """From any state, by either pass; where no gradient is wanted, torch's pass is taken."""
    own, torchs = {"LSTM": (LSTMScan, torch.lstm), "GRU": (GRUScan, torch.gru)}[kind]
    calls, apply = [], own.apply
    monkeypatch.setattr(own, "apply", lambda *args: calls.append(1) or apply(*args))
    layer, x = make_layer(kind, E, H, True), draw(T, B, E)
    weights, state = list(layer.parameters()), tuple(draw(*tensor.shape) for tensor in layer.init_hidden(B))
    ordered = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
    wanted = torchs(x, state if kind == "LSTM" else state[0], ordered, True, 1, 0.0, True, False, False)
    found = (lambda out, after: (out, *after))(*layer(x, state))
    assert len(calls) == taken
    upstream, gradients = [torch.randn_like(tensor) for tensor in wanted], []
    for outputs in (found, wanted):
        total = sum((tensor * g).sum() for tensor, g in zip(outputs, upstream, strict=True))
        gradients.append(torch.autograd.grad(total, [x, *state, *weights]))
    torch.testing.assert_close(found, tuple(wanted), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        layer(x, state)
    assert len(calls) == taken


def test_the_lstms_pass_over_several_columns_is_torchs():
    """As it is taken in bfloat16, here without rounding."""
    T, B = 11, 3
    x, h, c = draw(T, B, E), draw(1, B, H), draw(1, B, H)
    weights = [draw(4 * H, E), draw(4 * H, H), draw(4 * H), draw(4 * H)]
    wanted, _, last = torch.lstm(x, (h, c), weights, True, 1, 0.0, True, False, False)
    found, state = LSTMScan.apply(x, h[0], c[0], *weights[:2], weights[2] + weights[3])
    torch.testing.assert_close((found, state), (wanted, last[0]), rtol=1e-12, atol=1e-12)
    upstream, leaves = torch.randn_like(found), [x, h, c, *weights]
    gradients = (
        torch.autograd.grad((y * upstream).sum() + end.sum(), leaves) for y, end in ((found, state), (wanted, last))
    )
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_grus_saturated_gates_have_no_gradient_and_no_nan():
    """z at 1 passes h on as it is, however large the rest."""
    x, h = draw(3, 2, E), draw(2, H)
    zeros = torch.zeros(3 * H, E).double(), torch.zeros(3 * H, H).double(), torch.zeros(3 * H).double()
    bias = torch.tensor([0.0, 1e4, 1e4]).double().repeat_interleave(H)
    out = GRUScan.apply(x, h, zeros[0], zeros[1], bias, zeros[2])
    assert torch.equal(out, h.expand_as(out))
    d_x, d_h = torch.autograd.grad(out.sum(), [x, h])
    assert not d_x.any()
    assert torch.equal(d_h, torch.full_like(h, 3))
