"""The mixture of softmaxes, against its definition in float64."""

import pytest
import torch
from torch import Tensor, nn

import mos
from model import build
from mos import MixtureOfSoftmaxes

T, B, H, E, V = 6, 3, 7, 5, 40
N = T * B


def make(K: int) -> tuple[MixtureOfSoftmaxes, Tensor, Tensor, Tensor, Tensor]:
    """A criterion in float64, the decoder's weight and bias, the last layer's output, targets (T, B)."""
    criterion = MixtureOfSoftmaxes(H, E, K).double()
    weight, bias, hiddens = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((V, E), (V,), (N, H))
    )
    return criterion, weight, bias, hiddens, torch.randint(V, (T, B))


def definition(criterion: MixtureOfSoftmaxes, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each position, expert by expert, as the paper has it: (N,)."""
    K = criterion.n_experts
    prior = (hiddens @ criterion.prior.weight.T).softmax(1)
    total = 0
    for k in range(K):
        rows = slice(k * E, (k + 1) * E)
        latent = torch.tanh(hiddens @ criterion.latent.weight[rows].T + criterion.latent.bias[rows])
        total = total + prior[:, k : k + 1] * (latent @ weight.T + bias).softmax(1)
    return -total[torch.arange(len(hiddens)), targets.flatten()].log()


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 7, 1000], ids=["a position at a time", "blocks", "one block"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_are_those_of_the_definition(K, rows, reduction, monkeypatch):
    monkeypatch.setattr(mos, "block_rows", lambda V: rows)
    criterion, *inputs, targets = make(K)
    loss = criterion(*inputs, targets, reduction)
    expected = getattr(definition(criterion, *inputs, targets), reduction)()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    parameters = [*inputs, *criterion.parameters()]
    for found, wanted in zip(
        torch.autograd.grad(3 * loss, parameters), torch.autograd.grad(3 * expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_losses_of_single_positions_with_and_without_gradients():
    criterion, *inputs, targets = make(3)
    expected = definition(criterion, *inputs, targets)
    losses = criterion(*inputs, targets, "none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    gradient, wanted = (torch.autograd.grad(x.square().sum(), inputs[0])[0] for x in (losses, expected))
    torch.testing.assert_close(gradient, wanted)
    with torch.no_grad():
        torch.testing.assert_close(criterion(*inputs, targets, "none"), expected, rtol=1e-12, atol=0)
        assert criterion(*inputs, targets, "sum").item() == pytest.approx(expected.sum().item())


def test_logprob_is_a_distribution_and_holds_the_losses():
    criterion, *inputs, targets = make(4)
    logprob = criterion.logprob(*inputs)
    torch.testing.assert_close(logprob.exp().sum(1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(-logprob[torch.arange(N), targets.flatten()], definition(criterion, *inputs, targets))


def test_one_expert_is_one_softmax_on_tanh_features():
    criterion, weight, bias, hiddens, targets = make(1)
    features = torch.tanh(criterion.latent(hiddens))
    expected = nn.functional.cross_entropy(features @ weight.T + bias, targets.flatten())
    assert criterion(weight, bias, hiddens, targets).item() == pytest.approx(expected.item(), rel=1e-12)


def test_training_holds_no_tensor_of_positions_times_experts_times_vocabulary(monkeypatch):
    monkeypatch.setattr(mos, "block_rows", lambda V: 10)
    criterion, *inputs, targets = make(5)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch():
        criterion(*inputs, targets).backward()
    assert max(sizes) <= max(10 * V, N * 5 * E, 5 * E * H)


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
