"""The saved model is the best of its run, whatever it is resumed from, and nothing else replaces it."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import toys
from conftest import SMALL, load, read_log, write_corpus
from runner import assert_refused, run_cli, start
from test_resume_cli import SHORT

import main
import train
from harness import files

RUINOUS = ["--lr", 100, "--clip", 9]


def other_language(folder: Path) -> Path:
    """A corpus of the same words whose odds are other ones."""
    write_corpus(folder, seed=3)
    for path in folder.glob("*.txt"):
        path.write_text(re.sub(r"w(\d+)", lambda m: f"w{38 - int(m[1])}", path.read_text()))
    return folder


def test_a_fine_tuning_on_other_text_is_held_to_its_own_figures(base):
    """Stopped before it gained anything, then resumed: the model's old loss on its old text is no bar."""
    flags = ["--save", "m.pt", "--data", other_language(base / "other"), "--lr", 2, "--epochs", 3]
    first = run_cli(*flags, "--nonmono", 5, "--max_minutes", 1e-6, cwd=base, script="finetune.py")
    assert first.status == 0, first
    metrics, at = load(base / "m.pt")["metrics"], load(base / "m.pt.state")["at"]
    assert metrics["step"] > at["step"]
    assert metrics["valid_loss"] < at["best_loss"]
    result = run_cli("--resume", "m.pt", "--max_minutes", 0, cwd=base, script="finetune.py")
    assert result.status == 0, result
    history = load(base / "m.pt.state")["at"]["history"]
    assert load(base / "m.pt")["metrics"]["valid_loss"] == min(history) < at["best_loss"]
    assert min(history) > metrics["valid_loss"], "else any rule would take it"


@pytest.mark.parametrize("step", [9, 30], ids=["before the first model", "after it"])
def test_going_back_to_an_older_state_keeps_the_better_model(corpus, tmp_path, step):
    """A copy of the state from before the best model was made: only a better one replaces that model."""
    first = run_cli("--data", corpus, *SHORT, "--epochs", 2, "--max_steps", step, cwd=tmp_path)
    assert first.status == 0, first
    old = (tmp_path / "m.pt.state").read_bytes()
    whole = run_cli("--resume", "m.pt", "--max_steps", 0, cwd=tmp_path)
    assert whole.status == 0, whole
    before = (tmp_path / "m.pt").read_bytes()
    assert load(tmp_path / "m.pt")["metrics"]["step"] > step
    (tmp_path / "m.pt.state").write_bytes(old)
    result = run_cli("--resume", "m.pt", *RUINOUS, "--max_steps", 0, cwd=tmp_path)
    assert result.status == 0, result
    assert "kept until a better one" in result.out
    assert result.out.splitlines()[-2] == whole.out.splitlines()[-2]
    assert (tmp_path / "m.pt").read_bytes() == before


def test_any_later_best_replaces_a_model_of_mid_epoch(corpus, tmp_path):
    """`--max_steps` in the first epoch leaves a model, so that there is one: no figure to be held to."""
    flags = ["--data", corpus, *SHORT, "--lr", 60, "--clip", 1]
    assert run_cli(*flags, "--max_steps", 3, cwd=tmp_path).status == 0
    cut = load(tmp_path / "m.pt")["metrics"]
    assert cut["partial"] is True
    assert load(tmp_path / "m.pt.state")["at"]["best_loss"] is None
    assert run_cli("--resume", "m.pt", "--max_steps", 0, "--epochs", 1, cwd=tmp_path).status == 0
    metrics = load(tmp_path / "m.pt")["metrics"]
    assert metrics["partial"] is False
    assert metrics["valid_loss"] > cut["valid_loss"], "else any rule would take it"


def test_a_state_whose_model_is_gone_saves_the_next_one(trained, tmp_path):
    """Its best loss cannot be had back: the next epoch's model is saved, though worse, and tested."""
    shutil.copy(f"{trained('--epochs', 2).path}.state", tmp_path / "m.pt.state")
    best = load(tmp_path / "m.pt.state")["at"]["best_loss"]
    result = run_cli("--resume", "m.pt", *RUINOUS, "--epochs", 3, cwd=tmp_path)
    assert result.status == 0, result
    assert "| m.pt: the best model is not there; the next validation saves one" in result.out
    assert load(tmp_path / "m.pt")["metrics"]["valid_loss"] > best


@pytest.mark.parametrize("name", ["m.pt", "auto"])
def test_a_warm_start_never_replaces_the_file_by_a_worse_model(base, name):
    """It is evaluated first; a ruinous epoch leaves it as it was, to the byte."""
    before = (base / "m.pt").read_bytes()
    result = run_cli("--resume", name, "--save", "m.pt", *RUINOUS, "--epochs", 1, cwd=base)
    assert result.status == 0, result
    loss = load(base / "m.pt")["metrics"]["valid_loss"]
    assert f"| warm start | valid loss {loss:5.2f} |" in result.out
    assert load(base / "m.pt.state")["at"]["history"][0] > loss
    assert (base / "m.pt").read_bytes() == before
    if name == "auto":
        assert result.out.splitlines()[0] == "| --resume auto: warm start from m.pt, which has no .state"


@pytest.mark.parametrize("fails", [{2}, {2, 3, 4}])
def test_the_loss_to_beat_is_that_of_the_file_on_the_disk(corpus, tmp_path, monkeypatch, capsys, fails):
    """A best model that a full disk does not take sets no mark: the next one better than the file is tried."""
    losses, save = iter([3.0, 2.0, 2.5, 2.6, 4.0]), files.save  # of four epochs, and of the test

    def save_some(path: str, contents: dict) -> None:
        if path == "m.pt" and contents["metrics"]["epoch"] in fails:
            raise files.NotWrittenError(path, "No space left on device")
        save(path, contents)

    monkeypatch.setattr(files, "save", save_some)
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: next(losses))
    monkeypatch.chdir(tmp_path)
    status = toys.call(main, "--data", corpus, *SHORT, "--epochs", 4)
    warning, *error = capsys.readouterr().err.splitlines()
    assert "warning: m.pt: cannot be written (No space left on device), what was there is kept" in warning
    metrics = load(tmp_path / "m.pt")["metrics"]
    assert load(tmp_path / "m.pt.state")["at"]["best_loss"] == metrics["valid_loss"]
    if 3 in fails:
        assert (status, metrics["epoch"], metrics["valid_loss"]) == (1, 1, 3.0)
        assert len(error) == 1
        assert "error: m.pt: cannot be written (No space left on device)" in error[0]
    else:
        assert (status, metrics["epoch"], metrics["valid_loss"], error) == (0, 3, 2.5, [])


@pytest.mark.parametrize("before", [["--max_steps", 3], []], ids=["--max_steps", "Ctrl-C"])
def test_sigterm_during_the_last_validation(tmp_path, before):
    """The run was ending for another reason already: status 143 all the same, without a test."""
    corpus = write_corpus(tmp_path / "slow", tokens=(1300, 300_000, 300))
    running = start("--data", corpus, *SMALL, "--save", "m.pt", *before, cwd=tmp_path)
    if not before:
        running.wait_for(lambda out: "ms/batch" in out)
        running.kill(signal.SIGINT)
    running.wait_for(lambda _: (tmp_path / "m.pt.state").exists())
    running.kill(signal.SIGTERM)
    result = running.result()
    assert result.status == 143, result
    assert "End of training" not in result.out
    assert result.out.splitlines()[-1] == "| stopped (SIGTERM); --resume m.pt goes on"


def test_a_cut_epoch_counts_the_seconds_before_the_cut(corpus, tmp_path):
    """What is printed at its end is the time of all its parts."""
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--epochs", 1]
    assert run_cli(*flags, "--max_steps", 5, cwd=tmp_path).status == 0
    state = load(tmp_path / "m.pt.state")
    assert state["at"]["epoch_s"] > 0
    state["at"]["epoch_s"] += 1000
    torch.save(state, tmp_path / "m.pt.state")
    assert run_cli("--resume", "m.pt", "--max_steps", 0, cwd=tmp_path).status == 0
    assert 1000 < read_log(tmp_path / "m.pt.log.jsonl")[-2]["epoch_s"] < 1500


def test_a_disk_that_is_too_small_is_told_before_the_first_step(trained, corpus, tmp_path):
    """Space for the weights alone is too little, because averaging will double the state. No file is left."""
    count = int(re.search(r"Model total parameters: (\d+)", trained("--epochs", 2).result.out)[1])
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--epochs", 1]
    result = run_cli(*flags, cwd=tmp_path, file_limit=6 * count)  # bytes: one and a half times the weights
    assert_refused(result, 1, "m.pt.state: cannot be written")
    assert "batches" not in result.out
    assert [p.name for p in tmp_path.iterdir()] == [".runs"]


def test_a_stop_loses_no_loss(corpus, tmp_path):
    """Seven steps at an interval of five: the state holds the two losses since the last line."""
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--max_steps", 7]
    result = run_cli(*flags, cwd=tmp_path)
    assert result.status == 0, result
    assert load(tmp_path / "m.pt.state")["at"]["loss_count"] == 2


@pytest.mark.parametrize("warm", [False, True])
def test_a_run_that_began_over_another_ones_model_is_not_held_to_it(trained, base, corpus, tmp_path, warm):
    """Stopped before its first validation, then resumed: it ends as if no model had been there."""
    start = shutil.copy(trained("--epochs", 1).path, tmp_path / "start.pt")  # without its state
    flags = ["--data", corpus, *SHORT, *RUINOUS, "--epochs", 1, *(["--resume", start] if warm else [])]
    (tmp_path / "whole").mkdir()
    whole = run_cli(*flags, cwd=tmp_path / "whole")
    assert whole.status == 0, whole
    assert run_cli(*flags, "--max_minutes", 1e-6, cwd=base).status == 0
    result = run_cli("--resume", "m.pt", "--max_minutes", 0, cwd=base)
    assert result.status == 0, result
    assert result.out.splitlines()[-2] == whole.out.splitlines()[-2]
    found, expected = (load(folder / "m.pt") for folder in (base, tmp_path / "whole"))
    assert found["metrics"] == expected["metrics"]
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in expected["model"].items())
    old = trained("--epochs", 2).log("valid")[1]["loss"]
    assert expected["metrics"]["valid_loss"] > old, "else any rule would take it"


@pytest.mark.parametrize(
    ("flags", "times"),
    [([], 1), (["--no-average"], 0), (["--optimizer", "adam"], 0), (["--optimizer", "adam", "--average"], 1)],
    ids=["SGD", "SGD --no-average", "Adam", "Adam --average"],
)
def test_averaging_begins_once_and_only_when_asked_for(corpus, tmp_path, monkeypatch, flags, times):
    losses = iter([3.0, 2.0, 4.0, 5.0, 4.0])  # stalled after epochs 3 and 4; the last is the test's
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: next(losses))
    monkeypatch.chdir(tmp_path)
    assert toys.call(main, "--data", corpus, *SHORT, "--epochs", 4, "--nonmono", 0, *flags) == 0
    assert [entry["kind"] for entry in read_log(tmp_path / "m.pt.log.jsonl")].count("averaging") == times
