"""Dynamic evaluation, against its formula written out in float64."""

import re
from pathlib import Path

import pytest
import torch
from conftest import load, read_log, write_corpus
from torch import Tensor
from toys import WORDS, SlowDynamics, call, double_model, dynamic_loss, every_model, make_text, mean_loss, save_model

import dynamiceval
import pointer
from dynamiceval import MovingWeights, gradient_statistics, weights_of
from harness.files import load_model, to_evaluate

CPU = torch.device("cpu")
LR, LAMB, EPSILON = 1e-3, 0.02, 2e-5
TOKENS = 400, 300, 300  # of the three texts


def slow_dynamic_loss(slow: SlowDynamics, ids: Tensor, bptt: int) -> float:
    total, hidden, text = 0.0, slow.parts[0].init_hidden(1), ids[:, None]
    for start in range(0, len(ids) - 1, bptt):
        end = min(start + bptt, len(ids) - 1)
        loss, hidden = mean_loss(*slow.parts, text[start:end], text[start + 1 : end + 1], hidden)
        total += loss.item() * (end - start)
        slow.move(loss)
    return total / (len(ids) - 1)


@every_model
def test_it_is_the_formula(how, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamiceval, "CHUNK", 100)  # several to a weight
    train, text = make_text(700, seed=1), make_text(300, seed=2)
    saved = to_evaluate(load_model(str(save_model(tmp_path / "m.pt", **how)), "--save"), CPU)
    for bptt in (5, 17):
        slow = SlowDynamics(*double_model(**how), LR, LAMB, EPSILON)
        ms = gradient_statistics(saved, train, batch_size=8, bptt=bptt, max_batches=0)
        for found, expected in zip(ms, slow.take_statistics(train, 8, bptt), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)

        before = [weight.clone() for weight in weights_of(saved)]
        moving = MovingWeights(weights_of(saved), ms, LR, LAMB, EPSILON)
        loss, count = dynamic_loss(saved, moving, text, bptt)
        assert count == len(text) - 1
        assert loss == pytest.approx(slow_dynamic_loss(slow, text, bptt), rel=1e-5)
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
    return write_corpus(tmp_path / "corpus", TOKENS), save_model(tmp_path / "m.pt")


def run(capsys: pytest.CaptureFixture, corpus: Path, save: Path, *flags: object) -> tuple[int, str, str]:
    status = call(dynamiceval, "--data", corpus, "--save", save, "--batch_size", 8, "--device", "cpu", *flags)
    return status, *capsys.readouterr()


@every_model
def test_every_model_is_evaluated_and_left_as_it_was(how, tmp_path, capsys):
    corpus, save = write_corpus(tmp_path / "corpus", TOKENS), save_model(tmp_path / "m.pt", **how)
    before = save.read_bytes()
    status, out, _ = run(capsys, corpus, save)
    assert status == 0
    assert "| End of dynamic evaluation | val loss" in out
    assert "| End of dynamic evaluation | test loss" in out
    assert save.read_bytes() == before
    entries = read_log(Path(f"{save}.log.jsonl"))
    assert [(e["kind"], e["split"], e["partial"]) for e in entries] == [
        ("dynamic evaluation", "val", False),
        ("dynamic evaluation", "test", False),
    ]


@pytest.mark.parametrize(
    ("kind", "published"), [("LSTM", (5e-5, 0.002, 5)), ("GRU", (5e-5, 0.002, 5)), ("QRNN", (1.2e-4, 0.02, 20))]
)
def test_what_is_not_given_is_as_published(kind, published, tmp_path, capsys):
    corpus, save = write_corpus(tmp_path / "corpus", TOKENS), save_model(tmp_path / "m.pt", rnn_type=kind)
    assert run(capsys, corpus, save)[0] == 0
    entry = read_log(Path(f"{save}.log.jsonl"))[0]
    assert (entry["lr"], entry["lamb"], entry["bptt"]) == published


def test_a_bad_flag_is_one_line_and_status_2(ready, capsys):
    for flag, value in (("--epsilon", 0), ("--lr", -1), ("--lamb", "nan"), ("--bptt", 0)):
        status, _, err = run(capsys, *ready, flag, value)
        assert (status, err.count("\n")) == (2, 1)
        assert flag in err


def test_statistics_are_kept_and_taken_again_when_something_has_changed(ready, capsys, monkeypatch):
    corpus, save = ready
    taken = []
    monkeypatch.setattr(dynamiceval, "gradient_statistics", lambda *args: taken.append(1) or gradient_statistics(*args))
    first = run(capsys, corpus, save)
    assert run(capsys, corpus, save) == first
    assert len(taken) == 1
    run(capsys, corpus, save, "--bptt", 7)
    assert len(taken) == 2
    path = Path(f"{save}.stats")
    whole = load(path)
    for odd in ({"ms": whole["ms"][:-1]}, {"ms": [1.0] * len(whole["ms"])}, {"how": torch.zeros(2)}):
        torch.save({**whole, **odd}, path)
        run(capsys, corpus, save, "--bptt", 7)
    assert len(taken) == 5
    path.write_bytes(b"damaged")
    assert run(capsys, corpus, save) == first
    assert len(taken) == 6
    save_model(save, vocab=WORDS[::-1])
    run(capsys, corpus, save)
    text = (corpus / "train.txt").read_text().splitlines()
    (corpus / "train.txt").write_text("\n".join(text[::-1]) + "\n")
    run(capsys, corpus, save)
    assert len(taken) == 8
    saved = load(save)
    saved["model"]["decoder.bias"] += 1
    torch.save(saved, save)
    for count, more in enumerate(([], ["--max_batches", 2], ["--batch_size", 9]), start=9):
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


def test_search_goes_on_with_the_best_on_validation(ready, capsys):
    """All of the text: the table's smallest figure is the one that follows, and its settings give it again.

    On a few tokens too it tells which one is on the edge of what was tried.
    """
    grid = ["--search_lrs", 1e-4, 1e-3, "--search_lambs", 0.001, 0.01, "--bptt", 10]
    status, out, _ = run(capsys, *ready, "--search", "--search_tokens", 60, *grid)
    assert status == 0
    assert "lies on the edge of what was tried" in out
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
        entry = read_log(Path(f"{ready[1]}.log.jsonl"))[-1]
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
