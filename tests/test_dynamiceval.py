"""Dynamic evaluation, against its formula written out in float64 on models written out in float64."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import WORDS, call, make_text, save_model, write_corpus

import dynamiceval
import pointer
from dynamiceval import MovingWeights, dynamic_loss, gradient_statistics, weights_of
from harness.files import load_model, to_evaluate

CPU = torch.device("cpu")
LR, LAMB, EPSILON = 1e-3, 0.02, 2e-5


def lstm(x: Tensor, carried: tuple, p: dict[str, Tensor]) -> tuple[Tensor, tuple]:
    h, c = carried
    out = []
    for x_t in x:
        gates = x_t @ p["weight_ih_l0"].T + p["bias_ih_l0"] + h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out), (h, c)


def qrnn(x: Tensor, carried: tuple, p: dict[str, Tensor]) -> tuple[Tensor, tuple]:
    c, before = carried
    out = []
    for x_t in x:
        two = p["linear.weight"].shape[1] == 2 * x.shape[2]
        z, f, o = (
            (torch.cat([x_t, before], 1) if two else x_t) @ p["linear.weight"].T + p["linear.bias"],
            None,
            None,
        )
        z, f, o = z.chunk(3, 1)
        c = f.sigmoid() * z.tanh() + (1 - f.sigmoid()) * c
        out.append(o.sigmoid() * c)
        before = x_t
    return torch.stack(out), (c, before)


class Slow:
    """The toy models of toys.py in float64: `losses(source, target, carried)`."""

    def __init__(self, saved: dict) -> None:
        self.kind = saved["args"]["model"]
        self.weights = {
            name: tensor.double().requires_grad_()
            for name, tensor in (saved["model"] | saved["criterion"]).items()
        }

    def first(self, columns: int) -> list[tuple]:
        zeros = torch.zeros(columns, 16, dtype=torch.float64), torch.zeros(columns, 12, dtype=torch.float64)
        if self.kind == "LSTM":
            return [(zeros[0], zeros[0]), (zeros[1], zeros[1])]
        return [(zeros[0], zeros[1]), (zeros[1], zeros[0])]

    def loss(self, source: Tensor, target: Tensor, carried: list[tuple]) -> tuple[Tensor, list[tuple]]:
        layer = lstm if self.kind == "LSTM" else qrnn
        x, after = self.weights["encoder.weight"][source], []
        for i, before in enumerate(carried):
            p = {
                name.removeprefix(f"rnns.{i}."): w
                for name, w in self.weights.items()
                if name.startswith(f"rnns.{i}.")
            }
            x, new = layer(x, tuple(part.detach() for part in before), p)
            after.append(new)
        logits = x @ self.weights["encoder.weight"].T + self.weights["decoder.bias"]
        return -logits.log_softmax(-1).gather(2, target[..., None]).mean(), after


def segments(ids: Tensor, bptt: int, columns: int):
    rows = len(ids) // columns
    text = ids[: rows * columns].view(columns, rows).T
    for start in range(0, rows - 1, bptt):
        end = min(start + bptt, rows - 1)
        yield text[start:end], text[start + 1 : end + 1]


def slow_statistics(slow: Slow, ids: Tensor, columns: int, bptt: int) -> dict[str, Tensor]:
    squares, count, carried = {name: 0 for name in slow.weights}, 0, slow.first(columns)
    for source, target in segments(ids, bptt, columns):
        if len(source) < bptt:
            break
        loss, carried = slow.loss(source, target, carried)
        gradients = torch.autograd.grad(loss, list(slow.weights.values()))
        for name, gradient in zip(slow.weights, gradients, strict=True):
            squares[name] = squares[name] + gradient**2
        count += 1
    return {name: (square / count).sqrt() for name, square in squares.items()}


def slow_dynamic_loss(slow: Slow, ms: dict[str, Tensor], ids: Tensor, bptt: int) -> float:
    mean = sum(x.mean() for x in ms.values()) / len(ms)
    start = {name: weight.detach().clone() for name, weight in slow.weights.items()}
    total, carried = 0.0, slow.first(1)
    for source, target in segments(ids, bptt, 1):
        loss, carried = slow.loss(source, target, carried)
        total += loss.item() * len(target)
        gradients = torch.autograd.grad(loss, list(slow.weights.values()))
        for (name, weight), gradient in zip(list(slow.weights.items()), gradients, strict=True):
            pull = (ms[name] / mean).clamp(max=1 / LAMB)
            moved = weight + LAMB * pull * (start[name] - weight) - LR * gradient / (ms[name] + EPSILON)
            slow.weights[name] = moved.detach().requires_grad_()
    return total / (len(ids) - 1)


@pytest.mark.parametrize("bptt", [5, 17])
@pytest.mark.parametrize("kind", ["LSTM", "QRNN"])
def test_it_is_the_formula(kind, bptt, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamiceval, "CHUNK", 100)  # several to a weight
    path = save_model(tmp_path / "m.pt", kind)
    train, text = make_text(700, seed=1), make_text(300, seed=2)
    saved = to_evaluate(load_model(str(path), "--save"), CPU)
    slow = Slow(load_model(str(path), "--save"))

    ms = gradient_statistics(saved, train, batch_size=8, bptt=bptt, max_batches=0)
    expected = slow_statistics(slow, train, 8, bptt)
    names = [name for name, _ in [*saved.model.named_parameters(), *saved.criterion.named_parameters()]]
    for name, found in zip(names, ms, strict=True):
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-4, atol=1e-7)

    before = [weight.clone() for weight in weights_of(saved)]
    moving = MovingWeights(weights_of(saved), ms, LR, LAMB, EPSILON)
    loss, count = dynamic_loss(saved, moving, text, bptt)
    assert count == len(text) - 1
    assert loss == pytest.approx(slow_dynamic_loss(slow, expected, text, bptt), rel=1e-5)
    assert all(torch.equal(*pair) for pair in zip(before, weights_of(saved), strict=True))  # put back


def test_weights_that_never_move_give_the_plain_loss_and_the_pointers(tmp_path):
    saved = to_evaluate(load_model(str(save_model(tmp_path / "m.pt")), "--save"), CPU)
    text, still = make_text(300), [torch.ones_like(weight) for weight in weights_of(saved)]
    moving = MovingWeights(weights_of(saved), still, 0.0, 0.0, EPSILON)
    for settings in ((1.0, 0.0, 10), (0.7, 0.3, 50)):
        loss, _ = dynamic_loss(saved, moving, text, 5, settings)
        expected = pointer.pointer_loss(saved.model, saved.criterion, text, 1000, *([x] for x in settings))
        assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert dynamic_loss(saved, moving, text, 5)[0] == pytest.approx(
        pointer.pointer_loss(saved.model, saved.criterion, text, 1000, [1.0], [0.0], [1]).item(), rel=1e-6
    )


def test_the_pointer_leaves_the_weights_way_as_it_is(tmp_path):
    """They move by the model's own loss: with a share of 0 the figure is the plain one, weights moving."""
    saved = to_evaluate(load_model(str(save_model(tmp_path / "m.pt")), "--save"), CPU)
    ms = gradient_statistics(saved, make_text(700, seed=1), batch_size=8, bptt=5, max_batches=0)
    moving, text = MovingWeights(weights_of(saved), ms, LR, LAMB, EPSILON), make_text(300, seed=2)
    plain, _ = dynamic_loss(saved, moving, text, 5)
    assert dynamic_loss(saved, moving, text, 5, (1.0, 0.0, 10))[0] == pytest.approx(plain, rel=1e-5)
    still = MovingWeights(weights_of(saved), ms, 0.0, 0.0, EPSILON)
    assert abs(dynamic_loss(saved, still, text, 5)[0] - plain) > 0.01, "they have to move"


@pytest.fixture
def ready(tmp_path: Path) -> tuple[Path, Path]:
    return write_corpus(tmp_path / "corpus"), save_model(tmp_path / "m.pt")


def run(capsys: pytest.CaptureFixture, corpus: Path, save: Path, *flags: object) -> tuple[int, str, str]:
    status = call(dynamiceval, "--data", corpus, "--save", save, "--batch_size", 8, "--device", "cpu", *flags)
    return status, *capsys.readouterr()


KINDS = [
    *({"rnn_type": kind} for kind in ("LSTM", "QRNN", "GRU", "Mogrifier")),
    {"splits": (10, 30)},
    {"n_experts": 3},
]


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_every_model_is_evaluated_and_left_as_it_was(how, tmp_path, capsys):
    corpus, save = write_corpus(tmp_path / "corpus"), save_model(tmp_path / "m.pt", **how)
    before = save.read_bytes()
    status, out, _ = run(capsys, corpus, save)
    assert status == 0
    assert "| End of dynamic evaluation | val loss" in out
    assert "| End of dynamic evaluation | test loss" in out
    assert save.read_bytes() == before
    entries = [json.loads(line) for line in Path(f"{save}.log.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["split"], e["partial"]) for e in entries] == [
        ("dynamic evaluation", "val", False),
        ("dynamic evaluation", "test", False),
    ]


@pytest.mark.parametrize(
    ("kind", "published"), [("LSTM", (5e-5, 0.002, 5)), ("GRU", (5e-5, 0.002, 5)), ("QRNN", (1.2e-4, 0.02, 20))]
)
def test_what_is_not_given_is_as_published(kind, published, tmp_path, capsys):
    corpus, save = write_corpus(tmp_path / "corpus"), save_model(tmp_path / "m.pt", kind)
    assert run(capsys, corpus, save)[0] == 0
    entry = json.loads(Path(f"{save}.log.jsonl").read_text().splitlines()[0])
    assert (entry["lr"], entry["lamb"], entry["bptt"]) == published


def test_a_bad_flag_is_one_line_and_status_2(ready, capsys):
    for flag, value in (("--epsilon", 0), ("--lr", -1), ("--lamb", "nan"), ("--bptt", 0)):
        status, _, err = run(capsys, *ready, flag, value)
        assert (status, err.count("\n")) == (2, 1)
        assert flag in err


def test_statistics_are_kept_and_taken_again_when_something_has_changed(ready, capsys, monkeypatch):
    corpus, save = ready
    taken = []
    monkeypatch.setattr(
        dynamiceval, "gradient_statistics", lambda *args: taken.append(1) or gradient_statistics(*args)
    )
    first = run(capsys, corpus, save)
    assert run(capsys, corpus, save) == first
    assert len(taken) == 1
    run(capsys, corpus, save, "--bptt", 7)
    assert len(taken) == 2
    Path(f"{save}.stats").write_bytes(b"damaged")
    assert run(capsys, corpus, save) == first
    assert len(taken) == 3
    save_model(save, vocab=WORDS[::-1])
    run(capsys, corpus, save)
    text = (corpus / "train.txt").read_text().splitlines()
    (corpus / "train.txt").write_text("\n".join(text[::-1]) + "\n")
    run(capsys, corpus, save)
    assert len(taken) == 5
    saved = torch.load(save, weights_only=True)
    saved["model"]["decoder.bias"] += 1
    torch.save(saved, save)
    for count, more in enumerate(([], ["--max_batches", 2], ["--batch_size", 9]), start=6):
        run(capsys, corpus, save, *more)
        assert len(taken) == count


def test_max_batches_is_so_many_segments(ready):
    saved, text = to_evaluate(load_model(str(ready[1]), "--save"), CPU), make_text(400, seed=1)
    some = gradient_statistics(saved, text, batch_size=4, bptt=5, max_batches=2)
    of_two = gradient_statistics(saved, text.view(4, 100)[:, :11].flatten(), batch_size=4, bptt=5, max_batches=0)
    assert all(torch.equal(*pair) for pair in zip(some, of_two, strict=True))


def test_decay_and_rate_are_those_of_the_paper():
    """D = min(MS / M, 1 / λ), the largest weight's at its bound; the rate over MS + ε."""
    moving = MovingWeights([torch.zeros(3)], [torch.tensor([0.0, 1.0, 8.0])], 0.1, 0.5, 1.0)  # M = 3
    torch.testing.assert_close(moving.decay[0], torch.tensor([0, 1 / 6, 1]))
    torch.testing.assert_close(moving.rate[0], torch.tensor([0.1, 0.05, 0.1 / 9]))


def test_search_tells_the_best_and_an_edge(ready, capsys):
    corpus, save = ready
    flags = [
        "--search",
        "--search_tokens",
        60,
        "--search_lrs",
        1e-4,
        1e-3,
        "--search_lambs",
        0.001,
        0.01,
        "--bptt",
        10,
    ]
    status, out, _ = run(capsys, corpus, save, *flags)
    assert status == 0
    assert "| best on val: --lr " in out
    assert "lies on the edge of what was tried" in out
    assert "0.0002" in out  # times bptt / 5


def test_search_goes_on_with_the_best_on_validation(ready, capsys):
    """All of the text: the table's smallest figure is the one that follows, and its settings give it again."""
    grid = ["--search_lrs", 1e-4, 1e-3, "--search_lambs", 0.001, 0.01, "--bptt", 10]
    _, out, _ = run(capsys, *ready, "--search", "--search_tokens", 10**6, *grid)
    rows = re.findall(r"(?m)^\| +[\d.e-]+ \|((?: +[\d.]+)+)$", out)
    cells = [float(cell) for row in rows for cell in row.split()]
    assert len(set(cells)) == 4
    assert min(cells) == float(re.search(r"val ppl +([\d.]+)$", out, re.MULTILINE)[1])
    assert re.search(r"\| +lr \| +0.002 +0.02\n", out), "times bptt / 5"
    best = re.search("best on val: (.*)", out)[1].split()
    _, again, _ = run(capsys, *ready, *best, "--bptt", 10)
    assert [line for line in again.splitlines() if "End" in line] == [x for x in out.splitlines() if "End" in x]


def test_the_pointers_settings_reach_it(ready, capsys):
    """And its figure is another one, in the log with them."""
    flags = ["--pointer", "--theta", 0.7, "--lambdasm", 0.3, "--window", 50]
    losses = []
    for more in ([], flags):
        assert run(capsys, *ready, *more)[0] == 0
        entry = json.loads(Path(f"{ready[1]}.log.jsonl").read_text().splitlines()[-1])
        losses.append(entry["loss"])
    assert entry["pointer"] == [0.7, 0.3, 50]
    assert losses[0] != losses[1]


def test_ctrl_c_ends_with_the_figures_so_far(ready, capsys, monkeypatch):
    corpus, save = ready
    steps, update = [], MovingWeights.update

    def interrupted(self, gradients):
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        update(self, gradients)

    monkeypatch.setattr(MovingWeights, "update", interrupted)
    status, out, _ = run(capsys, corpus, save)
    assert status == 130
    assert "| Part of dynamic evaluation, 45 of " in out
    assert "End of dynamic evaluation" not in out
