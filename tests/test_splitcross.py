"""The split softmax: its distribution against float64 NumPy, its loss and gradients against that, and its cost."""

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toys import Largest

import splitcross
from splitcross import SplitCrossEntropyLoss, default_splits

V, H, N = 41, 7, 23
SPLITS = [(), (9,), (5, 12), (3, 8, 20), (1, 2, 40)]


@pytest.fixture(params=[512, 5], ids=lambda rows: f"blocks of {rows}")
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions in one block of logits, or in several blocks, the last one shorter."""
    monkeypatch.setattr(splitcross, "BLOCK_ROWS", request.param)
    monkeypatch.setattr(splitcross, "BLOCK_ELEMENTS", 1)


in_blocks = pytest.mark.usefixtures("_blocks")


def make(splits: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 1.0, n: int = N):
    """A criterion of random tombstones, decoder weight and bias, hiddens, and targets in all clusters."""
    torch.manual_seed(len(splits))
    criterion = SplitCrossEntropyLoss(H, list(splits)).to(dtype)
    for parameter in criterion.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    weight, bias, hiddens = (scale * torch.randn(*size, dtype=dtype) for size in ((V, H), (V,), (n, H)))
    targets = torch.cat([torch.tensor([0, V - 1, *splits]), torch.randint(0, V, (n,))])[:n]
    return criterion, weight.requires_grad_(), bias.requires_grad_(), hiddens.requires_grad_(), targets


def reference_logprob(criterion: SplitCrossEntropyLoss, weight: Tensor, bias: Tensor, hiddens: Tensor) -> np.ndarray:
    w, b, h = (t.detach().double().numpy() for t in (weight, bias, hiddens))
    return reference.log_probs(w, b, h, tuple(criterion.splits), reference.arrays(criterion.state_dict()))


@pytest.mark.parametrize("splits", SPLITS)
def test_logprob_is_the_reference(splits):
    """log p of every word equals the float64 NumPy reference."""
    criterion, weight, bias, hiddens, _ = make(splits)
    logprob = criterion.logprob(weight, bias, hiddens)
    assert logprob.shape == (N, V)
    expected = reference_logprob(criterion, weight, bias, hiddens)
    np.testing.assert_allclose(logprob.detach().numpy(), expected, rtol=0, atol=1e-12)


@in_blocks
@pytest.mark.parametrize("splits", SPLITS)
def test_forward_is_minus_logprob(splits):
    """The mean, summed and single losses are -log p of the targets."""
    criterion, weight, bias, hiddens, targets = make(splits)
    expected = -reference_logprob(criterion, weight, bias, hiddens)[np.arange(N), targets.numpy()]
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum()), ("none", expected)):
        loss = criterion(weight, bias, hiddens, targets, reduction=reduction).detach().numpy()
        np.testing.assert_allclose(loss, value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(criterion(weight, bias, hiddens, targets).item(), expected.mean(), rtol=1e-12)


@in_blocks
@pytest.mark.parametrize("splits", SPLITS)
def test_float32_is_float64_to_rounding(splits):
    """The same in float32 differs by rounding, for logits that overflow a naive exp too."""
    for scale, tolerance in ((1.0, 2e-6), (12.0, 2e-4)):
        criterion, weight, bias, hiddens, targets = make(splits, torch.float32, scale)
        assert scale == 1 or (hiddens @ weight.T).abs().max() > 100
        logp = reference_logprob(criterion, weight, bias, hiddens)
        loss = criterion(weight, bias, hiddens, targets).item()
        assert loss == pytest.approx(-logp[np.arange(N), targets.numpy()].mean(), rel=2e-6, abs=tolerance)
        found = criterion.logprob(weight, bias, hiddens).detach().numpy()
        np.testing.assert_allclose(found, logp, rtol=2e-6, atol=tolerance)


@in_blocks
@pytest.mark.parametrize(("splits", "reduction"), [((), "mean"), ((5, 12), "sum")])
def test_gradcheck(splits, reduction):
    """Gradients of weight, bias, hiddens and tombstones equal finite differences."""
    criterion, weight, bias, hiddens, targets = make(splits, n=7)

    def loss(weight: Tensor, bias: Tensor, hiddens: Tensor, *_: Tensor) -> Tensor:
        return criterion(weight, bias, hiddens, targets, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (weight, bias, hiddens, *criterion.parameters()))


@in_blocks
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-7)], ids=str)
def test_gradients_are_those_of_the_distribution(splits, dtype, tolerance):
    """Those of -log p of the targets, which autograd takes through `logprob`."""
    criterion, weight, bias, hiddens, targets = make(splits, dtype)
    inputs = [weight, bias, hiddens, *criterion.parameters()]
    found = torch.autograd.grad(criterion(weight, bias, hiddens, targets), inputs)
    expected = -criterion.logprob(weight, bias, hiddens)[torch.arange(N), targets].mean()
    expected = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=tolerance)


@in_blocks
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_logits_of_all_positions_never_exist_at_once(train, bf16):
    """Loss and gradients of 600 positions and 41 words make no tensor above a block of logits."""
    criterion, weight, bias, hiddens, _ = make((), n=600)
    targets = torch.randint(V, (600,))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.set_grad_enabled(train), autocast, Largest() as largest:
        loss = criterion(weight, bias, hiddens, targets)
    assert loss.requires_grad == train
    assert largest.elements == max(splitcross.BLOCK_ROWS * V, 600 * H)


def test_a_gradient_of_the_gradient_is_refused():
    """The blocks' gradients are numbers, not a graph: a second derivative is an error, not a zero."""
    criterion, weight, bias, hiddens, targets = make(())
    loss = criterion(weight, bias, hiddens, targets).square()
    (gradient,) = torch.autograd.grad(loss, hiddens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@in_blocks
def test_clusters_not_hit_are_not_touched():
    """NaN in the rows of clusters without a target reaches neither loss nor gradient, which is zero there."""
    splits = (5, 12, 30)
    criterion, weight, bias, hiddens, _ = make(splits)
    targets = torch.tensor([0, 4, 12, 29, 17] * 4)  # head and cluster 2
    with torch.no_grad():
        clean = criterion(weight, bias, hiddens[:20], targets).item()
        for start, end in ((5, 12), (30, V)):
            weight[start:end] = bias[start:end] = torch.nan
    loss = criterion(weight, bias, hiddens[:20], targets)
    loss.backward()
    assert loss.item() == clean
    for gradient in (weight.grad, bias.grad):
        for start, end in ((5, 12), (30, V)):
            assert (gradient[start:end] == 0).all()
        assert (gradient[:5] != 0).all()
        assert (gradient[12:30] != 0).all()
    assert torch.isfinite(hiddens.grad).all()
    assert (criterion.tail_bias.grad != 0).all(), "a tombstone that is not hit still belongs to the head's softmax"


@in_blocks
def test_cost_follows_the_clusters_hit():
    """The products are those of the head for all positions, of each cluster for its own: nothing twice."""
    splits = (8, 16, 30)
    criterion, weight, bias, hiddens, _ = make(splits)
    targets = torch.tensor([0] * 13 + [16] * 3 + [40] * 7)
    forward = 2 * H * (N * (8 + 3) + 3 * (30 - 16) + 7 * (V - 30))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        criterion(weight, bias, hiddens, targets)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        criterion(weight, bias, hiddens, targets).backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("targets", [[40], [39, 40, 39], [5], [0], [0, 5, 12, 30]])
def test_any_set_of_clusters(targets):
    """One position, one cluster, the last cluster alone, the head alone, or all: the loss is the same."""
    criterion, weight, bias, hiddens, _ = make((5, 12, 30))
    expected = reference_logprob(criterion, weight, bias, hiddens)[np.arange(len(targets)), targets]
    loss = criterion(weight, bias, hiddens[: len(targets)], torch.tensor(targets))
    assert loss.item() == pytest.approx(-expected.mean(), rel=1e-12)


@in_blocks
@pytest.mark.parametrize("splits", [(), (5, 12)])
def test_no_positions_sum_to_nothing_with_gradients_of_zero(splits):
    """An empty batch: a sum of 0, whose gradients are 0; its mean is not a number."""
    criterion, weight, bias, hiddens, targets = make(splits)
    loss = criterion(weight, bias, hiddens[:0], targets[:0], reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()
    assert criterion(weight, bias, hiddens[:0], targets[:0]).isnan()


def test_time_and_batch_may_stay_apart():
    """Hiddens (T, B, H) with targets (T, B) give the loss of (N, H) with (N,)."""
    criterion, weight, bias, hiddens, targets = make((5, 12), n=24)
    flat = criterion(weight, bias, hiddens, targets)
    torch.testing.assert_close(criterion(weight, bias, hiddens.view(6, 4, H), targets.view(6, 4)), flat)


def test_parameters_and_their_names():
    """`tail_vectors` (K, H) and `tail_bias` (K,) with K splits; nothing at all without."""
    names = {name: tuple(t.shape) for name, t in SplitCrossEntropyLoss(H, [5, 12]).named_parameters()}
    assert names == {"tail_vectors": (2, H), "tail_bias": (2,)}
    assert not list(SplitCrossEntropyLoss(H, []).parameters())
    assert not SplitCrossEntropyLoss(H, []).state_dict()


def test_default_splits():
    """None up to 75,000 words, the two published sets above 75,000 and above 500,000."""
    assert list(default_splits(10_000)) == list(default_splits(75_000)) == []
    assert list(default_splits(75_001))[:2] == [2800, 20000]
    assert list(default_splits(76_001)) == list(default_splits(500_000)) == [2800, 20000, 76000]
    assert list(default_splits(500_001)) == list(default_splits(800_000)) == [4200, 35000, 180000]


@pytest.mark.parametrize("ntoken", [75_500, 76_000, 76_001])
def test_default_splits_work_where_the_last_one_is_past_the_vocabulary(ntoken):
    """Just above 75,000 words the published 76,000 lies outside: training there has to work all the same."""
    criterion = SplitCrossEntropyLoss(2, default_splits(ntoken))
    weight, bias, hiddens = torch.zeros(ntoken, 2), torch.zeros(ntoken), torch.zeros(2, 2)
    loss = criterion(weight, bias, hiddens, torch.tensor([0, ntoken - 1]))
    total = criterion.logprob(weight, bias, hiddens).logsumexp(1)
    assert torch.isfinite(loss)
    torch.testing.assert_close(total, torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("splits", [(12, 5), (5, 5), (0, 5), (-3,)])
def test_splits_must_ascend(splits):
    """Splits that do not ascend from 1 are an error that names them."""
    with pytest.raises(ValueError, match=str(splits[0])):
        SplitCrossEntropyLoss(H, list(splits))


def test_splits_must_lie_inside_the_vocabulary():
    """A split past the last word is an error that names it."""
    criterion, weight, bias, hiddens, targets = make((5, 12))
    with pytest.raises(ValueError, match="12"):
        criterion(weight[:10], bias[:10], hiddens, targets.clamp(max=9))
