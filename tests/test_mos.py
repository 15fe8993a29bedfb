"""The mixture of softmaxes: its distribution against float64 NumPy, its losses and gradients against that."""

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from toys import Largest, draw

import mos
import splitcross
from model import build
from mos import MixtureOfSoftmaxes

T, B, H, E, V = 6, 3, 7, 5, 40
N = T * B


def make(K: int) -> tuple[MixtureOfSoftmaxes, Tensor, Tensor, Tensor, Tensor]:
    """A criterion in float64, the decoder's weight and bias, the last layer's output, targets (T, B)."""
    criterion = MixtureOfSoftmaxes(H, E, K).double()
    return criterion, draw(V, E), draw(V), draw(N, H), torch.randint(V, (T, B))


def losses(criterion: MixtureOfSoftmaxes, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each position, (N,), out of whole distributions."""
    return -criterion.logprob(weight, bias, hiddens).gather(1, targets.view(-1, 1))[:, 0]


@pytest.mark.parametrize("K", [1, 2, 5])
def test_logprob_is_the_reference(K):
    criterion, *inputs, _ = make(K)
    expected = reference.log_probs(*(x.detach().numpy() for x in inputs), (), reference.arrays(criterion.state_dict()))
    np.testing.assert_allclose(criterion.logprob(*inputs).detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 1000], ids=["a position at a time", "blocks", "one block"])
def test_loss_and_gradients_are_those_of_the_distribution(rows, monkeypatch):
    for module in (mos, splitcross):  # without and with gradients
        monkeypatch.setattr(module, "block_rows", lambda V: rows)
    for K, reduction in ((1, "mean"), (2, "sum"), (5, "mean")):
        criterion, *inputs, targets = make(K)
        loss = criterion(*inputs, targets, reduction)
        expected = getattr(losses(criterion, *inputs, targets), reduction)()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        parameters = [*inputs, *criterion.parameters()]
        found, wanted = (torch.autograd.grad(3 * x, parameters) for x in (loss, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_losses_of_single_positions_with_and_without_gradients():
    criterion, *inputs, targets = make(3)
    expected = losses(criterion, *inputs, targets)
    found = criterion(*inputs, targets, "none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradient, wanted = (torch.autograd.grad(x.square().sum(), inputs[0])[0] for x in (found, expected))
    torch.testing.assert_close(gradient, wanted)
    with torch.no_grad():
        torch.testing.assert_close(criterion(*inputs, targets, "none"), expected, rtol=1e-12, atol=0)
        assert criterion(*inputs, targets, "sum").item() == pytest.approx(expected.sum().item())


def test_training_holds_no_tensor_of_positions_times_experts_times_vocabulary(monkeypatch):
    monkeypatch.setattr(splitcross, "block_rows", lambda V: 10)
    criterion, *inputs, targets = make(5)
    with Largest() as largest:
        criterion(*inputs, targets).backward()
    assert largest.elements <= max(10 * V, N * 5 * E, 5 * E * H)


def test_dropoutl_draws_one_mask_per_column():
    criterion = MixtureOfSoftmaxes(H, E, 2, dropoutl=0.5)
    criterion.latent.weight.data.zero_()
    criterion.latent.bias.data.fill_(1.0)
    latents, _ = criterion.experts(torch.randn(N, H), columns=B)
    latents = latents.view(T, B, 2 * E)
    assert (latents == latents[0]).all()
    assert not (latents[0, 0] == latents[0, 1]).all()
    assert set((latents / torch.tanh(torch.tensor(1.0))).round(decimals=5).unique().tolist()) == {0.0, 2.0}
    assert (criterion.eval().experts(torch.randn(N, H), columns=B)[0] > 0).all()


ARGS = {"model": "LSTM", "emsize": 6, "nhid": 9, "nlayers": 2, "tied": True, "splits": None}


def test_names_and_shapes_in_the_file():
    model, criterion = build({**ARGS, "n_experts": 3, "nhidlast": 8}, V)
    shapes = {name: tuple(tensor.shape) for name, tensor in criterion.state_dict().items()}
    assert shapes == {"prior.weight": (3, 8), "latent.weight": (18, 8), "latent.bias": (18,)}
    assert model.decoder.weight is model.encoder.weight
    assert model.rnns[-1].hidden_size == 8


@pytest.mark.parametrize("tied", [True, False])
def test_last_layer_may_have_a_width_of_its_own(tied):
    args = {**ARGS, "tied": tied, "nhidlast": 5}
    if tied:
        with pytest.raises(ValueError, match="--nhidlast 5: with a tied weight"):
            build(args, V)
    else:
        model, _ = build(args, V)
        assert model.decoder.weight.shape == (V, 5)
        assert model.rnns[-1].hidden_size == 5
        model, _ = build({**args, "n_experts": 2}, V)
        assert model.decoder.weight.shape == (V, 6)


def test_experts_and_a_split_softmax_are_refused_together():
    with pytest.raises(ValueError, match="--n_experts 2: goes with one softmax"):
        build({**ARGS, "n_experts": 2, "splits": [4]}, V)
