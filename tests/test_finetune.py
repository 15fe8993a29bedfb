"""finetune.py through the command line: averaging from the first step, and never a worse file."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import Trained, load
from runner import Result, assert_refused, run_cli, start

from harness.flags import DEFAULTS

FLAGS = ("--lr", 2, "--epochs", 3, "--nonmono", 5, "--checkpoint_every", 3)


def finetune(folder: Path, *flags: object) -> Result:
    return run_cli(*flags, cwd=folder, script="finetune.py")


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> Trained:
    """That model after an uninterrupted fine-tuning."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copy(trained("--epochs", 2).path, folder / "m.pt")
    result = finetune(folder, "--save", "m.pt", *FLAGS)
    assert result.status == 0, result
    return Trained(folder, result, folder / "m.pt")


def test_finetuning_gains_and_ends_with_the_test(trained, whole):
    """The file holds a better model than before, and the last line is its test."""
    before = trained("--epochs", 2).saved["metrics"]["valid_loss"]
    assert whole.saved["metrics"]["valid_loss"] < before
    assert "| before fine-tuning | valid loss" in whole.result.out
    assert "| End of training | test loss" in whole.result.out.splitlines()[-2]


def test_averages_from_the_first_step(whole):
    """The mean holds the weights of every step."""
    state = whole.state
    assert state["mean"]["count"] == state["at"]["step"] > 0


def test_a_worse_model_never_replaces_the_file(base):
    """At a rate that ruins the weights, the file stays as it is to the byte, and is what is tested."""
    before = (base / "m.pt").read_bytes()
    result = finetune(base, "--save", "m.pt", "--lr", 300, "--clip", 0, "--wdecay", 0.003, "--epochs", 2)
    assert result.status == 0, result
    assert (base / "m.pt").read_bytes() == before


def test_stops_once_the_validation_loss_stalls(base):
    """With --nonmono 0 and a ruinous rate it ends long before --epochs, with exit status 0 and the test."""
    result = finetune(base, "--save", "m.pt", "--lr", 300, "--clip", 0, "--nonmono", 0, "--epochs", 50)
    assert result.status == 0, result
    losses = [line for line in result.out.splitlines() if "end of epoch" in line]
    assert 2 <= len(losses) < 50
    assert "| End of training" in result.out


def test_output_keeps_the_original(base):
    """--output takes the better model; --save is read only."""
    before = (base / "m.pt").read_bytes()
    result = finetune(base, "--save", "m.pt", "--output", "ft.pt", "--lr", 2, "--epochs", 1)
    assert result.status == 0, result
    assert (base / "m.pt").read_bytes() == before
    assert load(base / "ft.pt")["metrics"]["valid_loss"] < load(base / "m.pt")["metrics"]["valid_loss"]
    assert sorted(p.name for p in base.glob("*.state")) == ["ft.pt.state"]


def test_output_is_there_though_nothing_is_gained(base):
    """Then it holds the model as it was, and that is what is tested."""
    flags = ["--output", "ft.pt", "--lr", 300, "--clip", 0, "--wdecay", 0.003, "--epochs", 1]
    result = finetune(base, "--save", "m.pt", *flags)
    assert result.status == 0, result
    assert "| End of training" in result.out
    found, before = load(base / "ft.pt")["model"], load(base / "m.pt")["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("averaging", [["--nonmono", 2, "--average"], ["--average", "two-tailed"]], ids=["one", "two"])
def test_it_has_a_course_of_its_own_whatever_trained_the_model(trained, tmp_path, averaging):
    """Averaged SGD at 30, with one mean: no setting of the training's optimizer and schedule is taken over."""
    course = ["--optimizer", "adam", "--lr", 0.01, "--beta1", 0.5, "--when", 1, *averaging]
    shutil.copy(trained("--epochs", 2, "--anneal", 1, *course).path, tmp_path / "m.pt")
    assert finetune(tmp_path, "--save", "m.pt", "--max_steps", 1).status == 0
    state = load(tmp_path / "m.pt.state")
    args = state["args"]
    assert state["mean"].keys() == {"count", "weights"}
    own = "epochs", "optimizer", "lr", "when", "anneal", "nonmono", "beta1", "average"
    assert {name: args[name] for name in own} == {name: DEFAULTS[name] for name in own} | {"lr": 30.0}


def test_dropouts_given_take_effect_and_the_rest_comes_from_the_file(base):
    """Published flags are accepted, `--epoch` too; weight drop may be switched off."""
    flags = ("--dropouti", 0.1, "--dropouth", 0.05, "--wdrop", 0, "--seed", 141, "--epoch", 1)
    assert finetune(base, "--save", "m.pt", "--lr", 2, *flags).status == 0
    args = load(base / "m.pt.state")["args"]
    assert (args["dropouti"], args["dropouth"], args["wdrop"], args["seed"]) == (0.1, 0.05, 0, 141)
    assert (args["emsize"], args["nhid"], args["batch_size"]) == (8, 10, 4)
    assert "model.rnns.0.weight_hh_l0" in load(base / "m.pt.state")["weights"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_resumed_it_ends_where_the_whole_run_ends(base, whole, number):
    """Killed at a random moment the file is the old one or a better one; resumed, all is the same."""
    before = load(base / "m.pt")["metrics"]["valid_loss"]
    running = start("--save", "m.pt", *FLAGS, cwd=base, script="finetune.py")
    running.wait_for(lambda out: (base / "m.pt.state").exists())
    running.process.join(random.Random(number).uniform(0, 0.3))
    running.kill(number)
    assert running.result().status in (143, -signal.SIGKILL, 0)
    assert load(base / "m.pt")["metrics"]["valid_loss"] <= before

    result = finetune(base, "--resume", "m.pt", "--checkpoint_every", 3)
    assert result.status == 0, result
    for part in ("model", "criterion"):
        saved = load(base / "m.pt")[part]
        assert all(torch.equal(saved[name], tensor) for name, tensor in whole.saved[part].items())
    weights = load(base / "m.pt.state")["weights"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.state["weights"].items())


def test_main_does_not_resume_a_fine_tuning(whole):
    """The state says who made it; the wrong script is told which one can go on."""
    before = whole.path.read_bytes()
    result = run_cli("--resume", "m.pt", cwd=whole.folder)
    assert_refused(result, 2, "m.pt.state", "finetune.py --resume", "--output")
    assert whole.path.read_bytes() == before


def test_main_submitted_again_after_a_fine_tuning_just_evaluates(whole):
    """A job of main.py, then finetune.py under the same name, sent again: training is over, status 0."""
    before = {p.name: p.read_bytes() for p in whole.folder.glob("m.pt*")}
    result = run_cli("--save", "m.pt", "--resume", "auto", "--epochs", 2, cwd=whole.folder)
    assert result.status == 0, result
    assert "its training is over" in result.out.splitlines()[0]
    assert result.out.splitlines()[-2] == whole.result.out.splitlines()[-2]
    assert {p.name: p.read_bytes() for p in whole.folder.glob("m.pt*")} == before


def test_main_evaluates_a_fine_tuned_model(whole):
    """`main.py --resume MODEL --epochs 0` prints the figures, trains nothing and changes no file."""
    before = {p.name: p.read_bytes() for p in whole.folder.glob("m.pt*")}
    result = run_cli("--resume", "m.pt", "--epochs", 0, cwd=whole.folder)
    assert result.status == 0, result
    assert result.out.splitlines()[-2] == whole.result.out.splitlines()[-2]
    assert {p.name: p.read_bytes() for p in whole.folder.glob("m.pt*")} == before


def test_main_evaluates_on_a_text_too_short_to_train_on(whole, corpus, tmp_path):
    """`--epochs 0` asks nothing of the training text but that it can be read."""
    shutil.copytree(corpus, tmp_path / "other", ignore=shutil.ignore_patterns(".cache*"))
    (tmp_path / "other" / "train.txt").write_text("w1\n")
    flags = ("--resume", whole.path, "--epochs", 0)
    short = run_cli(*flags, "--data", tmp_path / "other", cwd=tmp_path)
    assert short.status == 0, short
    assert short.out == run_cli(*flags, cwd=tmp_path).out


def test_a_resumed_run_saves_where_it_is_told(whole, tmp_path):
    """--save with --resume names the new file; the one resumed from stays as it is."""
    for name in ("m.pt", "m.pt.state"):
        shutil.copy(whole.folder / name, tmp_path)
    before = (tmp_path / "m.pt").read_bytes()
    result = finetune(tmp_path, "--resume", "m.pt", "--save", "new.pt", "--epochs", 4)
    assert result.status == 0, result
    assert (tmp_path / "m.pt").read_bytes() == before
    assert (tmp_path / "new.pt").exists()
    assert (tmp_path / "new.pt.state").exists()


def test_a_fine_tuning_that_is_over_is_only_tested_again(whole):
    """Gone on with up to an epoch that it has reached, none at the least, it trains nothing."""
    before = whole.path.read_bytes()
    for epochs in (0, 3):
        result = finetune(whole.folder, "--resume", "m.pt", "--epochs", epochs)
        assert result.status == 0, result
        assert result.out.splitlines()[-2] == whole.result.out.splitlines()[-2]
        assert "batches" not in result.out
    assert whole.path.read_bytes() == before


def test_bad_input_is_one_line_and_harms_nothing(base):
    """A missing, cut or foreign file, a contradicting shape, no corpus: status 2, the file as it was."""
    before = (base / "m.pt").read_bytes()
    (base / "cut.pt").write_bytes(before[: len(before) // 2])
    (base / "foreign.pt").write_bytes(b"not a model")
    for flags, *named in (
        (["--save", "none.pt"], "none.pt"),
        (["--save", "cut.pt"], "cut.pt", "truncated"),
        (["--save", "foreign.pt"], "foreign.pt"),
        (["--save", "m.pt", "--nhid", 11], "--nhid 11", "m.pt"),
        (["--save", "m.pt", "--data", "nowhere"], "nowhere"),
        (["--resume", "m.pt"], "m.pt.state"),
        (["--save", "m.pt", "--output", "no/such/folder.pt"], "--output"),
    ):
        assert_refused(finetune(base, *flags), 2, *named)
    assert (base / "m.pt").read_bytes() == before
