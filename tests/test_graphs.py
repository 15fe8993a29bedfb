"""Training steps by graphs are the steps without them, for every kind of layer: by CUDA's graphs where there is a GPU,
else by an emulated graph.
"""

import contextlib
import importlib
from argparse import Namespace
from functools import partial

import pytest
import torch
from graph_emulator import CaptureError, EmulatedCapture, EmulatedGraph
from torch import Tensor
from toys import KINDS, settings_of

import splitcross
import train
from data import Corpus
from harness.flags import resolve_args
from harness.graphs import StepGraphs, fits_graphs
from optim import OPTIMIZERS
from train import Run, gradient_step, train_step

V, BPTT, COLUMNS = 40, 7, 4


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """The loss in one piece; torch's LSTM without oneDNN, whose workspace no operation shows."""
    monkeypatch.setattr(splitcross, "blocked_cross_entropy", splitcross.linear_cross_entropy)
    monkeypatch.setattr(splitcross, "is_one", lambda grad: False)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


def make_run(kind: str, by_graphs: bool, device: str = "cpu", **settings: object) -> Run:
    """A run on a small text, with all dropouts on; the same for the same settings. On a CPU the graph is emulated."""
    ids = torch.randint(0, V, (4000,), generator=torch.Generator().manual_seed(1))
    corpus = Corpus([f"w{i}" for i in range(V)], ids, ids[:500], ids[:300], "a digest")
    given = {"batch_size": COLUMNS, "bptt": BPTT, "nonmono": 0, "clip": 0.25, "lr": 5.0, "save": "none.pt"}
    given |= {"splits": [], "graphs": by_graphs}
    given |= settings_of(kind) | {"dropoutr": 0.1 if "dropoutr" in KINDS[kind].options else 0.0}
    where = torch.device(device)
    run = Run("main.py", resolve_args(given | settings, {}), corpus.to(where), where)
    if by_graphs and device == "cpu":

        def changed() -> list[Tensor]:
            moments = [value for state in run.optimizer.state.values() for value in state.values()]
            hidden = [tensor for carried in run.graphs.hidden for tensor in carried]
            return [*run.parameters, *moments, *hidden, run.graphs.grad_norm]

        run.graphs = StepGraphs(partial(gradient_step, run), run.optimizer, run.device, EmulatedCapture(changed))
    return run


def numbers_of(run: Run, steps: int) -> list[Tensor]:
    """Loss, gradient norm and all weights after each of so many steps, over as many epochs as they take."""
    torch.manual_seed(5)
    found = []
    with run.graphs.capture.on_stream() if run.graphs else contextlib.nullcontext():
        while len(found) < steps:
            run.start_epoch()
            for source, target in train.train_batches(run):
                loss = train_step(run, source, target)
                run.count_step(loss, len(source))
                weights = [parameter.detach().flatten() for parameter in run.parameters]
                weights += [p.flatten() for p in run.mean.weights.parameters()] if run.mean else []
                found.append(torch.cat([loss[None], run.grad_norm[None], *weights]).cpu())
                if len(found) == 20:
                    run.start_averaging()
                    run.at.lr /= 10
                if len(found) >= steps:
                    break
            run.at.epoch += 1
            run.at.restart_epoch()
    generator = torch.cuda.get_rng_state() if run.device.type == "cuda" else torch.get_rng_state()
    return [*found, generator, run.length_generator.get_state()]


SETTINGS = {
    "plain": {},
    "mixture": {"n_experts": 2, "dropoutl": 0.2},
    "samples": {"samples": 2, "shuffle": True},
    "drop_state": {"drop_state": 0.3, "alpha": 0.0, "beta": 0.0},
}
CASES = [*((kind, "plain") for kind in KINDS), *(("QRNN", name) for name in SETTINGS if name != "plain")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_steps_by_graphs_are_the_steps(kind, name):
    """Over batches of many lengths, two epochs, a lower rate and averaging: the same to the rate's rounding."""
    settings = {"nlayers": 2, **SETTINGS[name]}
    eager, run = make_run(kind, False, **settings), make_run(kind, True, **settings)
    steps = len(list(train.train_batches(eager))) + 20
    eager = make_run(kind, False, **settings)
    expected, found = numbers_of(eager, steps), numbers_of(run, steps)
    assert len(run.graphs.graphs) > 5
    assert len(run.graphs.seen) > len(run.graphs.graphs), "else no length came once"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert all(isinstance(group["lr"], float) for group in run.optimizer.param_groups)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_graphs_of_a_gpu_are_the_steps(kind, name, optimizer, amp):
    """To rounding, because some sums come in any order there; the generator moves on by as much."""
    settings = {"nlayers": 2, "optimizer": optimizer, "amp": amp, "padded": True, **SETTINGS[name]}
    settings |= {"lr": 0.5 if optimizer == "sgd" else 2e-3}
    eager, run = (make_run(kind, by_graphs, "cuda", **settings) for by_graphs in (False, True))
    expected, found = numbers_of(eager, 80), numbers_of(run, 80)
    assert len(run.graphs.graphs) > 5
    assert all(torch.equal(a, b) for a, b in zip(found[-2:], expected[-2:], strict=True))  # the generators
    for a, b in zip(found[:-2], expected[:-2], strict=True):
        assert (a - b).double().norm() <= (1e-3 if amp == "none" else 3e-2) * b.double().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_adam_by_graphs(kind):
    settings = {"nlayers": 2, "optimizer": "adam", "lr": 2e-3}
    expected = numbers_of(make_run(kind, False, **settings), 40)
    found = numbers_of(make_run(kind, True, **settings), 40)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_radam_by_graphs(monkeypatch):
    """As on a GPU its step waits for no value: torch allows that on GPUs only, so its check is told otherwise."""
    module = importlib.import_module("torch.optim.radam")
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    runs = [make_run("QRNN", by_graphs, optimizer="radam", lr=2e-3) for by_graphs in (False, True)]
    for run in runs:
        assert [group["capturable"] for group in run.optimizer.param_groups] == [False]
        run.optimizer.param_groups[0]["capturable"] = True
    expected, found = (numbers_of(run, 40) for run in runs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert runs[1].optimizer.param_groups[0]["capturable"], "else the next length could not be captured"


def test_a_rate_that_a_float_holds_gives_the_same_bits():
    """SGD differs by nothing but the rate's rounding to float32."""
    settings = {"lr": 0.5, "bptt": 8, "max_seq_len": 8}  # rates of 0.5 · length / 8
    expected = numbers_of(make_run("QRNN", False, **settings), 19)
    found = numbers_of(make_run("QRNN", True, **settings), 19)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_value_that_the_host_reads_is_an_error_while_capturing():
    """So is the blocked loss of the CPU, and a choice by a mask."""
    with pytest.raises(CaptureError, match="_local_scalar_dense"):
        EmulatedGraph(lambda: torch.ones(3).sum().item())
    with pytest.raises(CaptureError, match="index"):
        EmulatedGraph(lambda: torch.ones(3)[torch.ones(3) > 0])
    criterion = splitcross.SplitCrossEntropyLoss(4, [3])
    weight, hiddens = torch.randn(9, 4), torch.randn(5, 4)
    with pytest.raises(CaptureError, match="nonzero"):
        EmulatedGraph(lambda: criterion(weight, None, hiddens, torch.arange(5)))


def test_a_rate_that_is_a_number_would_be_frozen():
    """The emulator shows it: a graph repeats the number of its capture."""
    total, rate = torch.zeros(()), 1.0
    graph = EmulatedGraph(lambda: total.add_(torch.ones(()), alpha=rate))
    rate = 5.0
    graph.replay()
    assert total == 2


@pytest.mark.parametrize(
    ("device", "ranks", "scales_loss", "flags", "fits"),
    [
        ("cuda", 1, False, {}, True),
        ("cuda", 1, False, {"graphs": False}, False),
        ("cpu", 1, False, {}, False),
        ("cuda", 2, False, {}, False),
        ("cuda", 1, True, {}, False),  # fp16
        ("cuda", 1, False, {"splits": [3]}, False),
    ],
)
def test_graphs_are_for_one_process_on_a_gpu_without_fp16_and_splits(device, ranks, scales_loss, flags, fits):
    """Elsewhere --graphs changes nothing."""
    args = Namespace(**{"graphs": True, "splits": []} | flags)
    assert bool(fits_graphs(args, torch.device(device), ranks, scales_loss)) == fits
    assert make_run("LSTM", False, graphs=True).graphs is None
