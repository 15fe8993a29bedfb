"""The model: each dropout acts where it should, and never in evaluation; outputs are those of the float64 reference.

The layers themselves are tested in test_layers.py.
"""

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from toys import KINDS, NO_DROPOUT, dropouts_of, has_weight_drop, settings_of

import utils
from layers.weight_drop import LockedDropout, drop_weight
from model import LAYERS, RNNModel, build, detach, embedded_dropout
from splitcross import default_splits

V, T, B = 30, 6, 4
FORMAT_KINDS = ["LSTM", "GRU", "QRNN"]  # whose parameters' names belong to the file format of the first version


def make(kind: str = "LSTM", **settings: object) -> RNNModel:
    """A model that drops nothing unless `settings` say so; weights large enough for gates to move."""
    torch.manual_seed(0)
    model, _ = build(settings_of(kind, emsize=8, nhid=10) | settings, V)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def words() -> Tensor:
    return torch.randint(0, V, (T, B), generator=torch.Generator().manual_seed(1))


def output(model: RNNModel) -> Tensor:
    """The output (T, B, ·) on the same words from a state of zeros."""
    return model(words(), model.init_hidden(B))[0].view(T, B, -1)


# Weight drop


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_drop_weight_zeroes_a_share_p_and_scales_the_rest(p):
    """Elements are 0 with probability p, else w / (1 - p), each by itself."""
    raw = torch.rand(500, 901) + 1
    dropped = drop_weight(raw, p, True)
    mask = dropped != 0
    torch.testing.assert_close(dropped[mask], (raw / (1 - p))[mask])
    n, deviation = raw.numel(), (p * (1 - p) / raw.numel()) ** 0.5
    assert (~mask).sum() / n == pytest.approx(p, abs=5 * deviation)
    centred = (mask.double() - (1 - p)).flatten()
    for lag in (1, 2, 3, 4, 8, 16, 901):
        together = (centred[lag:] * centred[:-lag]).mean() / (p * (1 - p))
        assert abs(together) < 5 / n**0.5, lag
    for counts in (mask.double().mean(0), mask.double().mean(1)):
        expected = (p * (1 - p) / (n / len(counts))) ** 0.5
        assert counts.std() == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17,), (2, 3, 4)])
def test_drop_weight_takes_any_shape(shape):
    """No element is forgotten, whatever the number of elements."""
    seen = sum(drop_weight(torch.ones(shape), 0.5, True) == 2 for _ in range(100))
    assert seen.shape == shape
    assert ((seen > 15) & (seen < 85)).all()


def test_drop_weight_is_off_in_evaluation_and_for_p_zero():
    """Then the weight comes back as it is."""
    raw = torch.randn(50, 50)
    assert torch.equal(drop_weight(raw, 0.5, False), raw)
    assert torch.equal(drop_weight(raw, 0.0, True), raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_weight_gradient_passes_the_mask(dtype):
    """The gradient of the raw weight is the dropped one's, through the same mask and scale."""
    raw = torch.randn(40, 50, dtype=dtype, requires_grad=True)
    dropped = drop_weight(raw, 0.3, True)
    upstream = torch.randn(40, 50, dtype=dtype)
    dropped.backward(upstream)
    torch.testing.assert_close(raw.grad, torch.where(dropped != 0, upstream / 0.7, 0))


def test_drop_weight_draws_anew_and_by_torchs_seed():
    """Two draws differ; the same seed gives the same mask."""
    raw = torch.ones(40, 50)
    torch.manual_seed(3)
    first, second = drop_weight(raw, 0.5, True), drop_weight(raw, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(drop_weight(raw, 0.5, True), first)
    assert not torch.equal(first, second)


# Parameters


@pytest.mark.parametrize("kind", FORMAT_KINDS)
@pytest.mark.parametrize(("tied", "wdrop"), [(True, 0.5), (False, 0)])
def test_parameter_names_and_shapes(kind, tied, wdrop):
    """The names of the file format, to the letter, of parameters and state dict alike; a tied weight once."""
    model = make(kind, tied=tied, wdrop=wdrop)
    sizes = [(8, 10), (10, 8 if tied else 10)]
    suffix = "_raw" if wdrop else ""
    expected = {"encoder.weight": (V, 8), "decoder.bias": (V,)}
    if not tied:
        expected["decoder.weight"] = (V, 10)
    for layer, (n_in, n_out) in enumerate(sizes):
        if kind == "QRNN":
            expected[f"rnns.{layer}.linear.weight{suffix}"] = (3 * n_out, (2 if layer == 0 else 1) * n_in)
            expected[f"rnns.{layer}.linear.bias"] = (3 * n_out,)
            continue
        gates = 4 if kind == "LSTM" else 3
        expected[f"rnns.{layer}.weight_ih_l0"] = (gates * n_out, n_in)
        expected[f"rnns.{layer}.weight_hh_l0{suffix}"] = (gates * n_out, n_out)
        for bias in ("bias_ih_l0", "bias_hh_l0"):
            expected[f"rnns.{layer}.{bias}"] = (gates * n_out,)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
    assert (model.decoder.weight is model.encoder.weight) == tied


def assert_uniform(weight: Tensor, bound: float) -> None:
    """Uniform in ±bound: its largest element, its mean and its deviation say so."""
    n, deviation = weight.numel(), bound / 3**0.5
    assert (1 - 12 / n) * bound < weight.abs().max() <= bound
    assert weight.mean().item() == pytest.approx(0, abs=5 * deviation / n**0.5)
    assert weight.std().item() == pytest.approx(deviation, rel=5 * 0.45 / n**0.5)


@pytest.mark.parametrize("kind", FORMAT_KINDS)
@pytest.mark.parametrize(("tied", "wdrop"), [(True, 0.5), (False, 0)])
def test_initialisation(kind, wdrop, tied):
    """±0.1 for embedding and decoder, bias zero; ±1/sqrt(H) for LSTM and GRU, ±1/sqrt(inputs) for a QRNN."""
    model = RNNModel(kind, 500, 30, 40, 2, wdrop=wdrop, tie_weights=tied)
    assert_uniform(model.encoder.weight, 0.1)
    assert_uniform(model.decoder.weight, 0.1)
    assert not model.decoder.bias.any()
    inputs = {"QRNN": [60, 40]}.get(kind, [40, 30 if tied else 40])
    for layer, fan_in in zip(model.rnns, inputs, strict=True):
        for parameter in layer.parameters():
            assert_uniform(parameter, fan_in**-0.5)


@pytest.mark.parametrize("kind", ["Mogrifier", "rlstm"])
@pytest.mark.parametrize("tied", [True, False])
def test_initialisation_of_melis(kind, tied):
    """Embedding and untied decoder are truncated normals of deviation 1/sqrt(width), cut off at two deviations."""
    model, _ = build(settings_of(kind, emsize=40, nhid=40, tied=tied), 900)
    for weight in (model.encoder.weight, model.decoder.weight):
        assert weight.std().item() == pytest.approx(40**-0.5, rel=0.02)
        assert weight.mean().item() == pytest.approx(0, abs=5 * 40**-0.5 / weight.numel() ** 0.5)
        assert weight.abs().max().item() == pytest.approx(2 / 0.8796 * 40**-0.5, rel=0.01)
    assert not model.decoder.bias.any()


# What is built from settings


@pytest.mark.parametrize("kind", KINDS)
def test_build_follows_the_settings(kind):
    """Kind, sizes and dropouts of the model; the criterion is as wide as the decoder."""
    for tied in (True, False):
        args = settings_of(kind, emsize=8, nhid=10, nlayers=3, tied=tied, splits=[5, 12]) | dropouts_of(kind)
        args |= {"dropout": 0.1, "dropouth": 0.2, "dropouti": 0.3, "dropoute": 0.4}
        model, criterion = build(args, V)
        assert [type(layer) for layer in model.rnns] == [KINDS[kind]] * 3
        assert model.encoder.weight.shape == (V, 8)
        assert (model.drop_output.p, model.drop_between.p, model.drop_input.p, model.dropoute) == (0.1, 0.2, 0.3, 0.4)
        assert any(name.endswith("_raw") for name, _ in model.rnns.named_parameters()) == has_weight_drop(kind)
        assert criterion.splits == [5, 12]
        assert criterion.tail_vectors.shape == (2, 8 if tied else args["nhid"])
        assert criterion(model.decoder.weight, model.decoder.bias, output(model), words()).isfinite()


SETTINGS = settings_of("LSTM", emsize=8, nhid=10) | NO_DROPOUT


def test_build_splits_a_large_vocabulary():
    """Without splits in the settings the published ones for that many words; an empty list means none."""
    args = SETTINGS | {"emsize": 2, "nhid": 2, "splits": None}
    for ntoken in (75_000, 75_001, 80_000):
        assert build(args, ntoken)[1].splits == list(default_splits(ntoken))
    assert build(args | {"splits": []}, 80_000)[1].splits == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"splits": [5, V]}, rf"--splits \[5, {V}\]: .* below the vocabulary's size, {V}"),
        ({"splits": [V + 1]}, rf"--splits \[{V + 1}\]"),
        ({"splits": [12, 5]}, r"\[12, 5\]: have to ascend"),
        ({"model": "Elman"}, f"'Elman': use one of {', '.join(LAYERS)}"),
    ],
)
def test_settings_that_do_not_go_together_are_named(wrong, message):
    """ValueError: splits past the vocabulary or in disorder, a kind of layer that there is not."""
    with pytest.raises(ValueError, match=message):
        build(SETTINGS | wrong, V)
    build(SETTINGS | {"splits": [5, V - 1]}, V)


# Evaluation is the equations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("nlayers", "tied"), [(1, True), (3, False)])
def test_evaluation_is_the_reference(kind, nlayers, tied):
    """Nothing is dropped in evaluation: every layer's output is that of the float64 reference."""
    model = make(kind, nlayers=nlayers, tied=tied, **dropouts_of(kind)).eval()
    found, _, raw, dropped = model(words(), model.init_hidden(B), return_h=True)
    expected = reference.layers(kind, reference.arrays(model.state_dict()), words().numpy())
    assert len(raw) == len(dropped) == nlayers
    for layer in range(nlayers):
        for h in (raw[layer], dropped[layer]):
            np.testing.assert_allclose(h.detach().numpy(), expected[layer], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.detach().numpy(), expected[-1].reshape(T * B, -1), rtol=0, atol=2e-6)


def test_detach_cuts_the_graph_and_keeps_the_values():
    model = make().train()
    _, hidden = model(words(), model.init_hidden(B))
    assert all(t.requires_grad for layer in hidden for t in layer)
    for layer, cut in zip(hidden, detach(hidden), strict=True):
        for a, b in zip(layer, cut, strict=True):
            assert torch.equal(a, b)
            assert not b.requires_grad


# The other dropouts


def is_locked(ratio: Tensor, p: float) -> bool:
    """Whether ratio (T, B, ·) is one mask per sequence: the same at each step, 0 or 1/(1-p), not constant."""
    locked = torch.equal(ratio, ratio[:1].expand_as(ratio))
    values = ((ratio == 0) | ((ratio - 1 / (1 - p)).abs() < 1e-5)).all()
    differs = (ratio != ratio[:, :1]).any() and (ratio != ratio[..., :1]).any()
    return bool(locked and values and differs)


def test_locked_dropout_between_and_after_layers():
    """One mask per sequence, `dropouth` between the layers and `dropout` after the last."""
    model = make(nlayers=3, dropouth=0.5, dropout=0.75).train()
    found, _, raw, dropped = model(words(), model.init_hidden(B), return_h=True)
    for layer, p in enumerate([0.5, 0.5, 0.75]):
        ratio = (dropped[layer] / raw[layer]).round(decimals=4)
        assert is_locked(ratio, p), layer
    assert torch.equal(found, dropped[-1].view(T * B, -1))


@pytest.mark.parametrize(("name", "index"), [("dropouth", 0), ("dropout", 1)])
def test_each_dropout_has_its_own_place(name, index):
    """`dropouth` alone leaves the last output alone, `dropout` alone the layers before it."""
    model = make(nlayers=2, **{name: 0.5}).train()
    _, _, raw, dropped = model(words(), model.init_hidden(B), return_h=True)
    assert not torch.equal(raw[index], dropped[index])
    assert torch.equal(raw[1 - index], dropped[1 - index])


def first_input(model: RNNModel) -> Tensor:
    """What reaches the first layer, (T, B, E)."""
    seen = []
    hook = model.rnns[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    output(model)
    hook.remove()
    return seen[0]


def test_locked_dropout_on_the_embedding():
    """`dropouti` is one mask per sequence on what reaches the first layer."""
    model = make(dropouti=0.5).train()
    embedded = model.encoder.weight[words()].detach()
    assert is_locked((first_input(model) / embedded).round(decimals=4), 0.5)
    assert torch.equal(first_input(model.eval()), embedded)


def test_model_drops_word_types():
    """`dropoute` in the model drops whole types, and nothing in evaluation."""
    model = make(dropoute=0.5).train()
    embedded = model.encoder.weight[words()].detach()
    ratio = first_input(model) / embedded
    assert torch.equal(ratio, ratio[..., :1].expand_as(ratio))
    assert sorted(set(ratio.flatten().tolist())) == [0, 2]
    for word in words().unique():
        assert ratio[words() == word].unique().numel() == 1
    assert torch.equal(first_input(model.eval()), embedded)


def test_embedded_dropout_drops_whole_types():
    """Wherever a type stands in the batch: it is dropped as one, with probability p, or scaled by 1/(1-p)."""
    encoder = torch.nn.Embedding(5000, 3)
    many = torch.randint(0, 5000, (200, 60))
    ratio = (embedded_dropout(encoder, many, 0.2, True) / encoder(many)).detach()
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    kept = torch.full((5000,), torch.nan)
    kept[many] = ratio[..., 0]
    torch.testing.assert_close(ratio[..., 0], kept[many])
    kept = kept[~kept.isnan()]
    torch.testing.assert_close(kept[kept != 0], torch.full_like(kept[kept != 0], 1.25))
    assert (kept == 0).double().mean() == pytest.approx(0.2, abs=5 * (0.16 / len(kept)) ** 0.5)
    assert torch.equal(embedded_dropout(encoder, many, 0.2, False), encoder(many))
    again = embedded_dropout(encoder, many, 0.2, True) / encoder(many)
    assert not torch.equal(again, ratio)


def test_embedded_dropout_gradient():
    """A kept type's row gets its positions' gradients times 1/(1-p), a dropped or absent one none."""
    encoder = torch.nn.Embedding(V, 8)
    dropped = embedded_dropout(encoder, words(), 0.5, True)
    upstream = torch.randn(T, B, 8)
    dropped.backward(upstream)
    expected = torch.zeros(V, 8)
    kept = (dropped != 0).all(dim=2)
    for t in range(T):
        for b in range(B):
            expected[words()[t, b]] += 2 * upstream[t, b] * kept[t, b]
    assert kept.any()
    assert not kept.all()
    torch.testing.assert_close(encoder.weight.grad, expected)


def test_locked_dropout_is_that_of_pytorch_nlp():
    """Bit for bit, gradient and random generator included; it only leaves out the copy of its input."""
    found = []
    for kind in (LockedDropout, utils.LockedDropout):
        torch.manual_seed(3)
        x = torch.randn(5, 4, 7, requires_grad=True)
        out = kind(0.3).train()(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert LockedDropout(0.3).eval()(x) is x
