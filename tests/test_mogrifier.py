"""What the Mogrifier alone has: rounds, ranks and its dropouts; the flags of Melis's recipe; dropout samples.

What it shares with other kinds of layers is tested in test_layers.py.
"""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import SMALL
from torch import Tensor, nn
from toys import NO_DROPOUT_FLAGS, call, draw, error_line, make_layer

import main
import mos
from layers.mogrifier import Mogrifier, MogrifierScan
from model import RNNModel, build
from mos import MixtureOfSoftmaxes, sampled
from optim import make_optimizer
from splitcross import SplitCrossEntropyLoss

pytestmark = pytest.mark.usefixtures("short_blocks")

E, H = 5, 6
CELLS = [(rounds, rank) for rounds in (0, 1, 2, 5) for rank in (0, 3)]
MELIS = ["--model", "Mogrifier", "--nhid", 8, "--optimizer", "adam", "--lr", 0.01]


def make(rounds: int, rank: int, dropoutr: float = 0.0) -> Mogrifier:
    return make_layer("Mogrifier", E, H, True, rounds=rounds, rank=rank, dropoutr=dropoutr)


def tensors_of(layer: Mogrifier) -> list[Tensor]:
    return [layer.weight_ih, layer.weight_hh, layer.bias, *(t for r in layer.rounds for t in r.tensors)]


@pytest.mark.parametrize(("rounds", "rank"), CELLS)
@pytest.mark.parametrize("dropped", [False, True])
def test_the_cell_is_the_equations_step_by_step_and_so_are_its_gradients(rounds, rank, dropped):
    """For every number of rounds and rank, with and without a mask on the state."""
    layer, x = make(rounds, rank), draw(4, 3, E)
    mask = torch.tensor([0.0, 1.5]).double().repeat(3, H // 2) if dropped else None

    def scan(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return MogrifierScan.apply(x, h, c, mask, rank == 0, *weights)

    if not dropped:
        own = reference.arrays(layer.state_dict())
        out, (h, _) = layer(x, layer.init_hidden(3))
        np.testing.assert_allclose(out.detach().numpy(), reference.mogrifier(x.detach().numpy(), own), rtol=1e-12)
        assert torch.equal(h, out[-1:])
    assert torch.autograd.gradcheck(scan, (x, draw(3, H), draw(3, H), *tensors_of(layer)))


def test_the_input_gate_never_adds_more_than_the_forget_gate_took():
    """With i at 1 and f at 0.9, c moves to 0.9·c + 0.1·j."""
    layer = make(0, 0)
    with torch.no_grad():
        layer.weight_ih.zero_(), layer.weight_hh.zero_()
        layer.bias.copy_(torch.tensor([50.0, math.log(9), 50.0, 0.0]).double().repeat_interleave(H))
    _, (_, c) = layer(draw(1, 1, E), (torch.zeros(1, 1, H).double(), torch.full((1, 1, H), 3.0).double()))
    torch.testing.assert_close(c, torch.full((1, 1, H), 0.9 * 3 + 0.1).double())


def test_the_state_has_one_mask_for_all_steps():
    """dropoutr: a unit that is dropped is dropped at every step, and never in evaluation."""
    layer, x = make(3, 0, dropoutr=0.5), draw(6, 4, E)
    torch.manual_seed(1)
    out, _ = layer(x, layer.init_hidden(4))
    torch.manual_seed(1)
    mask = torch.empty(4, H).double().bernoulli_(0.5).div_(0.5)
    zeros = torch.zeros(4, H).double()
    torch.testing.assert_close(out, MogrifierScan.apply(x, zeros, zeros, mask, True, *tensors_of(layer))[0])
    plain, _ = make(3, 0).eval()(x, layer.init_hidden(4))
    assert not torch.equal(out, plain)
    layer.eval()
    assert torch.equal(layer(x, layer.init_hidden(4))[0], layer(x, layer.init_hidden(4))[0])


def test_fresh_weights():
    """Truncated normals of variance 1/fan-in, and so is A·B; the forget bias is 1."""
    torch.manual_seed(0)
    layer = Mogrifier(300, 200, 0.0, True, 2, 50)
    layer.reset_parameters()
    assert layer.weight_ih.std().item() == pytest.approx(500**-0.5, rel=0.02)
    cut = 2 / 0.8796  # a normal cut off at two has that deviation
    assert layer.weight_ih.abs().max().item() == pytest.approx(cut * 500**-0.5, rel=0.01)
    assert layer.rounds[0].a.std().item() == pytest.approx((200 * 50) ** -0.25, rel=0.02)
    assert layer.rounds[1].b.std().item() == pytest.approx((300 * 50) ** -0.25, rel=0.02)
    assert (layer.rounds[1].a @ layer.rounds[1].b).std().item() == pytest.approx(300**-0.5, rel=0.03)
    assert layer.bias.view(4, -1).tolist() == [[value] * 200 for value in (0, 1, 0, 0)]
    names = {"weight_ih", "weight_hh", "bias", *(f"rounds.{r}.{n}" for r in (0, 1) for n in ("a", "b", "bias"))}
    assert {name for name, _ in layer.named_parameters()} == names


def test_dropout_between_layers_is_not_locked():
    """Every element is drawn by itself, a share p of them, the rest scaled; in evaluation none is."""
    model = RNNModel("Mogrifier", 20, 8, 8, 3, 0.3, 0.3, 0.3, 0.0, 0.0, rounds=0)
    for drop in (model.drop_input, model.drop_between, model.drop_output):
        ones = torch.ones(40, 30, 100)
        kept = drop(ones) != 0
        torch.testing.assert_close(drop(ones).unique(), torch.tensor([0, 1 / 0.7]))
        for dim in range(3):  # along which a locked mask would repeat itself
            counts = kept.double().mean(dim)
            assert counts.std() == pytest.approx((0.3 * 0.7 / kept.size(dim)) ** 0.5, rel=0.1)
        assert kept.double().mean() == pytest.approx(0.7, abs=0.005)
        model.eval()
        assert torch.equal(drop(ones), ones)
        model.train()


def test_it_is_what_the_layers_gave_that_is_summed_not_what_dropout_left_of_it():
    model = RNNModel("Mogrifier", 20, 8, 8, 3, 0.0, 0.5, 0.0, 0.0, 0.0, rounds=2, rank=0)
    outputs, words = [], torch.randint(20, (5, 2))
    for layer in model.rnns:
        layer.register_forward_hook(lambda _, given, result: outputs.append(result[0]))
    _, _, raw, _ = model(words, model.init_hidden(2), return_h=True)
    torch.testing.assert_close(raw[-1], sum(outputs))


# The recipe's other parts


@pytest.mark.parametrize("flags", [(), ("--rounds", 3, "--rank", 2, "--untied", "--n_experts", 2)])
def test_perplexities_are_those_of_float64(trained, corpus, flags):
    run = trained("--epochs", 2, *MELIS, "--dropoutr", 0.2, *flags)
    saved = reference.load(run.path)
    ids = reference.encode(corpus / "test.txt", saved["vocab"])
    assert run.log("test")[0]["loss"] == pytest.approx(reference.mean_loss(saved, ids, 1), rel=1e-6)


def test_defaults_of_the_kind(trained):
    args = trained("--epochs", 2, *MELIS, "--dropoutr", 0.2).saved["args"]
    assert [args[name] for name in ("wdrop", "dropoute", "drop_state", "rounds", "rank")] == [0, 0, 0.01, 5, 0]
    args = trained("--epochs", 2).saved["args"]
    assert [args[name] for name in ("wdrop", "dropoute", "drop_state")] == [0.5, 0.1, 0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "Mogrifier"], "--nhid 10"),
        ([*MELIS, "--wdrop", 0.1], "--wdrop 0.1"),
        ([*MELIS, "--nhidlast", 4, "--n_experts", 2], "--nhid 8"),
        (["--dropoutr", 0.1], "--dropoutr 0.1"),
        (["--beta1", 0.5], "--beta1 0.5"),
    ],
)
def test_what_makes_no_sense_is_one_line(corpus, tmp_path, capsys, flags, named):
    assert call(main, "--data", corpus, *SMALL, *flags, "--save", tmp_path / "m.pt") == 2
    assert named in error_line(capsys)
    assert not (tmp_path / "m.pt").exists()


def test_beta1_is_the_optimizers():
    parameters = [nn.Parameter(torch.zeros(2))]
    assert make_optimizer(parameters, "adam", 0.1, 0.0, 0.0).param_groups[0]["betas"] == (0.0, 0.999)
    assert "betas" not in make_optimizer(parameters, "sgd", 0.1, 0.0, 0.0).param_groups[0]


@pytest.mark.parametrize("kind", ["plain", "split", "mixture"])
def test_of_samples_the_probabilities_are_averaged(kind, monkeypatch):
    """Loss and every gradient against the definition; in blocks of three positions."""
    monkeypatch.setattr(mos, "block_rows", lambda V: 12)
    T, B, D, V = 3, 2, 4, 11
    make = {
        "plain": lambda: SplitCrossEntropyLoss(E),
        "split": lambda: SplitCrossEntropyLoss(E, [4, 8]),
        "mixture": lambda: MixtureOfSoftmaxes(E, E, 3),
    }[kind]
    criterion = make().double()
    for parameter in criterion.parameters():
        nn.init.normal_(parameter)
    weight, bias, hiddens, targets = draw(V, E), draw(V), draw(T * B * D, E), torch.randint(V, (T, B))
    prob = criterion.logprob(weight, bias, hiddens).exp().view(T * B, D, V).mean(1)
    expected = -prob.log().gather(1, targets.reshape(-1, 1)).mean()
    loss = sampled(criterion, D)(weight, bias, hiddens, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    inputs = [weight, bias, hiddens, *criterion.parameters()]
    for pair in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("K", [0, 3])
def test_of_samples_in_half_precision_sums_are_exact(K):
    """The last layer's output is bfloat16 under --amp bf16; the logarithm of D is not."""
    T, B, D, V = 3, 2, 5, 11
    criterion = MixtureOfSoftmaxes(E, E, K) if K else SplitCrossEntropyLoss(E)
    weight, bias, targets = torch.randn(V, E), torch.randn(V), torch.randint(V, (T, B))
    hiddens = torch.randn(T * B * D, E).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(K)):
        found = sampled(criterion, D)(weight, bias, hiddens, targets)
        if K:  # the experts are computed in half precision, what comes after them is compared
            latents, log_prior = (x.double() for x in criterion.experts(hiddens, B * D))
            weight = weight.bfloat16()
    if K:
        logits = latents @ weight.double().T + bias.double()
        prob = (logits.log_softmax(2) + log_prior[:, :, None]).logsumexp(1).exp()
    else:
        prob = (hiddens.double() @ weight.double().T + bias.double()).softmax(1)
    expected = -prob.view(T * B, D, V).mean(1).log().gather(1, targets.reshape(-1, 1)).mean()
    assert found.item() == pytest.approx(expected.item(), abs=2e-3 if K else 1e-5)


def test_samples_of_a_model_that_drops_nothing_change_nothing(trained):
    """--samples needs a dropout: one so small that it drops nothing."""
    flags = ["--epochs", 1, *NO_DROPOUT_FLAGS, "--dropout", 1e-12]
    one, three = trained(*flags), trained(*flags, "--samples", 3)
    losses = [[entry["loss"] for entry in run.log("valid")] for run in (one, three)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_options_are_read_from_the_files_args():
    args = {"model": "Mogrifier", "emsize": 8, "nhid": 8, "nlayers": 2, "tied": True, "rounds": 2, "rank": 3}
    model, _ = build(args | {"dropoutr": 0.4}, 10)
    assert [layer.dropoutr for layer in model.rnns] == [0.4, 0.4]
    assert [len(layer.rounds) for layer in model.rnns] == [2, 2]
    assert model.rnns[0].rounds[0].a.shape == (8, 3)
