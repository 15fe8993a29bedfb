"""Mixed precision, and the flat buffer of weights that cuDNN wants: as far as a CPU goes."""

import copy
import math
import operator
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, load
from runner import run_cli
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import KINDS, flags_of, options_of

from layers.recurrent import GatedLayer, RecurrentLayer
from model import LSTM
from mos import MixtureOfSoftmaxes
from products import has_bf16
from splitcross import SplitCrossEntropyLoss, linear_cross_entropy

GATED = [
    ("LSTM", {}),
    ("GRU", {}),
    ("Mogrifier", {"rounds": 0, "dropoutr": 0.5}),
    ("rlstm", {"rounds": 0, "dropoutr": 0.5}),
]
WITH_ROUNDS = [(kind, {"rounds": 3, "rank": rank}) for kind in ("Mogrifier", "rlstm") for rank in (0, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_learns_what_float32_learns(trained, kind):
    """The validation loss after an epoch is that of float32 to the precision of eight bits.

    A processor without bfloat16 stays with float32.
    """
    exact = trained("--epochs", 1, *flags_of(kind))
    for amp in ("bf16", "fp16"):
        mixed = trained("--epochs", 1, *flags_of(kind), "--amp", amp)
        assert math.isclose(mixed.saved["metrics"]["valid_loss"], exact.saved["metrics"]["valid_loss"], rel_tol=0.02)
        steps = ([entry["loss"] for entry in run.log("train")] for run in (mixed, exact))
        assert operator.ne(*steps) is (amp == "fp16" or has_bf16())


@pytest.mark.parametrize(("kind", "amp"), [*((kind, "fp16") for kind in KINDS), *((kind, "bf16") for kind, _ in GATED)])
def test_runs_in_mixed_precision_resume_bit_for_bit(trained, corpus, tmp_path, kind, amp):
    """Stopped after five steps and resumed, weights and loss scale end where the whole run ends."""
    flags = (*flags_of(kind), "--amp", amp)
    whole = trained("--epochs", 1, *flags)
    first = ("--data", corpus, *SMALL, "--save", "m.pt", "--epochs", 1, *flags)
    assert run_cli(*first, "--max_steps", 5, cwd=tmp_path).status == 0
    assert run_cli("--resume", "m.pt", "--max_steps", 0, cwd=tmp_path).status == 0
    state = load(tmp_path / "m.pt.state")
    assert state["scaler"] == whole.state["scaler"]
    assert bool(state["scaler"]) == (amp == "fp16"), "bfloat16 has the range of float32"
    assert all(torch.equal(state["weights"][k], v) for k, v in whole.state["weights"].items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_in_half_precision_goes_on_in_float32(trained, tmp_path, kind):
    """What cuDNN's layers carry under --amp is half as wide; a run without it, or on a CPU, can take it up."""
    run = trained("--epochs", 2, "--max_steps", 5, *flags_of(kind))
    state = run.state
    state["hidden"] = [tuple(tensor.half() for tensor in carried) for carried in state["hidden"]]
    shutil.copy(run.path, tmp_path)
    torch.save(state, tmp_path / "m.pt.state")
    assert run_cli("--resume", "m.pt", "--max_steps", 0, cwd=tmp_path).status == 0


@pytest.mark.parametrize("experts", [0, 3])
def test_a_loss_in_bfloat16_is_float64s_to_eight_bits(experts):
    """The factors are rounded, the sums are not: gradients are float32."""
    torch.manual_seed(0)
    N, H, V = 60, 16, 50
    criterion = MixtureOfSoftmaxes(H, H, experts) if experts else SplitCrossEntropyLoss(H)
    targets = torch.randint(V, (N,))
    weights = [torch.randn(V, H), torch.randn(V), torch.randn(N, H), *criterion.parameters()]
    found = []
    for exact in (False, True):
        given = [w.detach().double() if exact else w.detach().bfloat16().float() for w in weights]
        given = [w.requires_grad_() for w in given]
        named = dict(zip((name for name, _ in criterion.named_parameters()), given[3:], strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            loss = torch.func.functional_call(criterion, named, (*given[:3], targets))
        found.append((loss, torch.autograd.grad(loss, given)))
    (loss, gradients), (exact_loss, exact_gradients) = found
    assert math.isclose(loss.item(), exact_loss.item(), rel_tol=0.01)
    for gradient, wanted in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("how", ["blocked", "mixture", "plain"])
def test_the_bias_is_not_rounded_to_half_precision(how):
    """It has the largest part of a frequent word's logit; without any other part, loss and gradient are exact."""
    torch.manual_seed(0)
    N, H, V = 60, 16, 50
    criterion = MixtureOfSoftmaxes(H, H, 3) if how == "mixture" else SplitCrossEntropyLoss(H)
    hiddens, weight, bias = torch.randn(N, H), torch.zeros(V, H), (8 + torch.rand(V)).requires_grad_()
    targets = torch.randint(V, (N,))
    with torch.autocast("cpu", torch.bfloat16):
        if how == "plain":  # as on a GPU
            loss = linear_cross_entropy(hiddens, weight, bias, targets, N)
        else:
            loss = criterion(weight, bias, hiddens, targets)
    exact = bias.detach().double().requires_grad_()
    wanted = F.cross_entropy(exact.expand(N, V), targets)
    assert math.isclose(loss.item(), wanted.item(), rel_tol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, bias)[0].double(), torch.autograd.grad(wanted, exact)[0], rtol=1e-4, atol=1e-6
    )


class DtypesOfProducts(TorchDispatchMode):
    """Collects the dtypes of the factors of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1].rstrip("_")
        if name in ("mm", "bmm", "mv", "addmm", "addmv", "_linear_pointwise"):
            self.found |= {tensor.dtype for tensor in args[-2 if name.startswith("add") else 0 :][:2]}
        return function(*args, **(kwargs or {}))


def run_layer(layer: RecurrentLayer, x: Tensor, amp: bool) -> list[Tensor]:
    """The output (T, B, H), the state after the last step, and the gradients of x and all weights."""
    x = x.detach().requires_grad_()
    torch.manual_seed(0)  # of the masks
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out, state = layer(x, layer.init_hidden(x.size(1)))
    wanted = [x, *layer.parameters()]
    factors = torch.linspace(-1, 1, out.size(2), dtype=out.dtype)
    return [out, *state, *torch.autograd.grad((out * factors).sum(), wanted)]


@pytest.mark.parametrize(("kind", "options"), [*GATED, *WITH_ROUNDS])
@pytest.mark.parametrize(("T", "B"), [(2, 3), (30, 1), (30, 70), (600, 1), (600, 3)])
def test_gated_layers_in_bfloat16_are_float64s_to_eight_bits(kind, options, T, B):
    """However long the text is; rounds multiply the error. Without rounds every product is in bfloat16."""
    torch.manual_seed(0)
    layer = KINDS[kind](24, 32, 0.0, first=True, **options_of(kind) | options)
    layer.reset_parameters()
    x = torch.randn(T, B, 24)
    with DtypesOfProducts() as dtypes:
        found = run_layer(layer, x, amp=True)
    assert dtypes.found == ({torch.bfloat16, torch.float32} if options.get("rounds") else {torch.bfloat16})
    torch.manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, layer.init_hidden(B))[0], found[0])
    exact = run_layer(layer.double(), x.double(), amp=False)
    assert found[0].dtype == torch.float32
    for a, b in zip(found, exact, strict=True):
        assert ((a - b).norm() / b.norm()).item() < (5e-2 if options.get("rounds") else 2e-2)


@pytest.mark.parametrize(
    ("kind", "biases"),
    [("LSTM", (-7, 7, 1, 0)), ("GRU", (0, 7, 1)), ("Mogrifier", (0, 7, 1, 0)), ("rlstm", (0, 1, 7, 0))],
)
def test_the_state_and_its_gradient_are_not_rounded_to_bfloat16(kind, biases):
    """They change by less than a thousandth per step: in bfloat16 they would stand still."""
    layer = KINDS[kind](3, 4, 0.0, first=True, **options_of(kind))
    for name, parameter in layer.named_parameters():
        nn.init.zeros_(parameter)
        if name in ("bias", "bias_ih_l0"):
            parameter.data = torch.tensor(biases, dtype=torch.float32).repeat_interleave(4)
    x, results = torch.randn(2000, 2, 3), []
    for exact in (False, True):
        layer, x = (layer.double(), x.double()) if exact else (layer, x)
        state = tuple(tensor.requires_grad_() for tensor in layer.init_hidden(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            out, _ = layer(x, state)
        results.append([out.double(), torch.autograd.grad(out[-1].sum(), state[-1])[0].double()])
    found, expected = results
    assert expected[0][-1].min() > 1.2 * expected[0][200].max()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "Mogrifier", "rlstm"])
def test_gated_layers_on_a_cpu_stay_in_float32_under_float16(kind):
    """Its range is too small."""
    layer = KINDS[kind](24, 32, 0.0, first=True, **options_of(kind))
    layer.reset_parameters()
    x, state = torch.randn(6, 3, 24), layer.init_hidden(3)
    exact, _ = layer(x, state)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer(x, state)[0], exact)


@pytest.fixture
def flatten(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for torch's own function, which only CUDA builds have: one buffer, the weights moved in."""
    calls = []

    def flatten(weights: list[Tensor], per_layer: int, inputs: int, mode: int, hidden: int, *rest: object):
        assert (per_layer, rest) == (4, (0, 1, False, False))
        assert weights[0].shape == ({2: 4, 3: 3}[mode] * hidden, inputs)
        assert weights[1].shape == (weights[0].size(0), hidden)
        buffer = torch.empty(sum(w.numel() for w in weights))
        start = 0
        for w in weights:
            place = buffer[start : start + w.numel()].view_as(w)
            start += w.numel()
            place.copy_(w)
            w.set_(place)
        calls.append(mode)
        return buffer

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten, raising=False)
    return calls


@pytest.mark.parametrize("kind", [kind for kind, layer in KINDS.items() if issubclass(layer, GatedLayer)])
def test_dropped_weights_lie_in_one_flat_buffer(flatten, kind):
    """Laid out once; a batch's matrix goes to its place, its gradient to the raw weights; no other moves."""
    layer = KINDS[kind](3, 5, wdrop=0.5, first=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for _ in range(3):
        dropped = layer.weight_hh_l0_raw * 0.25
        placed = layer.flat(dropped)
        weights = [layer.weight_ih_l0, placed, layer.bias_ih_l0, layer.bias_hh_l0]
        assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
        assert len({w.data_ptr() for w in weights}) == 4
        assert torch.equal(placed, dropped)
        (grad,) = torch.autograd.grad(placed.sum(), layer.weight_hh_l0_raw)
        assert torch.equal(grad, torch.full_like(grad, 0.25))
    assert len(flatten) == 1
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_a_copy_has_a_buffer_of_its_own(flatten):
    """What a deepcopy writes to its flat buffer does not reach the layer that it was copied from."""
    layer = LSTM(3, 5, wdrop=0.5, first=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    placed = layer.flat(layer.weight_hh_l0_raw).detach().clone()
    twin = copy.deepcopy(layer)
    twin.flat(torch.zeros(20, 5))
    twin.weight_ih_l0.data.zero_()
    assert torch.equal(layer.slot, placed)
    assert layer.weight_ih_l0.abs().min() > 0
