"""On a GPU the best model waits on the device and files are written by the clock; here a CPU behaves like one."""

import signal

import pytest
import torch
from conftest import SMALL, load
from toys import call

import main
import train
from harness import checkpoint, files

SLOW = ["--lr", 0.5, "--epochs", 4]  # so that every epoch is better than the last


@pytest.fixture
def written(monkeypatch, tmp_path):
    """The names of files in the order in which they are written; the clock allows one state only, the first."""
    names = []
    save = files.save

    def noted(path, contents):
        names.append(path)
        save(path, contents)

    monkeypatch.setattr(files, "save", noted)
    monkeypatch.setattr(checkpoint, "waits", lambda run: True)
    monkeypatch.setattr(checkpoint, "WRITE_EVERY_S", 10**9)
    monkeypatch.chdir(tmp_path)
    return names


@pytest.mark.parametrize("averaging", [[], ["--average", "two-tailed"]], ids=["no mean", "two-tailed"])
def test_the_end_of_a_run_writes_what_waits(trained, corpus, written, tmp_path, averaging):
    """A state before the first model, then the model before the state; both are those of a run that does not wait."""
    whole = trained(*SLOW, *averaging)
    assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW, *averaging) == 0
    assert written == ["m.pt.state", "m.pt", "m.pt.state"]
    for name, expected in (("m.pt", whole.saved), ("m.pt.state", whole.state)):
        found = load(tmp_path / name)
        for part in ("model", "criterion", "weights"):
            for key, tensor in expected.get(part, {}).items():
                assert torch.equal(found[part][key], tensor), key
    assert load(tmp_path / "m.pt")["metrics"] == whole.saved["metrics"]


def test_sigterm_loses_no_model(trained, corpus, written, tmp_path, monkeypatch):
    """In the third epoch: the model of the second, which waited, is on the disk; the run goes on from there."""
    step = train.train_step

    def stopped(run, *batch):
        if run.at.epoch == 3 and run.at.batch == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(run, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped)
        assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW) == 143
    assert load(tmp_path / "m.pt")["metrics"]["epoch"] == 2
    assert load(tmp_path / "m.pt.state")["at"]["epoch"] == 3
    assert call(main, "--resume", "m.pt") == 0
    expected = trained(*SLOW).saved
    assert all(torch.equal(load(tmp_path / "m.pt")["model"][key], x) for key, x in expected["model"].items())


def test_a_run_that_diverges_loses_no_model(corpus, written, tmp_path, monkeypatch, capsys):
    """The model of the second epoch, which waited when a loss of the third was not finite, is on the disk."""
    step = train.train_step

    def diverging(run, *batch):
        loss = step(run, *batch)
        return loss * torch.inf if run.at.epoch == 3 else loss

    monkeypatch.setattr(train, "train_step", diverging)
    assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW) == 1
    assert "the loss is inf at epoch 3" in capsys.readouterr().err
    assert load(tmp_path / "m.pt")["metrics"]["epoch"] == 2


def test_a_stop_after_the_weights_have_diverged_loses_no_model(corpus, written, tmp_path, monkeypatch, capsys):
    """Before a loss has been read: the state is refused, and the model of the second epoch is on the disk."""
    step = train.train_step

    def stopped(run, *batch):
        loss = step(run, *batch)
        if run.at.epoch == 3 and run.at.batch == 2:
            signal.raise_signal(signal.SIGTERM)
            run.parameters[0].data[0] = torch.nan
        return loss

    monkeypatch.setattr(train, "train_step", stopped)
    assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW) == 1
    assert "a weight is not finite at epoch 3" in capsys.readouterr().err
    assert load(tmp_path / "m.pt")["metrics"]["epoch"] == 2


def test_a_copy_has_the_model_that_waits(corpus, written, tmp_path):
    """--when 2 keeps a copy of the best model, which is that of the second epoch."""
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", *SLOW, "--when", 2]
    assert call(main, *flags) == 0
    assert load(tmp_path / "m.pt.e2")["metrics"]["epoch"] == 2


def test_a_first_state_that_cannot_be_written_is_tried_again_before_the_next_model(
    corpus, written, tmp_path, monkeypatch, capsys
):
    """Else a model could lie beside the state of an older run for as long as the clock allows."""
    save, attempts = files.save, []

    def full(path, contents):
        attempts.append(path)
        if path == "m.pt.state" and len(attempts) == 1:
            raise files.NotWrittenError(path, "No space left on device")
        save(path, contents)

    monkeypatch.setattr(files, "save", full)
    assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW) == 0
    assert attempts[0] == "m.pt.state"
    assert "m.pt.state" in attempts[1:-2]
    assert capsys.readouterr().err.count("m.pt.state: cannot be written") == 1


def test_a_model_that_cannot_be_written_is_not_the_one_to_beat(corpus, written, tmp_path, monkeypatch, capsys):
    """The best loss is again that of the file on disk; the run ends with status 1 and one line."""
    save = files.save

    def full(path, contents):
        if path == "m.pt" and contents["metrics"]["epoch"] > 1:
            raise files.NotWrittenError(path, "No space left on device")
        save(path, contents)

    monkeypatch.setattr(files, "save", full)
    monkeypatch.setattr(checkpoint, "WRITE_EVERY_S", 0)
    assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW) == 1
    metrics = load(tmp_path / "m.pt")["metrics"]
    assert metrics["epoch"] == 1
    assert load(tmp_path / "m.pt.state")["at"]["best_loss"] == metrics["valid_loss"]
    warning, error = capsys.readouterr().err.splitlines()
    assert "warning: m.pt: cannot be written (No space left on device)" in warning
    assert "error: m.pt: cannot be written (No space left on device)" in error
