"""Every kind of layer computes its definition in reference.py and keeps the interface of layers/recurrent.py.

The kinds are those of `LAYERS` and `CELLS` in model.py. A new kind needs a row there and a definition in reference.py,
and is then tested here like the others.
"""

import copy
import re
from typing import Any

import pytest
import reference
import torch
from runner import ROOT
from torch import Tensor
from toys import KINDS, draw, has_weight_drop, make_layer, names_of

from harness.flags import resolve_args
from layers.recurrent import RecurrentLayer
from layers.weight_drop import drop_weight
from utils import UserError

pytestmark = pytest.mark.usefixtures("short_blocks")

E, H = 3, 4
# T and B. Layers have separate code for short texts of a single column, for up to 64 columns, and for all others.
SIZES = [(1, 1), (9, 1), (40, 1), (1, 3), (9, 3), (2, 70)]
DROPPING = [kind for kind in KINDS if has_weight_drop(kind)]

each_kind = pytest.mark.parametrize("kind", KINDS)
each_dropping_kind = pytest.mark.parametrize("kind", DROPPING)
each_place = pytest.mark.parametrize("first", [True, False], ids=["first layer", "later layer"])


def wdrops(kind: str) -> tuple[float, ...]:
    """Without weight drop, and with it where the kind has it."""
    return (0.0, 0.5) if has_weight_drop(kind) else (0.0,)


def raw_weights(layer: RecurrentLayer) -> dict[str, Tensor]:
    """The parameters that weight drop acts on, by name."""
    return {name: weight for name, weight in layer.named_parameters() if name.endswith("_raw")}


def definition(kind: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output that reference.py gives, in float64, from a state of zeros."""
    return torch.from_numpy(reference.LAYERS[kind](x.detach().double().numpy(), reference.arrays(weights)))


def test_every_kind_has_a_definition():
    """A kind without one cannot be tested: write it in tests/reference.py."""
    assert set(reference.LAYERS) == set(KINDS)
    assert {kind for kind in KINDS if KINDS[kind].summed} == reference.SUMMED
    assert {kind for kind in KINDS if KINDS[kind].residual} == reference.RESIDUAL


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@each_place
@each_kind
def test_outputs_are_those_of_the_definition(kind, first, dtype, tolerance):
    """In training, in evaluation and without gradients, for one step or many and for one column or many."""
    for wdrop in wdrops(kind):
        layer = make_layer(kind, E, H, first, wdrop).to(dtype)
        for T, B in SIZES:
            x, found = torch.randn(T, B, E, dtype=dtype), {}
            expected = definition(kind, layer.state_dict(), x)
            if not wdrop:
                found["training"] = layer.train()(x, layer.init_hidden(B))[0]
            found["evaluation"] = layer.eval()(x, layer.init_hidden(B))[0]
            with torch.no_grad():
                found["no gradients"] = layer(x, layer.init_hidden(B))[0]
            for mode, out in found.items():
                where = f"{mode}, T {T}, B {B}, wdrop {wdrop}"
                torch.testing.assert_close(
                    out.double(),
                    expected,
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda text, where=where: f"{where}: {text}",
                )


def check_gradients(layer: RecurrentLayer, T: int, B: int) -> None:
    """Those of the output and of the state, with respect to the input, the state before and all parameters."""
    names, weights = zip(*layer.named_parameters(), strict=True)
    state = [draw(*tensor.shape) for tensor in layer.init_hidden(B)]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)  # the same mask of weight drop in every call
        named = dict(zip(names, rest[len(state) :], strict=True))
        out, after = torch.func.functional_call(layer, named, (x, rest[: len(state)]))
        return out, *after

    assert torch.autograd.gradcheck(run, (draw(T, B, E), *state, *weights), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("T", "B"), [(1, 1), (4, 1), (4, 3)])
@each_place
@each_kind
def test_gradients_are_those_of_finite_differences(kind, first, T, B):
    """Under weight drop, with one fixed mask."""
    for wdrop in wdrops(kind):
        check_gradients(make_layer(kind, E, H, first, wdrop), T, B)


@each_place
@each_kind
def test_a_text_cut_in_two_is_the_same_text(kind, first):
    """The state that is handed on contains everything: the layer itself remembers nothing of a text."""
    layer, x = make_layer(kind, E, H, first), torch.randn(7, 2, E).double()
    for train in (True, False):
        with torch.set_grad_enabled(train):
            whole, end = layer(x, layer.init_hidden(2))
            for cut in (1, 3, 6):
                before, state = layer(x[:cut], layer.init_hidden(2))
                layer(torch.randn(4, 2, E).double(), layer.init_hidden(2))  # another text in between
                after, state = layer(x[cut:], state)
                torch.testing.assert_close((torch.cat([before, after]), state), (whole, end), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_place
@each_kind
def test_a_state_is_zero_first_and_keeps_its_shape_and_owns_its_memory(kind, first, dtype):
    """A state that is a view would keep the outputs of all steps in memory, and would write them to the .state."""
    layer = make_layer(kind, E, H, first).to(dtype)
    for B in (1, 3):
        zeros = layer.init_hidden(B)
        assert isinstance(zeros, tuple)
        assert all(tensor.shape[:2] == (1, B) and tensor.dim() == 3 and not tensor.any() for tensor in zeros)
        for train in (True, False):
            with torch.set_grad_enabled(train):
                out, state = layer(torch.randn(9, B, E, dtype=dtype), zeros)
            assert out.shape == (9, B, H)
            assert [tensor.shape for tensor in state] == [tensor.shape for tensor in zeros]
            assert {tensor.dtype for tensor in (out, *state, *zeros)} == {dtype}
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state)


@each_place
@each_kind
def test_initial_weights_are_finite_and_the_seed_decides_them(kind, first):
    """`reset_parameters` sets every element of every parameter; every parameter matters for the output or the state."""
    for wdrop in wdrops(kind):
        layer, drawn = make_layer(kind, E, H, first, wdrop), []
        for seed in (1, 1, 2):
            for weight in layer.parameters():
                torch.nn.init.constant_(weight, torch.nan)
            torch.manual_seed(seed)
            layer.reset_parameters()
            drawn.append(torch.nn.utils.parameters_to_vector(layer.parameters()).detach())
        assert drawn[0].isfinite().all()
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        layer(torch.randn(9, 3, E).double(), layer.init_hidden(3))[0].square().sum().backward()
        assert all(weight.grad.any() for weight in layer.parameters())


@each_place
@each_kind
def test_a_copy_is_independent(kind, first):
    """It gives the same output, and changing it, after a step of training, leaves the first layer alone."""
    for wdrop in wdrops(kind):
        layer, x = make_layer(kind, E, H, first, wdrop), torch.randn(9, 3, E).double()
        layer(x, layer.init_hidden(3))[0].sum().backward()
        twin = copy.deepcopy(layer)
        layer.eval(), twin.eval()
        before = layer(x, layer.init_hidden(3))[0]
        assert torch.equal(twin(x, twin.init_hidden(3))[0], before)
        with torch.no_grad():
            for weight in twin.parameters():
                weight.zero_()
        assert torch.equal(layer(x, layer.init_hidden(3))[0], before)
        for module in (layer, twin):  # the twin's masks are over its own weights: over zeros they cannot show
            outputs = [module.train()(x, module.init_hidden(3))[0] for _ in range(2)]
            assert torch.equal(*outputs) == (module is twin or wdrop == 0)


# Weight drop


@each_place
@each_dropping_kind
def test_weight_drop_has_one_mask_per_batch(kind, first):
    """All steps and columns see the same dropped matrices, and the next batch sees others."""
    layer, x = make_layer(kind, E, H, first, wdrop=0.5), torch.randn(9, 3, E).double()
    torch.manual_seed(5)
    out = layer(x, layer.init_hidden(3))[0]
    torch.manual_seed(5)
    dropped = {name: drop_weight(weight, 0.5, True) for name, weight in raw_weights(layer).items()}
    assert dropped
    expected = definition(kind, dict(layer.named_parameters()) | dropped, x)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(layer(x, layer.init_hidden(3))[0], out)


@each_place
@each_dropping_kind
def test_weight_drop_survives_evaluation_and_steps(kind, first):
    """The raw weights learn, except the elements that are dropped, and evaluation sees what they have learnt."""
    layer, x = make_layer(kind, E, H, first, wdrop=0.5), torch.randn(9, 3, E).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        before = layer.eval()(x, layer.init_hidden(3))[0]
        optimizer.zero_grad()
        layer.train()(x, layer.init_hidden(3))[0].square().sum().backward()
        for raw in raw_weights(layer).values():
            assert 0.1 < (raw.grad == 0).double().mean() < 0.9
        optimizer.step()
        assert not torch.equal(layer.eval()(x, layer.init_hidden(3))[0], before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DROPPING])
def test_a_kind_without_weight_drop_refuses_it(kind):
    """It is an error that names the flag, not a setting that does nothing."""
    names = names_of(kind)
    with pytest.raises(UserError, match=rf"--wdrop 0\.5: .*{names['model']}"):
        resolve_args({**names, "wdrop": 0.5}, {})


def test_the_example_of_the_documentation_works(tmp_path):
    """The layer and the definition of docs/extending.md agree: outputs, and what is carried from half to half."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    layer, _, definition = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:3]
    code: dict[str, Any] = {}
    exec(layer, code)
    exec(definition.partition("LAYERS =")[0], code | vars(reference), code)
    for wdrop in (0.0, 0.5):
        made = code["MinGRU"](E, H, wdrop, first=True).double().eval()
        made.reset_parameters()
        x = torch.randn(7, 3, E, dtype=torch.float64)
        expected = torch.from_numpy(code["mingru"](x.numpy(), reference.arrays(made.state_dict())))
        first, hidden = made(x[:4], made.init_hidden(3))
        torch.testing.assert_close(torch.cat([first, made(x[4:], hidden)[0]]), expected, rtol=0, atol=1e-12)
