"""How the weights move: torch's steps, the means of them, and the rule that switches NT-ASGD's on."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model import RNNModel
from optim import OPTIMIZERS, Mean, TwoTailedMean, annealed, has_stalled, make_optimizer
from splitcross import SplitCrossEntropyLoss


def make_weights(seed: int = 0) -> nn.ModuleList:
    """A model and a criterion with parameters of its own, as training averages them."""
    torch.manual_seed(seed)
    return nn.ModuleList([RNNModel("LSTM", 20, 6, 8, 2, wdrop=0.5), SplitCrossEntropyLoss(6, [5, 12])])


def move(weights: nn.Module) -> None:
    """A step of an imaginary optimizer, large enough for a mean to differ from its ends."""
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(torch.randn_like(parameter))


# The mean


def test_the_mean_is_the_mean_of_the_weights_after_each_step():
    """After every one of 50 steps it is the float64 mean of the weights since it was made, criterion included."""
    weights = make_weights()
    move(weights)  # what was before does not count
    mean, totals = Mean(weights), [torch.zeros(p.shape, dtype=torch.float64) for p in weights.parameters()]
    for steps in range(1, 51):
        move(weights)
        mean.update(weights)
        totals = [total + p.detach().double() for total, p in zip(totals, weights.parameters(), strict=True)]
        assert type(mean.count) is int
        assert mean.count == steps
        for found, total in zip(mean.weights.parameters(), totals, strict=True):
            torch.testing.assert_close(found.detach().double(), total / steps, rtol=0, atol=5e-6)


def test_the_first_step_is_the_mean_of_one():
    """Exactly the weights after that step, to the bit; nothing of those it was made from."""
    weights = make_weights()
    mean = Mean(weights)
    move(weights)
    mean.update(weights)
    for found, parameter in zip(mean.weights.parameters(), weights.parameters(), strict=True):
        assert torch.equal(found, parameter)


def test_the_mean_does_not_drift_over_many_steps():
    """Weights that stand still are their own mean to the last bits, after 10,000 steps too."""
    weights = nn.Linear(7, 5)
    mean = Mean(weights)
    for _ in range(10_000):
        mean.update(weights)
    torch.testing.assert_close(mean.weights.weight, weights.weight, rtol=1e-6, atol=1e-7)


def test_mean_and_descent_do_not_touch_each_other():
    """The descent goes on with the raw weights; a tied weight stays tied in the mean, which has no graph."""
    weights = make_weights()
    mean = Mean(weights)
    before = copy.deepcopy(weights.state_dict())
    move(mean.weights)
    assert all(torch.equal(value, before[name]) for name, value in weights.state_dict().items())
    averaged = copy.deepcopy(mean.weights.state_dict())
    move(weights)
    assert all(torch.equal(value, averaged[name]) for name, value in mean.weights.state_dict().items())
    mean.update(weights)
    assert mean.weights[0].decoder.weight is mean.weights[0].encoder.weight
    assert mean.weights[0].encoder.weight.grad_fn is None


# The two means


class TwoTailedByHand:
    """Algorithm 1 of Melis, arXiv 2209.12581, over a list of the weights after every step, in float64."""

    def __init__(self) -> None:
        self.all: list[Tensor] = []
        self.long, self.short = 0, 0  # where in the list each of the means begins

    def mean(self, begin: int) -> Tensor:
        return torch.stack(self.all[begin:]).mean(0)

    def validate(self, loss_of: Callable[[Tensor], float]) -> tuple[float, bool]:
        """The long mean's loss after the comparison, and whether it has become the short one."""
        loss = loss_of(self.mean(self.long))
        if self.short == len(self.all) or loss_of(self.mean(self.short)) > loss:
            return loss, False
        self.long, self.short = self.short, len(self.all)
        return loss_of(self.mean(self.long)), True


def test_two_tailed_is_the_papers_algorithm():
    """Over 400 steps to a goal that moves once, and about it; validations after any steps, and after no step at all."""
    weights = nn.ModuleDict({"model": nn.Linear(3, 2, bias=False).double()})
    mean, by_hand, goal = TwoTailedMean(weights), TwoTailedByHand(), torch.randn(2, 3, dtype=torch.float64)
    evaluated: list[int] = []

    def loss_of(found: nn.ModuleDict) -> float:
        return (found["model"].weight - goal).pow(2).sum().item()

    def loss_of_short(found: nn.ModuleDict) -> float:
        assert found is mean.short.weights
        evaluated.append(mean.short.count)
        return loss_of(found)

    def draw(std: float) -> Tensor:
        return std * torch.randn(2, 3, dtype=torch.float64)

    switched = []
    for step in range(1, 401):
        if step == 150:
            goal.add_(1.0)
        with torch.no_grad():
            weights["model"].weight.lerp_(goal, 0.05).add_(draw(0.1))
        mean.update(weights)
        by_hand.all.append(weights["model"].weight.detach().clone())
        for _ in range([0, 0, 0, 1, 1, 2][int(torch.randint(6, ()))]):
            loss = mean.after_validation(loss_of(mean.weights), loss_of_short)
            expected, did = by_hand.validate(lambda found: (found - goal).pow(2).sum().item())
            assert loss == pytest.approx(expected, rel=1e-9)
            assert loss == pytest.approx(loss_of(mean.weights), rel=1e-12), "it is that of the long mean as it is now"
            switched.append(did)
        assert (mean.count, mean.short.count) == (step - by_hand.long, step - by_hand.short)
        torch.testing.assert_close(
            mean.weights["model"].weight.detach(), by_hand.mean(by_hand.long), rtol=0, atol=1e-12
        )
        if mean.short.count:
            found = mean.short.weights["model"].weight.detach()
            torch.testing.assert_close(found, by_hand.mean(by_hand.short), rtol=0, atol=1e-12)
    assert switched[0], "at first both are the same"
    assert switched.count(True) > 3
    assert switched.count(False) > 3
    assert by_hand.long > 100, "the early weights are forgotten"
    assert 0 not in evaluated, "an empty mean is not evaluated"
    assert len(evaluated) < len(switched)


def test_two_tailed_goes_on_from_its_state():
    """Both means and both counts, under other names too, whether the short one is empty or not; to the bit."""
    weights = make_weights()
    mean, other = TwoTailedMean(weights), TwoTailedMean(make_weights(1))
    for step in range(30):
        move(weights)
        mean.update(weights)
        if step % 7 == 6:
            mean.after_validation(1.0, lambda _: 1.0)  # equal is good enough
            assert (mean.count, mean.short.count) == (7, 0)
        state = copy.deepcopy(mean.state())
        for part in (state, state["short"]):
            part["weights"] = {f"old.{name}": tensor for name, tensor in part["weights"].items()}
        other.restore(state, lambda found: {name.removeprefix("old."): tensor for name, tensor in found.items()})
        assert (other.count, other.short.count) == (mean.count, mean.short.count)
        move(weights)
        for one in (mean, other):
            one.update(weights)
        for a, b in ((mean, other), (mean.short, other.short)):
            assert all(torch.equal(*pair) for pair in zip(a.weights.parameters(), b.weights.parameters(), strict=True))
            assert a.weights[0].decoder.weight is a.weights[0].encoder.weight
        mean.restore(state, lambda found: {name.removeprefix("old."): tensor for name, tensor in found.items()})


# The optimizers


def test_sgd_is_the_textbooks():
    """w - lr · (g + decay · w), over all parameters, in float64 by hand."""
    weights = make_weights()
    optimizer = make_optimizer(list(weights.parameters()), "sgd", lr=0.7, wdecay=0.01)
    expected = [p.detach().double() for p in weights.parameters()]
    for _ in range(5):
        for i, parameter in enumerate(weights.parameters()):
            parameter.grad = torch.randn_like(parameter)
            expected[i] = expected[i] - 0.7 * (parameter.grad.double() + 0.01 * expected[i])
        optimizer.step()
    for parameter, value in zip(weights.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=0, atol=5e-6)


def test_adam_is_the_papers():
    """Kingma and Ba's algorithm 1, with the decay as part of the gradient, in float64 by hand."""
    weights = make_weights()
    optimizer = make_optimizer(list(weights.parameters()), "adam", lr=0.02, wdecay=0.01)
    expected = [p.detach().double() for p in weights.parameters()]
    m, v = ([torch.zeros_like(w) for w in expected] for _ in range(2))
    for t in range(1, 6):
        for i, parameter in enumerate(weights.parameters()):
            parameter.grad = torch.randn_like(parameter)
            g = parameter.grad.double() + 0.01 * expected[i]
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            step = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            expected[i] = expected[i] - 0.02 * step
        optimizer.step()
    for parameter, value in zip(weights.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=0, atol=5e-6)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_radam_is_the_papers(beta1):
    """Liu et al.'s algorithm 2, arXiv 1908.03265, with the decay as Adam has it, in float64 by hand.

    The first steps are those of a mean gradient, as long as the variance of its rate is not known; the later ones are
    rectified.
    """
    weights = make_weights()
    optimizer = make_optimizer(list(weights.parameters()), "radam", lr=0.02, wdecay=0.01, beta1=beta1)
    expected = [p.detach().double() for p in weights.parameters()]
    m, v = ([torch.zeros_like(w) for w in expected] for _ in range(2))
    longest, rectified = 2 / (1 - 0.999) - 1, []  # ρ_∞
    for t in range(1, 13):
        length = longest - 2 * t * 0.999**t / (1 - 0.999**t)  # ρ_t
        rectified.append(length > 5)
        for i, parameter in enumerate(weights.parameters()):
            parameter.grad = torch.randn_like(parameter)
            g = parameter.grad.double() + 0.01 * expected[i]
            m[i], v[i] = beta1 * m[i] + (1 - beta1) * g, 0.999 * v[i] + 0.001 * g * g
            step = m[i] / (1 - beta1**t)
            if length > 5:
                r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
                step = step * r**0.5 * (1 - 0.999**t) ** 0.5 / (v[i].sqrt() + 1e-8)
            expected[i] = expected[i] - 0.02 * step
        optimizer.step()
    assert {True, False} == set(rectified)
    for parameter, value in zip(weights.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_row_of_the_table_is_an_optimizer(name):
    """Of the row's class, with the rate given, all weights together; its state survives a round trip."""
    row = OPTIMIZERS[name]
    weights, twin = make_weights(), make_weights()
    optimizer = make_optimizer(list(weights.parameters()), name, lr=row.lr, wdecay=1e-6)
    assert type(optimizer) is row.kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (row.lr, 1e-6)
    assert group["fused" if row.fused else "foreach"]
    assert len(group["params"]) == len(list(weights.parameters()))
    assert row.on_stall in ("average", "nothing")
    other = make_optimizer(list(twin.parameters()), name, lr=1.0, wdecay=0.0)
    for _ in range(2):
        for a, b in zip(weights.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), twin.parameters(), strict=True))


def test_the_papers_rates():
    """SGD with 30, whose stall starts the averaging; Adam and RAdam with 1e-3, whose stall starts nothing."""
    assert OPTIMIZERS["sgd"] == (torch.optim.SGD, 30.0, "average", 0, True)
    assert OPTIMIZERS["adam"] == (torch.optim.Adam, 1e-3, "nothing", 2, True)
    assert OPTIMIZERS["radam"] == (torch.optim.RAdam, 1e-3, "nothing", 2, False)


# The rule


@pytest.mark.parametrize("nonmono", [0, 1, 5])
def test_stalled_is_algorithm_1_word_for_word(nonmono):
    """t > n and v_t > min over l in 0 .. t-n-1 of v_l: above, not equal. Over a random run of 20 different losses."""
    assert not has_stalled([], nonmono)
    losses = torch.randint(20, (60,), generator=torch.Generator().manual_seed(nonmono)).tolist()
    found = [has_stalled(losses[: t + 1], nonmono) for t in range(60)]
    expected = [t > nonmono and losses[t] > min(losses[s] for s in range(t - nonmono)) for t in range(60)]
    assert found == expected
    assert True in found
    assert False in found[nonmono + 1 :]


@pytest.mark.parametrize(
    ("done", "after", "left"),
    [(0, 4, 1), (4, 4, 1), (5.5, 4, 0.75), (10, 4, 0), (9.9, 0, 1), (3, 12, 1)],
)
def test_annealed_is_a_straight_line_from_its_epoch_to_the_last(done, after, left):
    assert annealed(done, after, 10) == pytest.approx(left)
