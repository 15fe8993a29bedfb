"""What the RLSTM alone has: its cell under rounds and masks, residual layers, initial weights; and --chrono.

What it shares with other kinds of layers is tested in test_layers.py.
"""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import SMALL
from torch import Tensor
from toys import call, draw, error_line, flags_of, make_layer, settings_of

import main
from layers.mogrifier import Mogrifier
from layers.rlstm import RLSTM, RLSTMScan
from model import RNNModel, build

pytestmark = pytest.mark.usefixtures("short_blocks")

E, H = 5, 6
CELLS = [(rounds, rank) for rounds in (0, 1, 2, 5) for rank in (0, 3)]


def make(rounds: int, rank: int, dropoutr: float = 0.0) -> RLSTM:
    return make_layer("rlstm", E, H, True, rounds=rounds, rank=rank, dropoutr=dropoutr)


def rounds_of(layer: Mogrifier) -> list[Tensor]:
    return [tensor for round in layer.rounds for tensor in round.tensors]


def watch_layers(model: RNNModel) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists that get every layer's input and output."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def watch(_: object, given: tuple, result: tuple) -> None:
        inputs.append(given[0])
        outputs.append(result[0])

    for layer in model.rnns:
        layer.register_forward_hook(watch)
    return inputs, outputs


@pytest.mark.parametrize(("rounds", "rank"), CELLS)
@pytest.mark.parametrize("dropped", [False, True])
def test_the_cell_is_the_equations_step_by_step_and_so_are_its_gradients(rounds, rank, dropped):
    """For every number of rounds and rank, with and without a mask on the state and on the output gate's cell."""
    layer, x = make(rounds, rank), draw(4, 3, E)
    mask = torch.empty(3, H).double().bernoulli_(0.6).div_(0.6) if dropped else None

    def scan(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return RLSTMScan.apply(x, h, c, mask, rank == 0, *weights)

    weights, zeros = [*layer.cell_tensors, *rounds_of(layer)], torch.zeros(3, H).double()
    out, _ = scan(x, zeros, zeros, *weights)
    own = reference.arrays(layer.state_dict())
    expected = reference.rlstm(x.detach().numpy(), own, 1.0 if mask is None else mask.numpy())
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(scan, (x, draw(3, H), draw(3, H), *weights))


def test_the_state_has_one_mask_for_all_steps():
    """dropoutr: a unit that is dropped is dropped at every step, and never in evaluation."""
    layer, x = make(3, 0, dropoutr=0.5), draw(6, 4, E)
    torch.manual_seed(1)
    out, _ = layer(x, layer.init_hidden(4))
    torch.manual_seed(1)
    mask = torch.empty(4, H).double().bernoulli_(0.5).div_(0.5)
    own = reference.arrays(layer.state_dict())
    for found, given in ((out, mask.numpy()), (layer.eval()(x, layer.init_hidden(4))[0], 1.0)):
        np.testing.assert_allclose(found.detach().numpy(), reference.rlstm(x.detach().numpy(), own, given), rtol=1e-11)


def test_names_and_shapes_of_parameters():
    """Seven matrices of H × H for the LSTM's eight."""
    shapes = {name: tuple(p.shape) for name, p in RLSTM(E, H, 0.0, True, rounds=0).named_parameters()}
    assert shapes == {
        "weight_ih": (2 * H, E), "weight_hh": (3 * H, H), "weight_fu": (H, H), "weight_oc": (H, H), "bias": (4 * H,),
    }  # fmt: skip


def test_fresh_weights():
    """Truncated normals of variance 1/fan-in: E + H for i and j, 2H for f, H for o; the forget bias is 1."""
    torch.manual_seed(0)
    layer = RLSTM(300, 200, 0.0, True, 0)
    layer.reset_parameters()
    parts = {
        layer.weight_ih: 500, layer.weight_hh[:400]: 500, layer.weight_hh[400:]: 400, layer.weight_fu: 400,
        layer.weight_oc: 200,
    }  # fmt: skip
    for weight, fan_in in parts.items():
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert weight.abs().max().item() == pytest.approx(2 / 0.8796 * fan_in**-0.5, rel=0.01)  # cut off at two
    assert layer.bias.view(4, -1).tolist() == [[value] * 200 for value in (0, 0, 1, 0)]


@pytest.mark.parametrize("nlayers", [1, 2, 3, 4])
def test_layers_are_given_the_sum_of_all_outputs_before_them_after_dropout(nlayers):
    """Of the layers, not of the embedding; the softmax gets the sum of what the layers gave, then its dropout."""
    model = RNNModel("Mogrifier", 20, 8, 8, nlayers, 0.4, 0.5, 0.3, 0.0, 0.0, cell="rlstm", rounds=2)
    inputs, outputs = watch_layers(model)
    words = torch.randint(20, (5, 2))
    _, _, raw, dropped = model(words, model.init_hidden(2), return_h=True)
    for l in range(1, nlayers):
        torch.testing.assert_close(inputs[l], sum(dropped[:l]))
        assert (dropped[l - 1] == 0).any()
        assert ((dropped[l - 1] == 0) | torch.isclose(dropped[l - 1], 2 * outputs[l - 1])).all()
    torch.testing.assert_close(raw[-1], sum(outputs))


def test_a_mogrifier_of_melis_cell_has_no_residual_layers():
    """Its third layer is given the second one's output alone."""
    model = RNNModel("Mogrifier", 20, 8, 8, 3, 0.0, 0.0, 0.0, 0.0, 0.0, rounds=0)
    inputs, outputs = watch_layers(model)
    words = torch.randint(20, (5, 2))
    model(words, model.init_hidden(2))
    assert torch.equal(inputs[2], outputs[1])


def test_a_models_file_says_its_cell(trained):
    """A file without one is of Melis's LSTM."""
    run = trained("--epochs", 1, *flags_of("rlstm"))
    assert run.saved["args"]["cell"] == "rlstm"
    assert {"rnns.0.weight_fu", "rnns.1.weight_oc"} <= set(run.saved["model"])
    older = {key: value for key, value in settings_of("Mogrifier").items() if key not in ("cell", "chrono")}
    assert [type(layer) for layer in build(older, 20)[0].rnns] == [Mogrifier] * 2


# --chrono


@pytest.mark.parametrize(("kind", "row"), [(Mogrifier, 1), (RLSTM, 2)])
def test_chrono_draws_the_forget_biases(kind, row):
    """exp(b_f) is uniform in [1, T - 1]; other biases are 0."""
    torch.manual_seed(0)
    layer = kind(3, 1000, 0.0, True, rounds=0, chrono=30.0)
    layer.reset_parameters()
    rows = [*layer.bias.detach().view(4, -1)]
    steps = rows.pop(row).exp()
    assert not torch.stack(rows).any()
    assert 1 <= steps.min().item() < 1.5
    assert 28.5 < steps.max().item() <= 29.001
    assert steps.mean().item() == pytest.approx(15, rel=0.05)
    assert steps.std().item() == pytest.approx(28 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize("flag", ["2", "1.5", "-3", "nan"])
def test_chrono_is_above_two(corpus, tmp_path, capsys, flag):
    flags = ["--model", "Mogrifier", "--nhid", 8, "--chrono", flag]
    assert call(main, "--data", corpus, *SMALL, *flags, "--save", tmp_path / "m.pt") == 2
    assert "--chrono" in error_line(capsys)
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.parametrize("kind", ["Mogrifier", "rlstm"])
def test_a_run_with_chrono_begins_with_such_biases(trained, kind):
    """Written by the first state, before they have moved far; the flag shapes no parameter."""
    plain = trained("--epochs", 1, *flags_of(kind), "--lr", 1e-9)
    run = trained("--epochs", 1, *flags_of(kind), "--lr", 1e-9, "--chrono", 50)
    row = 1 if kind == "Mogrifier" else 2
    forget, ones = (one.saved["model"]["rnns.0.bias"].view(4, -1)[row] for one in (run, plain))
    torch.testing.assert_close(ones, torch.ones(8))
    assert forget.unique().numel() == 8
    assert ((forget >= 0) & (forget <= math.log(49))).all()
