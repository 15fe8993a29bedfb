"""Products by either library are the products, with their gradients; processor and shape say whose are taken."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import KINDS, make_layer

import products
from layers.qrnn import QRNN
from products import FEW_ROWS, add_product, linear, over_steps, product, use_onednn
from splitcross import SplitCrossEntropyLoss

N, K, M = 37, 19, 23


@pytest.fixture(params=["torch.mm", "oneDNN", "by shape"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice in turn, on any processor; here no shape is too small."""
    take(request.param, monkeypatch)


def take(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if choice != "torch.mm" and not products.has_onednn():
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(products, "preferred_library", lambda: choice)
    monkeypatch.setattr(products, "LARGE", 0)


def factors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b, bias = (torch.randn(size, generator=generator) for size in ((N, K), (K, M), (M,)))
    return a, b, bias


def same(found: Tensor, expected: Tensor) -> None:
    """To float32's rounding, against float64."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_the_product(library, transposed):
    """Also of transposed views, with a bias, and into memory that is there."""
    a, b, bias = factors()
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    expected = a.double() @ b.double()
    same(product(a, b), expected)
    same(product(a, b, bias), expected + bias.double())
    same(product(a, b, bias, out=torch.empty(N, M)), expected + bias.double())


def test_products_are_added_up(library):
    a, b, _ = factors()
    total = torch.full((N, M), torch.nan)
    add_product(total, a, b, first=True)
    same(total, a.double() @ b.double())
    add_product(total, a, b)
    same(total, 2 * (a.double() @ b.double()))


def test_products_in_half_precision_add_up_in_the_totals_own(library):
    """1,000 times 2^-9 to 1: in bfloat16 the sum would stay 1."""
    total, one, small = torch.ones(1, 1), torch.ones(1, 1).bfloat16(), torch.full((1, 1), 2.0**-9).bfloat16()
    for _ in range(1000):
        add_product(total, one, small)
    assert total.item() == 1 + 1000 * 2.0**-9


@pytest.mark.parametrize(("T", "B"), [(1, 1), (5, 1), (FEW_ROWS, 1), (FEW_ROWS, 2)])
def test_the_gradient_of_a_weight_is_the_sum_over_all_steps(library, T, B):
    d, x = torch.randn(T, B, 30), torch.randn(T, B, 20)
    wanted = torch.einsum("tbn,tbm->nm", d.double(), x.double())
    same(over_steps(d, x), wanted)
    torch.testing.assert_close(over_steps(d.double(), x.double()), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [(N,), (5, 7)])
def test_linear_and_its_gradients_are_those_of_float64(library, rows, with_bias):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias, dy = (torch.randn(size, generator=generator) for size in ((*rows, K), (M, K), (M,), (*rows, M)))
    given = [x, weight, bias] if with_bias else [x, weight]
    exact = [tensor.double().requires_grad_() for tensor in given]
    expected = F.linear(*exact)
    given = [tensor.requires_grad_() for tensor in given]
    found = linear(*given) if with_bias else linear(*given, None)
    same(found, expected)
    gradients = torch.autograd.grad(expected, exact, dy.double())
    for gradient, wanted in zip(torch.autograd.grad(found, given, dy), gradients, strict=True):
        same(gradient, wanted)


def test_under_autocast_linear_is_torchs_own(library):
    """With --amp bf16 the factors are halved, as autocast promises."""
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_the_softmax_never_multiplies_in_float16():
    """A gradient divided by the number of positions would vanish in it."""
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with torch.autocast("cpu", dtype):
            assert products.exact_or_bf16(torch.ones(2)) == expected


def test_other_dtypes_are_torchs_own(library):
    """Float64, as the gradients are checked in, is not touched by the choice."""
    x, weight, bias = (tensor.double() for tensor in factors())
    assert torch.equal(product(x, weight, bias), torch.addmm(bias, x, weight))
    assert torch.equal(linear(x, weight.T, bias), F.linear(x, weight.T, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_and_its_gradients_are_those_of_float64(library, kind):
    """In float32, for one column and for several: layers call `product` in their loops over time."""
    layer = make_layer(kind, K, 12, first=True).float()
    for columns in (1, 5):
        x, d_out, found = torch.randn(6, columns, K), torch.randn(6, columns, 12), []
        for module in (layer, deepcopy(layer).double()):
            dtype = next(module.parameters()).dtype
            given = x.to(dtype).requires_grad_()
            out, _ = module(given, module.init_hidden(columns))
            found.append([out, *torch.autograd.grad(out, [given, *module.parameters()], d_out.to(dtype))])
        for value, exact in zip(*found, strict=True):
            same(value, exact)


def test_a_qrnn_and_a_loss_are_the_same_by_both(monkeypatch):
    """Losses and gradients of a layer and an output layer agree to rounding."""
    torch.manual_seed(0)
    layer, criterion = QRNN(K, 12, first=True), SplitCrossEntropyLoss(12, [4, 9])
    decoder, x, targets = torch.randn(20, 12), torch.randn(6, 5, K), torch.randint(20, (30,))
    decoder.requires_grad_()
    found = []
    for choice in ("torch.mm", "oneDNN", "by shape"):
        take(choice, monkeypatch)
        out, _ = layer(x, layer.init_hidden(5))
        loss = criterion(decoder, None, out, targets)
        weights = [decoder, *layer.parameters(), *criterion.parameters()]
        found.append([loss, *torch.autograd.grad(loss, weights)])
    for others in zip(*found, strict=True):
        for other in others[1:]:
            torch.testing.assert_close(other, others[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("vendor", "capability", "onednn", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, "oneDNN"),
        ("AuthenticAMD", "AVX2", True, "by shape"),
        ("AuthenticAMD", "AVX512", False, "torch.mm"),
        ("GenuineIntel", "AVX512", True, "torch.mm"),
        (None, "AVX512", True, "torch.mm"),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, vendor, capability, onednn, expected):
    """oneDNN on AMD with AVX-512, where MKL stays with AVX2; with AVX2 alone the shape has its say."""
    if vendor:  # else no Linux
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "has_onednn", lambda: onednn)
    assert products.preferred_library.__wrapped__() == expected


@pytest.mark.parametrize(
    ("shape", "transposed", "expected"),
    [
        ((1550, 4650), False, True),  # rows of the result that end within a vector of 8
        ((800, 4648), False, False),
        ((800, 4648), True, True),  # the weight of a forward pass
        ((200, 400), True, False),  # too small
        ((200, 401), False, False),
    ],
)
def test_the_shape_decides_on_amd_with_avx2(monkeypatch, shape, transposed, expected):
    monkeypatch.setattr(products, "preferred_library", lambda: "by shape")
    b = torch.empty(shape[::-1]).T if transposed else torch.empty(shape)
    a = torch.empty(2, shape[0])
    assert use_onednn(a, b) is expected
    assert not use_onednn(a.double(), b.double())
    for choice in ("torch.mm", "oneDNN"):
        monkeypatch.setattr(products, "preferred_library", lambda choice=choice: choice)
        assert use_onednn(a, b) is (choice == "oneDNN")
