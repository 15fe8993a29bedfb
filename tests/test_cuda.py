"""On an NVIDIA GPU every kind of model and of output layer gives what it gives on the CPU; the scripts run there.

    python -m pytest -m cuda -n 0 tests/test_cuda.py

The QRNN's kernels have tests of their own, in test_qrnn_cuda.py.
"""

import contextlib
import math
from functools import partial

import pytest
import torch
from conftest import SMALL, load, read_log
from torch import Tensor, nn
from toys import KINDS, MODELS, call, flags_of, make_model, make_text

import dynamiceval
import finetune
import generate
import main
import pointer
import score
from model import detach
from mos import sampled

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
GPU = "cuda"
FLAGS = {  # of toys.MODELS, and of what else has code of its own on a GPU
    **{kind: flags_of(kind) for kind in KINDS},
    **{"split softmax": ["--splits", 10, 30], "mixture": ["--n_experts", 3]},
    **{"samples": ["--samples", 2], "Adam": ["--optimizer", "adam", "--average", "--lr", 1e-2]},
    **{"RAdam": ["--optimizer", "radam", "--average", "two-tailed", "--lr", 1e-2]},
}
ON_GPU = [*SMALL, "--device", GPU]
# relative errors of losses and gradients; torch multiplies float32 matrices in TF32 inside cuDNN's layers
PRECISIONS = {"float64": 1e-10, "float32": 1e-2, "bf16": 1e-1, "fp16": 2e-2}


def learn(name: str, samples: int, device: str, precision: str = "float64") -> list[Tensor]:
    """The losses of two segments, the second going on where the first ends, and the sums of their gradients."""
    _, model, criterion = make_model(**MODELS[name])
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    parts = nn.ModuleDict({"model": model, "criterion": criterion}).train()
    parts.to(device, torch.float64 if precision == "float64" else torch.float32)
    loss = sampled(criterion, samples) if samples > 1 else criterion
    text = make_text(8 * 5).view(5, 8).T.to(device)  # (8, 5)
    hidden, losses = model.init_hidden(5 * samples), []
    for first, last in ((0, 4), (4, 7)):
        source, target = text[first:last], text[first + 1 : last + 1]
        with torch.autocast(device, dtype=amp, enabled=amp is not None):
            hiddens, hidden = model(source.repeat_interleave(samples, dim=1), detach(hidden))
            losses.append(loss(model.decoder.weight, model.decoder.bias, hiddens, target))
        losses[-1].backward()
    return [x.detach().cpu().double() for x in (*losses, *(parameter.grad for parameter in parts.parameters()))]


@pytest.mark.parametrize(("name", "samples"), [*((name, 1) for name in MODELS), ("LSTM", 2)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_loss_and_gradients_are_those_of_the_cpu(name, samples, precision):
    """Every kind of layer and every kind of output layer, nothing dropped."""
    ours, theirs = learn(name, samples, GPU, precision), learn(name, samples, "cpu")
    for x, expected in zip(ours, theirs, strict=True):
        assert (x - expected).norm() <= PRECISIONS[precision] * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_run_goes_on_where_it_was_stopped(kind, amp, corpus, tmp_path, monkeypatch, recwarn):
    """The generators, too, are resumed; to rounding, because some sums on a GPU come in any order. cuDNN has its
    weights in one piece: no warning says that they are copied at each call."""
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS[kind], *(["--dropoutr", 0.1] if "dropoutr" in KINDS[kind].options else [])]
    run = partial(call, main, "--data", corpus, *ON_GPU, *flags, "--amp", amp, "--epochs", 1)
    assert run("--save", "whole.pt") == 0
    assert run("--save", "m.pt", "--max_steps", 5) == 0
    assert call(main, "--resume", "m.pt", "--max_steps", 0) == 0
    found, expected = (load(f"{name}.pt.state") for name in ("m", "whole"))
    for name, tensor in expected["weights"].items():
        assert (found["weights"][name] - tensor).norm() <= 1e-2 * tensor.norm(), name
    assert found["scaler"] == expected["scaler"]
    assert not [warning for warning in recwarn if "contiguous" in str(warning.message)]


@pytest.mark.parametrize("name", MODELS)
def test_evaluations_on_the_gpu_are_those_on_the_cpu(name, corpus, tmp_path, monkeypatch, capsys):
    """Trained and fine-tuned there; then pointer, dynamic evaluation, both, and scores on either device."""
    monkeypatch.chdir(tmp_path)
    assert call(main, "--data", corpus, *ON_GPU, *FLAGS[name], "--epochs", 2, "--save", "m.pt") == 0
    assert call(finetune, "--save", "m.pt", "--epochs", 1, "--device", GPU) == 0
    (tmp_path / "lines.txt").write_text("w1 w2 w3\nw4 w5\n")
    losses, rows = [], []
    for device in ("cpu", GPU):
        (tmp_path / "m.pt.stats").unlink(missing_ok=True)
        before, what = len(read_log(tmp_path / "m.pt.log.jsonl")), ("--save", "m.pt", "--device", device)
        assert call(pointer, *what, "--lambdasm", 0) == 0
        assert call(pointer, *what) == 0
        assert call(dynamiceval, *what) == 0
        assert call(dynamiceval, *what, "--pointer") == 0
        losses.append([record["loss"] for record in read_log(tmp_path / "m.pt.log.jsonl")[before:]])
        assert call(generate, *what, "--prompt", "w1 w2", "--words", 5) == 0
        capsys.readouterr()
        assert call(score, *what, "lines.txt") == 0
        rows.append(numbers(capsys.readouterr().out))
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert len(rows[0]) >= 4
    assert rows[1] == pytest.approx(rows[0], rel=5e-3)


def numbers(table: str) -> list[float]:
    """All that is a number in it."""
    found = []
    for word in table.split():
        with contextlib.suppress(ValueError):
            found.append(float(word))
    return found


@pytest.mark.parametrize("name", ["LSTM", "split softmax", "mixture", "samples", "Adam", "RAdam"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_every_setting_trains(name, amp, corpus, tmp_path, monkeypatch):
    """Two epochs, and the model has learnt something: its loss lies below that of 41 words with equal odds."""
    monkeypatch.chdir(tmp_path)
    given = ["--data", corpus, *ON_GPU, "--lr", 2, *FLAGS[name], "--amp", amp, "--epochs", 2]
    assert call(main, *given, "--save", "m.pt") == 0
    assert load("m.pt")["metrics"]["valid_loss"] < math.log(41) - 0.2


def test_a_stop_loses_no_loss(corpus, tmp_path, monkeypatch):
    """Seven steps at an interval of five, whose losses are still on the device: the state holds the last two."""
    monkeypatch.chdir(tmp_path)
    assert call(main, "--data", corpus, *ON_GPU, "--save", "m.pt", "--max_steps", 7) == 0
    assert load("m.pt.state")["at"]["loss_count"] == 2
