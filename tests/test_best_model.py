"""The saved model is the best of its run, whatever it is resumed from, and nothing else replaces it."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write_corpus
from runner import run_cli, start
from test_resume_cli import SHORT

from files import RunFiles
from utils import RunError

RUINOUS = ["--lr", 100, "--clip", 9]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture
def base(trained, tmp_path) -> Path:
    """A model of two epochs, alone in a folder."""
    shutil.copy(trained("--epochs", 2).path, tmp_path / "m.pt")
    return tmp_path


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
    metrics, progress = load(base / "m.pt")["metrics"], load(base / "m.pt.state")["progress"]
    assert metrics["step"] > progress["step"]
    assert metrics["valid_loss"] < progress["best_loss"]
    result = run_cli("--resume", "m.pt", "--max_minutes", 0, cwd=base, script="finetune.py")
    assert result.status == 0, result
    history = load(base / "m.pt.state")["progress"]["history"]
    assert load(base / "m.pt")["metrics"]["valid_loss"] == min(history) < progress["best_loss"]
    assert min(history) > metrics["valid_loss"], "else any rule would take it"


@pytest.mark.parametrize("step", [9, 30], ids=["before the first model", "a model displaced"])
def test_going_back_to_a_cut_keeps_the_better_model(corpus, tmp_path, step):
    """Neither a state that holds a displaced model nor one from before all models undoes the best one."""
    flags = ["--data", corpus, *SHORT, "--checkpoint_every", 9, "--keep_last", 99]
    assert run_cli(*flags, "--epochs", 3, "--max_steps", 30, cwd=tmp_path).status == 0
    state = load(tmp_path / f"m.pt.state.{step}")
    assert (state["displaced"] is not None) == (step == 30)
    first = run_cli("--resume", "m.pt", "--max_steps", 0, cwd=tmp_path)
    assert first.status == 0, first
    before = (tmp_path / "m.pt").read_bytes()
    assert load(tmp_path / "m.pt")["metrics"]["step"] > 30
    result = run_cli("--resume", f"m.pt.state.{step}", *RUINOUS, "--max_steps", 0, cwd=tmp_path)
    assert result.status == 0, result
    assert "kept until a better one" in result.out
    assert result.out.splitlines()[-2] == first.out.splitlines()[-2]
    assert (tmp_path / "m.pt").read_bytes() == before


def test_a_state_whose_model_is_gone_saves_the_next_one(trained, tmp_path):
    """Its best loss cannot be had back: the next epoch's model is saved, though worse, and tested."""
    shutil.copy(f"{trained('--epochs', 2).path}.state", tmp_path / "m.pt.state")
    best = load(tmp_path / "m.pt.state")["progress"]["best_loss"]
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
    assert load(base / "m.pt.state")["progress"]["history"][0] > loss
    assert (base / "m.pt").read_bytes() == before
    if name == "auto":
        assert result.out.splitlines()[0] == "| --resume auto: warm start from m.pt, which has no .state"


@pytest.mark.parametrize("in_time", [True, False])
def test_a_failing_run_tries_once_more_to_write_its_best_model(tmp_path, capsys, in_time):
    """A model that waits for space is written when an error ends the run, or said to be lost."""
    (tmp_path / "m.pt").mkdir()  # no file can be renamed to it
    files = RunFiles(str(tmp_path / "m.pt"), keep_last=0)
    files.save_model({"weights": torch.ones(2)})
    if in_time:
        (tmp_path / "m.pt").rmdir()
    with pytest.raises(RunError, match="not finite"), files.last_try():
        raise RunError("the loss is not finite")
    last = capsys.readouterr().err.splitlines()[-1]
    if in_time:
        assert torch.equal(load(tmp_path / "m.pt")["weights"], torch.ones(2))
        assert "saving works again" in last
    else:
        assert f"{tmp_path / 'm.pt'}: cannot be written (" in last
        assert last.endswith("the new one is lost")


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
    assert "| stopped; go on with: " in result.out


def test_states_of_mid_epoch_know_the_time_spent(corpus, tmp_path):
    """The epoch's seconds go on growing from one checkpoint to the next."""
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--epochs", 1]
    assert run_cli(*flags, "--checkpoint_every", 5, "--keep_last", 9, cwd=tmp_path).status == 0
    spent_s = [load(tmp_path / f"m.pt.state.{step}")["progress"]["epoch_s"] for step in (5, 10, 15)]
    assert 0 < spent_s[0] < spent_s[1] < spent_s[2]
    log = map(json.loads, (tmp_path / "m.pt.log.jsonl").read_text().splitlines())
    assert spent_s[2] < next(entry["epoch_s"] for entry in log if entry["kind"] == "valid")


def test_the_mean_has_to_fit_on_the_disk_too(trained, corpus, tmp_path):
    """Space for the weights alone is too little before the first step: averaging will double the state."""
    count = int(re.search(r"Model total parameters: (\d+)", trained("--epochs", 2).result.out)[1])
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--epochs", 1]
    result = run_cli(*flags, cwd=tmp_path, file_limit=6 * count)  # bytes: one and a half times the weights
    assert (result.status, len(result.err.splitlines())) == (1, 1), result
    assert "m.pt.state: cannot be written" in result.err
    assert "batches" not in result.out


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
            ],
        ),
    ],
)
def test_a_stop_loses_no_loss(corpus, tmp_path, device):
    """Seven steps at an interval of five: the state holds the two losses since the last line."""
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--max_steps", 7, "--device", device]
    result = run_cli(*flags, cwd=tmp_path, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert result.status == 0, result
    assert load(tmp_path / "m.pt.state")["progress"]["loss_count"] == 2
