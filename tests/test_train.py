"""The training step against its equations: rates, regularisation, clipping, averaging; and evaluation."""

import copy
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import checkpoint
from batches import Texts, VariableLengthSampler, get_batch
from model import RNNModel, detach
from options import settle
from run import Run, start_run
from splitcross import SplitCrossEntropyLoss
from train import evaluate, has_stalled, train_step

V, BPTT, LR = 30, 12, 3.0
NO_DROPOUT = {"dropout": 0, "dropouth": 0, "dropouti": 0, "dropoute": 0, "wdrop": 0}
KINDS = ["LSTM", "GRU", "QRNN"]


@pytest.fixture
def make_run(tmp_path):
    """`make_run(**settings)`: a run at its first step, its weights large enough to tell gradients apart."""

    def make(**settings: object) -> Run:
        ids = torch.randint(0, V, (2000,))
        texts = Texts([f"w{i}" for i in range(V)], ids, ids[:500], ids[:300])
        small = {
            "emsize": 8,
            "nhid": 10,
            "nlayers": 2,
            "batch_size": 4,
            "lr": LR,
            "wdecay": 0.0,
            "device": "cpu",
        }
        args = settle(small | NO_DROPOUT | {"save": str(tmp_path / "m.pt")} | settings, {})
        run = start_run("main.py", args, texts, torch.device("cpu"), None)
        for parameter in [*run.model.parameters(), *run.criterion.parameters()]:
            torch.nn.init.normal_(parameter, std=0.3)
        run.model.train()
        return run

    return make


def draws(count: int, ids: Tensor) -> list[list[slice]]:
    """So many slices of variable length, no two neighbours equally long."""
    found = [*itertools.islice(VariableLengthSampler(ids, BPTT, 4, torch.Generator().manual_seed(1)), count)]
    sizes = [s[0].stop - s[0].start for s in found]
    assert all(a != b for a, b in itertools.pairwise(sizes))
    return found


def weights(run: Run) -> dict[str, Tensor]:
    """Copies of all that is trained, the criterion's too."""
    named = [*run.model.named_parameters(), *run.criterion.named_parameters()]
    return {name: p.detach().clone() for name, p in named}


class ByHand:
    """The same descent, written out: model and criterion of the run, copied, and plain SGD."""

    def __init__(self, run: Run) -> None:
        self.model, self.criterion = copy.deepcopy(run.model), copy.deepcopy(run.criterion)
        self.hidden = self.model.init_hidden(4)

    def step(self, ids: Tensor, slices: list[slice], alpha=0.0, beta=0.0, clip=0.0, wdecay=0.0) -> float:
        """One step; returns the plain loss."""
        source, target = get_batch(ids, slices)
        output, hidden, raw, dropped = self.model(source, self.hidden, return_h=True)
        self.hidden = detach(hidden)
        loss = -self.criterion.logprob(self.model.decoder.weight, self.model.decoder.bias, output)[
            torch.arange(target.numel()), target.reshape(-1)
        ].mean()
        whole = loss + alpha * dropped[-1].pow(2).mean() + beta * (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
        parameters = [*self.model.parameters(), *self.criterion.parameters()]
        gradients = torch.autograd.grad(whole, parameters)
        norm = torch.stack([g.pow(2).sum() for g in gradients]).sum().sqrt()
        scale = min(1.0, clip / norm.item()) if clip else 1.0
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= LR * len(source) / BPTT * (scale * g + wdecay * p)
        return loss.item()


def assert_same(run: Run, by_hand: ByHand) -> None:
    expected = [*by_hand.model.parameters(), *by_hand.criterion.parameters()]
    for (name, found), other in zip(weights(run).items(), expected, strict=True):
        torch.testing.assert_close(
            found, other.detach(), rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_freed_during_the_backward_pass(make_run, monkeypatch, kind):
    """When the embedding's gradient is there, the last one, no layer's output is in memory any more."""
    run = make_run(model=kind, nlayers=3, dropouth=0.2, dropout=0.2)
    outputs, gone = [], []
    forward = run.model.forward

    def watched(*args: object, **how: object):
        output, hidden, raw, dropped = forward(*args, **how)
        outputs.extend(StorageWeakRef(x.untyped_storage()) for x in (*raw, *dropped))
        return output, hidden, raw, dropped

    monkeypatch.setattr(run.model, "forward", watched)
    run.model.encoder.weight.register_post_accumulate_grad_hook(
        lambda _: gone.extend(output.expired() for output in outputs)
    )
    ids = torch.randint(0, V, (2000,))
    train_step(run, ids, draws(1, ids)[0], BPTT, 2.0, 1.0, 0.25)
    assert gone == [True] * 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [[], [5, 12]])
def test_rate_follows_the_batchs_own_length(make_run, kind, splits):
    """Three steps of unlike lengths: each moves by lr · length / bptt times its own gradient."""
    run = make_run(model=kind, splits=splits)
    ids = torch.randint(0, V, (2000,))
    by_hand = ByHand(run)
    for slices in draws(3, ids):
        loss = train_step(run, ids, slices, BPTT, 0.0, 0.0, 0.0)
        assert loss.item() == pytest.approx(by_hand.step(ids, slices), rel=1e-5)
        assert_same(run, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_regularisation_is_in_the_objective_and_not_in_the_loss(make_run, kind):
    """AR on the dropped output and TAR on the raw one drive the step; the reported loss leaves both out."""
    run = make_run(model=kind, dropout=0.4, dropouth=0.2, dropouti=0.3, wdrop=0.3)
    ids = torch.randint(0, V, (2000,))
    by_hand, plain = ByHand(run), ByHand(run)
    for seed, slices in enumerate(draws(3, ids)):
        torch.manual_seed(seed)
        loss = train_step(run, ids, slices, BPTT, 2.0, 1.5, 0.0)
        torch.manual_seed(seed)
        assert loss.item() == pytest.approx(by_hand.step(ids, slices, alpha=2.0, beta=1.5), rel=1e-5)
        assert_same(run, by_hand)
    torch.manual_seed(0)
    plain.step(ids, draws(1, ids)[0])
    with pytest.raises(AssertionError):
        assert_same(run, plain)


def test_clipping_covers_the_criterion(make_run):
    """The norm is that of all gradients, the split softmax's own among them, regularisation included."""
    run = make_run(splits=[5, 12], dropout=0.2)
    ids = torch.randint(0, V, (2000,))
    by_hand = ByHand(run)
    for seed, slices in enumerate(draws(2, ids)):
        torch.manual_seed(seed)
        train_step(run, ids, slices, BPTT, 2.0, 1.0, 0.05)
        torch.manual_seed(seed)
        by_hand.step(ids, slices, 2.0, 1.0, clip=0.05)
        assert_same(run, by_hand)


def test_weight_decay(make_run):
    """Every weight decays, at the batch's own rate, and clipping does not look at it."""
    run = make_run(splits=[5, 12], wdecay=0.02)
    ids = torch.randint(0, V, (2000,))
    by_hand = ByHand(run)
    for slices in draws(2, ids):
        train_step(run, ids, slices, BPTT, 0.0, 0.0, 0.1)
        by_hand.step(ids, slices, clip=0.1, wdecay=0.02)
        assert_same(run, by_hand)


@pytest.mark.parametrize(("kind", "splits"), [("LSTM", []), ("QRNN", [5, 12])])
def test_averaging_is_the_mean_of_the_weights_after_each_step(make_run, kind, splits):
    """A slow float64 mean gives the same; the descent goes on with the raw weights, at its scaled rate."""
    run = make_run(model=kind, splits=splits)
    ids = torch.randint(0, V, (2000,))
    by_hand, after = ByHand(run), []
    for number, slices in enumerate(draws(9, ids)):
        if number == 3:
            run.start_averaging()
        train_step(run, ids, slices, BPTT, 0.0, 0.0, 0.0)
        by_hand.step(ids, slices)
        assert_same(run, by_hand)
        if number >= 3:
            after.append({name: w.double() for name, w in weights(run).items()})
    model, criterion = run.evaluated()
    means = {name: p.detach() for name, p in [*model.named_parameters(), *criterion.named_parameters()]}
    assert set(means) == set(after[0])
    for name, mean in means.items():
        expected = torch.stack([step[name] for step in after]).mean(0)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(mean, weights(run)[name], atol=1e-4)


def test_saved_model_is_the_mean(make_run):
    """What is saved while averaging is the mean, the criterion's too, and not the raw weights."""
    run = make_run(splits=[5, 12], wdrop=0.5)
    ids = torch.randint(0, V, (2000,))
    run.start_averaging()
    for slices in draws(4, ids):
        train_step(run, ids, slices, BPTT, 0.0, 0.0, 0.0)
    run.save_model(1.0)
    model, criterion = run.evaluated()
    saved = torch.load(run.save, weights_only=True)
    for part, module in (("model", model), ("criterion", criterion)):
        for name, tensor in module.state_dict().items():
            assert torch.equal(saved[part][name], tensor)
    assert not torch.equal(saved["model"]["encoder.weight"], run.model.encoder.weight)
    assert not torch.equal(saved["criterion"]["tail_vectors"], run.criterion.tail_vectors)


@pytest.mark.parametrize("nonmono", [0, 1, 2, 5])
def test_has_stalled_is_algorithm_1(nonmono):
    """Stalled: more than n losses before this one, which is above the least of those but the last n."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        losses = rng.integers(0, 9, size=rng.integers(1, 10)).tolist()
        t, v = len(losses) - 1, losses[-1]
        expected = t > nonmono and any(True for _ in losses[: t - nonmono]) and v > min(losses[: t - nonmono])
        assert has_stalled(losses, nonmono) == expected, losses
        seen.add(expected)
    assert seen == {True, False}


# Evaluation


def saved_of(kind: str, model: RNNModel, criterion: SplitCrossEntropyLoss) -> dict:
    return {
        "args": {"model": kind, "splits": list(criterion.splits)},
        "model": reference.arrays(model.state_dict()),
        "criterion": reference.arrays(criterion.state_dict()),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [[], [5, 12]])
@pytest.mark.parametrize("batch_size", [1, 10])
def test_evaluate_is_the_reference_whatever_bptt(kind, splits, batch_size):
    """The mean over the predicted tokens, each counted once, equals float64; `bptt` changes nothing."""
    model = RNNModel(kind, V, 8, 10, 2)
    criterion = SplitCrossEntropyLoss(8, splits)
    for parameter in [*model.parameters(), *criterion.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(0, V, (503,))
    expected = reference.mean_loss(saved_of(kind, model, criterion), ids.numpy(), batch_size)
    for bptt in (1, 7, 70, 1000):
        loss = evaluate(model.train(), criterion, ids, bptt, batch_size)
        assert loss == pytest.approx(expected, rel=1e-6), bptt


def test_evaluate_touches_no_gradient_and_no_generator():
    """Evaluation draws nothing and leaves no gradients: training after it is the same as without."""
    model, criterion = RNNModel("LSTM", V, 8, 10, 2), SplitCrossEntropyLoss(8, [])
    before = torch.get_rng_state()
    evaluate(model.train(), criterion, torch.randint(0, V, (200,), generator=torch.Generator()), 10, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


# The saved file in code


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_restored_to_evaluate(tmp_path, kind):
    """`load_model` and `restore` give model and criterion that evaluate as before, with nothing dropped."""
    args = {"model": kind, "emsize": 8, "nhid": 10, "nlayers": 2, "tied": True, "splits": [5, 12]}
    vocab = [f"w{i}" for i in range(V)]
    model, criterion = checkpoint.build(
        args, vocab, dropout=0.5, dropouth=0.5, dropouti=0.5, dropoute=0.5, wdrop=0.5
    )
    contents = checkpoint.model_contents(args, vocab, model, criterion, {"valid_loss": 1.0})
    checkpoint.save(tmp_path / "m.pt", contents)
    saved = checkpoint.load_model(tmp_path / "m.pt", "--save")
    assert saved["vocab"] == vocab
    ids = torch.randint(0, V, (200,))
    expected = evaluate(model, criterion, ids, 10, 4)
    other, its_criterion = checkpoint.restore(saved)
    assert evaluate(other, its_criterion, ids, 10, 4) == expected
    assert math.isfinite(expected)
