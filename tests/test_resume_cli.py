"""A run that is interrupted, however, and resumed ends with the tensors of the whole run, bit for bit."""

import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import toys
from conftest import SMALL, Trained, load, read_log, write_corpus
from runner import PRELUDE, Result, assert_refused, run_cli, run_fresh, signal_itself, start

import main
import train
from train import Run

# Four epochs of some twenty steps. Where --nonmono is given, the last one or two of them average. test_amp.py resumes
# every kind of layer.
SHORT = [*SMALL, "--bptt", 20, "--save", "m.pt"]
RUNS = {
    "averaging LSTM": ["--nonmono", 0, "--lr", 20, "--clip", 1],
    "averaging split QRNN": ["--model", "QRNN", "--nonmono", 0, "--lr", 60, "--clip", 1, "--splits", 6, 15],
    "Adam QRNN": ["--model", "QRNN", "--optimizer", "adam", "--lr", 0.01, "--when", 1, "--untied"],
    "Adam GRU": ["--model", "GRU", "--optimizer", "adam", "--lr", 0.01, "--anneal", 1],
    "RAdam LSTM": ["--optimizer", "radam", "--lr", 0.01, "--when", 1],
    "two-tailed LSTM": ["--average", "two-tailed", "--lr", 20, "--clip", 1],
    "two-tailed RAdam split QRNN": [
        *["--model", "QRNN", "--splits", 6, 15, "--optimizer", "radam", "--lr", 0.3, "--average", "two-tailed"]
    ],
    "shuffled mixture": ["--shuffle", "--n_experts", 2],
    "averaging Mogrifier, all that it draws": [
        *[*toys.flags_of("Mogrifier"), "--optimizer", "adam", "--lr", 1, "--beta1", 0, "--average", "--nonmono", 0],
        *["--drop_state", 0.3, "--dropoutr", 0.3, "--samples", 2],
    ],
    "Adam RLSTM, all that it draws": [
        *[*toys.flags_of("rlstm"), "--optimizer", "adam", "--lr", 0.01, "--chrono", 20],
        *["--drop_state", 0.3, "--dropoutr", 0.3, "--samples", 2],
    ],
}
WORSENING = ["--nonmono", 0, "--lr", 60, "--clip", 1]  # its first epoch is its best
EPOCHS = ["--bptt", 20, "--epochs", 4]


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two nested structures of plain data and tensors are not the same, bit for bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        same = type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [at]
    if isinstance(a, dict) and isinstance(b, dict):
        odd = [f"{at}/{key}" for key in a.keys() ^ b.keys()]
        return odd + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{at}/{i}")]
    return [] if a == b else [f"{at}: {a} {b}"]


FLAGS_AND_CLOCK = {"resume", "save", "device", "epochs", "max_steps", "max_minutes", "tensorboard"}
FLAGS_AND_CLOCK |= {"checkpoint_every", "log_interval", "epoch_s"}


def without_clock(part: Any) -> Any:
    """What has to be the same: without times, and without the flags of how the run was cut up."""
    if isinstance(part, dict):
        return {key: without_clock(value) for key, value in part.items() if key not in FLAGS_AND_CLOCK}
    return part


def assert_same_end(folder: Path, result: Result, whole: Trained) -> None:
    """Model and state hold the same tensors and numbers, and the last line is the same."""
    assert result.status == 0, result
    for suffix in ("", ".state"):
        found, expected = (load(d / f"m.pt{suffix}") for d in (folder, whole.folder))
        odd = differences(without_clock(found), without_clock(expected))
        assert not odd, f"m.pt{suffix}: {', '.join(odd)}"
    assert result.out.splitlines()[-2:] == whole.result.out.splitlines()[-2:]


class Case(NamedTuple):
    """The flags of a run, and that run uninterrupted."""

    flags: list[object]
    whole: Trained


@pytest.fixture
def make_case(trained, corpus):
    """`make_case(flags)`: the case of these flags."""

    def make(flags: list[object]) -> Case:
        return Case(["--data", corpus, *SHORT, *flags, *EPOCHS], trained(*flags, *EPOCHS))

    return make


@pytest.fixture
def case(request, make_case):
    """The case of the RUNS entry that the test is parametrised with."""
    return make_case(RUNS[request.param])


@pytest.fixture
def lstm(make_case):
    """The averaging LSTM."""
    return make_case(RUNS["averaging LSTM"])


def cases(*names: str):
    return pytest.mark.parametrize("case", names, indirect=True)


def resume(folder: Path, *flags: object) -> Result:
    return run_cli("--resume", "m.pt", *flags, cwd=folder)


def seen(epoch: int, batch: int):
    """Whether stdout has the line of a batch."""
    return re.compile(rf"^\| epoch +{epoch} \| +{batch}/", re.M).search


@cases(*RUNS)
def test_runs_reach_what_they_are_for(case):
    """All train in more than one epoch; those with --nonmono average from the middle on, and two-tailed always.

    Of two-tailed means, the short one takes the place of the long one after some validations, and not after all.
    """
    flags, whole = case
    averaged = [entry["averaged"] for entry in whole.log("valid")]
    assert len(averaged) == 4
    assert averaged[0] == ("two-tailed" in flags)
    assert averaged[-1] == (whole.state["mean"] is not None) == ("--nonmono" in flags or averaged[0])
    if averaged[0]:
        mean = whole.state["mean"]
        assert 0 < mean["short"]["count"] < mean["count"] < whole.state["at"]["step"]


@cases(*RUNS)
def test_stopped_by_max_steps(case, tmp_path):
    """Cut in the middle of an epoch, twice, one of the cuts past the start of averaging."""
    flags, whole = case
    assert run_cli(*flags, "--max_steps", 27, cwd=tmp_path).status == 0
    assert load(tmp_path / "m.pt.state")["at"]["step"] == 27
    assert resume(tmp_path, "--max_steps", 65).status == 0
    assert load(tmp_path / "m.pt.state")["at"]["step"] == 65
    assert_same_end(tmp_path, resume(tmp_path, "--max_steps", 0), whole)


def test_a_shuffled_run_stopped_about_the_end_of_an_epoch(trained, corpus, tmp_path):
    """In the first epoch, about its end, in the second: the offsets of the columns are those of the whole run."""
    whole = trained("--epochs", 2, "--shuffle")
    for step in (7, 24, 31):
        flags = ["--epochs", 2, "--shuffle", "--save", f"m{step}.pt"]
        assert run_cli("--data", corpus, *SMALL, *flags, "--max_steps", step, cwd=tmp_path).status == 0
        assert run_cli("--resume", f"m{step}.pt", cwd=tmp_path).status == 0
        odd = differences(load(tmp_path / f"m{step}.pt.state")["weights"], whole.state["weights"])
        assert not odd, odd


@pytest.mark.parametrize(
    ("case", "number", "epoch"),
    [
        *(("averaging LSTM", signal.SIGTERM, 3), ("Adam QRNN", signal.SIGTERM, 3)),
        *(("averaging split QRNN", signal.SIGINT, 3), ("Adam GRU", signal.SIGINT, 3)),
        *(("averaging LSTM", signal.SIGTERM, 1), ("averaging LSTM", signal.SIGINT, 1)),
        *(("two-tailed LSTM", signal.SIGTERM, 3), ("two-tailed LSTM", signal.SIGINT, 1)),
    ],
    indirect=["case"],
)
def test_stopped_by_a_signal(case, number, epoch, tmp_path):
    """In the middle of an epoch, of the first one too, when there is no model yet: nothing is lost.

    SIGTERM: status 143, no test. Ctrl-C: status 0, the best model is tested.
    """
    flags, whole = case
    result = start(signal_itself(number, epoch, 2 * epoch), "main.py", *flags, cwd=tmp_path, script=PRELUDE).result()
    assert result.status == (143 if number == signal.SIGTERM else 0), result
    assert ("| End of training | test loss" in result.out) == (number == signal.SIGINT)
    assert "Traceback" not in result.err
    at = load(tmp_path / "m.pt.state")["at"]
    assert (at["epoch"], at["batch"]) == (epoch, 2 * epoch + 1)
    assert_same_end(tmp_path, resume(tmp_path), whole)


@cases("averaging split QRNN", "Adam QRNN", "two-tailed RAdam split QRNN")
def test_killed(case, tmp_path):
    """SIGKILL in the middle of an epoch: the last `--checkpoint_every` is where it goes on."""
    flags, whole = case
    line = signal_itself(signal.SIGKILL, 3, 9), "main.py", *flags, "--checkpoint_every", 5
    assert start(*line, cwd=tmp_path, script=PRELUDE).result().status == -signal.SIGKILL
    at = load(tmp_path / "m.pt.state")["at"]
    assert (at["epoch"], at["batch"]) == (3, 5)
    assert_same_end(tmp_path, resume(tmp_path), whole)


def test_killed_at_random_moments(lstm, tmp_path):
    """Killed six times at any moment, while writing too: always whole files, in the end the same tensors."""
    flags, whole = lstm
    rng = random.Random(7)
    often = ["--log-interval", 1, "--checkpoint_every", 1]
    for number in range(6):
        go_on = (tmp_path / "m.pt.state").exists()
        running = start(*(["--resume", "m.pt"] if go_on else flags), *often, cwd=tmp_path)
        lines = rng.randrange(2, 11)  # all six leave a fourth of the run to do
        running.wait_for(lambda out, lines=lines: out.count("ms/batch") >= lines)
        time.sleep(rng.uniform(0, 0.02))
        running.kill(signal.SIGTERM if number == 3 else signal.SIGKILL)
        assert running.result().status == (143 if number == 3 else -signal.SIGKILL)
        for path in (tmp_path / "m.pt", tmp_path / "m.pt.state"):
            if path.exists():
                load(path)
    assert_same_end(tmp_path, resume(tmp_path), whole)


def test_ctrl_c_twice_ends_at_once(lstm, tmp_path, monkeypatch, capsys):
    """An impatient user gets one line, status 130, and the files that are there are whole."""
    step = train.train_step

    def interrupted(run: Run, *batch: torch.Tensor) -> torch.Tensor:
        if run.at.step == 30:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(run, *batch)

    monkeypatch.setattr(train, "train_step", interrupted)
    monkeypatch.chdir(tmp_path)
    assert toys.call(main, *lstm.flags, "--checkpoint_every", 1) == 130
    out, err = capsys.readouterr()
    assert re.fullmatch(r"\S+: interrupted\n", err)
    assert "End of training" not in out
    assert load(tmp_path / "m.pt")["metrics"]["epoch"] == 1
    assert load(tmp_path / "m.pt.state")["at"]["step"] == 30


def test_stopped_during_the_validation_of_an_epoch(lstm, tmp_path, monkeypatch):
    """SIGTERM does not wait for it; resumed, the epoch is validated once."""
    evaluate = train.evaluate

    def stopped(*args: Any, **how: Any) -> float:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **how)

    monkeypatch.setattr(train, "evaluate", stopped)
    monkeypatch.chdir(tmp_path)
    assert toys.call(main, *lstm.flags) == 143
    at = load(tmp_path / "m.pt.state")["at"]
    assert (at["epoch"], at["history"]) == (1, [])
    assert at["row"] > 0
    assert_same_end(tmp_path, resume(tmp_path), lstm.whole)
    found = [entry["epoch"] for entry in read_log(tmp_path / "m.pt.log.jsonl") if entry["kind"] == "valid"]
    assert found == [1, 2, 3, 4]


@cases("two-tailed LSTM")
def test_stopped_while_the_short_mean_is_evaluated(case, tmp_path, monkeypatch):
    """In the second epoch, the first one with two different means: nothing has been decided, and that is done once."""
    evaluate, calls = train.evaluate, []

    def stopped(*args: Any, **how: Any) -> float:
        calls.append(args[0])
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **how)

    monkeypatch.setattr(train, "evaluate", stopped)
    monkeypatch.chdir(tmp_path)
    assert toys.call(main, *case.flags) == 143
    assert calls[1] is not calls[2]
    state = load(tmp_path / "m.pt.state")
    assert (state["at"]["epoch"], len(state["at"]["history"])) == (2, 1)
    assert 0 < state["mean"]["short"]["count"] < state["mean"]["count"]
    assert_same_end(tmp_path, resume(tmp_path), case.whole)


@pytest.mark.parametrize("first", ["averaging LSTM", "two-tailed LSTM"])
def test_another_kind_of_averaging_begins_anew(make_case, tmp_path, first):
    """The mean of the other kind is left behind, once, and the run says so; the raw weights go on as they are."""
    flags, _ = make_case(RUNS[first])
    assert run_cli(*flags, "--max_steps", 70, cwd=tmp_path).status == 0
    before = load(tmp_path / "m.pt.state")
    two_tailed = first == "averaging LSTM"
    assert before["mean"] is not None
    assert ("short" in before["mean"]) != two_tailed
    result = resume(tmp_path, "--average", *(["two-tailed"] if two_tailed else []), "--max_steps", 72)
    assert result.status == 0, result
    what = "begins anew" if two_tailed else "ends"
    assert result.err.endswith(f"warning: averaging {what}: the run goes on from the weights that are not averaged\n")
    mean = load(tmp_path / "m.pt.state")["mean"]
    counts = mean and (mean["count"], mean["short"]["count"])
    assert counts == ((2, 2) if two_tailed else None)
    result = resume(tmp_path, "--max_steps", 73)
    assert (result.status, result.err) == (0, "")


@cases("two-tailed LSTM")
def test_a_state_whose_two_means_do_not_fit_is_refused(case, tmp_path):
    """The short one is missing, is longer than the long one, or has other weights."""
    assert run_cli(*case.flags, "--max_steps", 30, cwd=tmp_path).status == 0
    path = tmp_path / "m.pt.state"
    sound = load(path)
    weights = sound["mean"]["short"]["weights"]
    name = next(iter(weights))
    for reason, short in (
        ("is of another kind", None),
        ("mean's count", {"count": sound["mean"]["count"] + 1, "weights": weights}),
        ("mean's count", {"count": -1, "weights": weights}),
        ("of other weights", {"count": 1, "weights": {}}),
        (f"mean of {name}", {"count": 1, "weights": {**weights, name: weights[name][:1]}}),
        (f"mean of {name}", {"count": 1, "weights": {**weights, name: weights[name] * torch.inf}}),
    ):
        mean = {key: value for key, value in sound["mean"].items() if key != "short"}
        torch.save({**sound, "mean": mean | ({"short": short} if short else {})}, path)
        if short:
            assert_refused(resume(tmp_path), 2, "m.pt.state: a part of it does not fit this run", reason)
        else:  # a state of the time before: two-tailed averaging begins now
            assert "averaging begins anew" in resume(tmp_path, "--max_steps", 30).err


@cases("averaging split QRNN")
def test_resumed_by_a_new_interpreter(case, tmp_path):
    """Other processes, other hash seeds: the same tensors."""
    flags, whole = case
    first = run_cli(*flags, "--max_steps", 45, cwd=tmp_path)
    assert first.status == 0, first
    assert_same_end(tmp_path, run_fresh("--resume", "m.pt", "--max_steps", 0, cwd=tmp_path), whole)


def test_more_epochs(lstm, tmp_path):
    """A run that ended goes on with `--epochs`: as if that had been asked for at once."""
    flags, whole = lstm
    assert run_cli(*flags, "--epochs", 2, cwd=tmp_path).status == 0
    assert_same_end(tmp_path, resume(tmp_path, *EPOCHS), whole)


@pytest.mark.parametrize("flags", [RUNS["averaging LSTM"], WORSENING], ids=["better", "no better"])
def test_the_run_that_is_resumed_elsewhere_stays(make_case, tmp_path, flags):
    """`--resume A --save B` leaves A and its state alone; B is A's model if no better one follows."""
    flags, whole = make_case(flags)
    assert run_cli(*flags, "--max_steps", 0, "--epochs", 2, cwd=tmp_path).status == 0
    os.rename(tmp_path / "m.pt", tmp_path / "a.pt")
    os.rename(tmp_path / "m.pt.state", tmp_path / "a.pt.state")
    before = [(tmp_path / name).read_bytes() for name in ("a.pt", "a.pt.state")]
    result = run_cli("--resume", "a.pt", "--save", "m.pt", *EPOCHS, cwd=tmp_path)
    assert_same_end(tmp_path, result, whole)
    assert [(tmp_path / name).read_bytes() for name in ("a.pt", "a.pt.state")] == before


@pytest.mark.parametrize("cut", [3, 25], ids=["before the first model", "after it"])
def test_a_cut_that_is_better_than_what_follows(make_case, tmp_path, cut):
    """What `--max_steps` evaluates in the middle of an epoch is no part of the run that goes on after it."""
    flags, whole = make_case(WORSENING)
    result = run_cli(*flags, "--max_steps", cut, cwd=tmp_path)
    assert result.status == 0, result
    losses = [entry["loss"] for entry in read_log(tmp_path / "m.pt.log.jsonl") if entry["kind"] == "valid"]
    assert losses[-1] < min(entry["loss"] for entry in whole.log("valid")), "this cut has to be better"
    assert load(tmp_path / "m.pt")["metrics"]["partial"] == (cut == 3)
    assert_same_end(tmp_path, resume(tmp_path, "--max_steps", 0), whole)


def test_flags_given_win_over_stored_ones(lstm, tmp_path):
    """Another rate, interval and clipping are taken; what is not given stays as it was."""
    flags, _ = lstm
    assert run_cli(*flags, "--max_steps", 50, cwd=tmp_path).status == 0
    new = ["--lr", 0.25, "--log-interval", 1, "--clip", 0.1, "--wdecay", 0.5]
    result = resume(tmp_path, *new, "--max_steps", 55)
    assert result.status == 0, result
    assert re.findall(r"lr (\d+\.\d+)", result.out) == ["0.25000"] * 5
    (group,) = load(tmp_path / "m.pt.state")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5
    args = load(tmp_path / "m.pt.state")["args"]
    assert (args["lr"], args["clip"], args["bptt"], args["nonmono"]) == (0.25, 0.1, 20, 0)


def test_another_batch_size_begins_the_epoch_again(lstm, tmp_path):
    """The columns are others then: no row of the old ones means anything, and none counts in the next log line."""
    flags, _ = lstm
    assert run_cli(*flags, "--max_steps", 27, cwd=tmp_path).status == 0
    before = load(tmp_path / "m.pt.state")["at"]
    assert min(before["batch"], before["loss_count"]) > 0
    result = resume(tmp_path, "--batch_size", 2, "--max_steps", 29)
    assert result.status == 0, result
    assert "| resumed at epoch 2, batch 0" in result.out
    state = load(tmp_path / "m.pt.state")
    assert (state["at"]["batch"], state["at"]["loss_count"], state["hidden"][0][0].size(1)) == (2, 2, 2)


def test_other_samples_begin_the_epoch_again_too(lstm, tmp_path):
    """Half as many columns of text, each twice: as many are carried, but they are others."""
    flags, _ = lstm
    assert run_cli(*flags, "--shuffle", "--max_steps", 27, cwd=tmp_path).status == 0
    columns = load(tmp_path / "m.pt.state")["args"]["batch_size"] // 2
    result = resume(tmp_path, "--batch_size", columns, "--samples", 2, "--max_steps", 29)
    assert result.status == 0, result
    assert "| resumed at epoch 2, batch 0" in result.out


@pytest.mark.parametrize("wdrops", [(0, 0.5), (0.5, 0)], ids=["on", "off"])
def test_moments_stay_with_their_weights_when_weight_drop_changes(make_case, tmp_path, wdrops):
    """A QRNN's dropped weight has another place among the parameters than one that is not."""
    flags, _ = make_case(RUNS["Adam QRNN"])
    assert run_cli(*flags, "--wdrop", wdrops[0], "--max_steps", 5, cwd=tmp_path).status == 0
    moments = [load(tmp_path / "m.pt.state")]
    result = resume(tmp_path, "--wdrop", wdrops[1], "--lr", 0, "--beta1", 0.5, "--max_steps", 6)
    assert result.status == 0, result
    moments.append(load(tmp_path / "m.pt.state"))
    assert tuple(moments[1]["optimizer"]["param_groups"][0]["betas"]) == (0.5, 0.999)
    before, after = (
        {name.removesuffix("_raw"): state["optimizer"]["state"][i] for i, name in enumerate(state["weights"])}
        for state in moments
    )
    assert before.keys() == after.keys()
    for name, entry in after.items():
        rest = entry["exp_avg_sq"] - 0.999 * before[name]["exp_avg_sq"]
        assert (rest >= -1e-12).all(), f"{name}: what was there, and the square of one more gradient"
        assert entry["step"] == before[name]["step"] + 1


def test_a_model_without_a_state_is_a_warm_start(lstm, tmp_path):
    """Its weights, a run from the first step; the vocabulary is the model's, on another text too."""
    flags, _ = lstm
    assert run_cli(*flags, "--max_steps", 50, cwd=tmp_path).status == 0
    (tmp_path / "m.pt.state").unlink()
    old = load(tmp_path / "m.pt")
    write_corpus(tmp_path / "other", seed=3)
    flags = ["--data", "other", "--lr", 1e-12, "--max_steps", 1, "--save", "b.pt"]
    result = run_cli("--resume", "m.pt", *flags, cwd=tmp_path)
    assert result.status == 0, result
    new = load(tmp_path / "b.pt")
    assert new["vocab"] == old["vocab"]
    assert new["metrics"]["step"] == 1
    for name, tensor in old["model"].items():
        torch.testing.assert_close(new["model"][name], tensor, rtol=0, atol=1e-6)


def test_an_evaluation_changes_nothing(lstm):
    """`--resume PTB.pt --epochs 0` prints the saved model's test figures and leaves every file."""
    _, whole = lstm
    before = {p.name: p.read_bytes() for p in whole.folder.glob("m.pt*")}
    result = run_cli("--resume", "m.pt", "--epochs", 0, cwd=whole.folder)
    assert result.status == 0, result
    assert result.out.splitlines()[-2] == whole.result.out.splitlines()[-2]
    loss = whole.saved["metrics"]["valid_loss"]
    assert f"| End of evaluation | valid loss {loss:5.2f} | valid ppl {math.exp(loss):8.2f} |" in result.out
    assert {p.name: p.read_bytes() for p in whole.folder.glob("m.pt*")} == before


def test_resume_auto_without_epochs_says_that_it_evaluates(lstm):
    """There is a state beside the model; it is not looked at."""
    result = run_cli("--save", "m.pt", "--resume", "auto", "--epochs", 0, cwd=lstm.whole.folder)
    assert result.status == 0, result
    assert result.out.splitlines()[0] == "| --resume auto: evaluates m.pt"


@pytest.mark.parametrize("step", [10, 65], ids=["before it begins", "once it has begun"])
def test_no_average_ends_averaging(lstm, tmp_path, step):
    """The raw weights go on as if nothing had happened, and are those to evaluate with, also when resumed again."""
    flags, whole = lstm
    assert run_cli(*flags, "--max_steps", step, cwd=tmp_path).status == 0
    begun = load(tmp_path / "m.pt.state")["mean"] is not None
    assert begun == (step == 65)
    result = resume(tmp_path, "--no-average", "--max_steps", 70)
    assert result.status == 0, result
    assert ("averaging ends: the run goes on from the weights that are not" in result.err) == begun
    result = resume(tmp_path, "--max_steps", 0)
    assert (result.status, result.err) == (0, ""), result
    state = load(tmp_path / "m.pt.state")
    assert state["mean"] is None
    assert not differences(state["weights"], whole.state["weights"])
    valid = [entry for entry in read_log(tmp_path / "m.pt.log.jsonl") if entry["kind"] == "valid"]
    assert {entry["averaged"] for entry in valid if entry["step"] > step} == {False}
    assert resume(tmp_path, "--average", "--epochs", 6).status == 0  # on again: at the next stall
    assert load(tmp_path / "m.pt.state")["args"]["no_average"] is False


def test_a_run_of_an_older_version_averages_as_it_did(lstm, tmp_path):
    """Its average is False and it knows no --no-average: under SGD that has always meant averaging after a stall."""
    flags, whole = lstm
    assert run_cli(*flags, "--max_steps", 10, cwd=tmp_path).status == 0
    state = load(tmp_path / "m.pt.state")
    assert state["args"].pop("no_average") is False
    torch.save(state, tmp_path / "m.pt.state")
    assert_same_end(tmp_path, resume(tmp_path, "--max_steps", 0), whole)


@pytest.mark.parametrize("before", ["sgd", "adam"])
def test_another_optimizer_leaves_mean_and_moments_behind(make_case, tmp_path, before):
    """It goes on from the raw weights: at a rate of almost nothing they stay. It says so, once."""
    adam = ["--optimizer", "adam", "--lr", 0.3, "--average", "--nonmono", 0]
    flags, _ = make_case(RUNS["averaging LSTM"]) if before == "sgd" else make_case([*adam, "--clip", 1])
    assert run_cli(*flags, "--max_steps", 0, cwd=tmp_path).status == 0
    old = load(tmp_path / "m.pt.state")
    assert old["mean"] is not None
    after = {"sgd": "adam", "adam": "sgd"}[before]
    more = ["--optimizer", after, "--epochs", 5, "--wdecay", 0]
    result = resume(tmp_path, *more, "--lr", 1e-12, "--max_steps", old["at"]["step"] + 3)
    assert result.status == 0, result
    afresh = f"--optimizer {after}: starts afresh where {before} has come to, at the rate 1e-12"
    assert [line.partition("warning: ")[2].partition(" the run goes")[0] for line in result.err.splitlines()] == [
        *(afresh, "averaging ends:")
    ]
    new = load(tmp_path / "m.pt.state")
    assert new["mean"] is None
    assert new["args"]["optimizer"] == after
    steps = {float(entry["step"]) for entry in new["optimizer"]["state"].values()}
    assert steps == ({3.0} if after == "adam" else set())
    for name, tensor in old["weights"].items():
        torch.testing.assert_close(new["weights"][name], tensor, rtol=0, atol=1e-6)
    result = resume(tmp_path, *more, "--max_steps", old["at"]["step"] + 4)
    assert (result.status, result.err) == (0, ""), result


@pytest.mark.parametrize("warm", [False, True])
def test_another_optimizer_starts_at_its_own_rate(trained, tmp_path, warm):
    """`--resume SGD.pt --optimizer adam` goes on at Adam's 1e-3, and says so; a rate that is given wins."""
    whole = trained("--epochs", 1)
    for suffix in ("",) if warm else ("", ".state"):
        shutil.copy(f"{whole.path}{suffix}", tmp_path / f"m.pt{suffix}")
    flags = ["--optimizer", "adam", "--epochs", 2, "--log-interval", 1]
    result = resume(tmp_path, *flags, "--max_steps", 45, "--save", "adam.pt")
    assert result.status == 0, result
    assert set(re.findall(r"\| lr (\d+\.\d+)", result.out)) == {"0.00100"}
    state = load(tmp_path / "adam.pt.state")
    assert (state["at"]["lr"], state["args"]["lr"], state["args"]["optimizer"]) == (1e-3, 1e-3, "adam")
    result = resume(tmp_path, *flags, "--max_steps", 45, "--lr", 5, "--save", "given.pt")
    assert set(re.findall(r"\| lr (\d+\.\d+)", result.out)) == {"5.00000"}


def test_ctrl_c_after_sigterm_changes_nothing(corpus, tmp_path, monkeypatch, capsys):
    """Both in the same step, SIGTERM first: the run ends as SIGTERM wants it, with 143 and no test."""
    step = train.train_step

    def interrupted(run: Run, *batch: torch.Tensor) -> torch.Tensor:
        loss = step(run, *batch)
        if run.at.step == 30:  # there is a model by then
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(train, "train_step", interrupted)
    monkeypatch.chdir(tmp_path)
    assert toys.call(main, "--data", corpus, *SHORT, "--epochs", 2) == 143
    out = capsys.readouterr().out
    assert "end of epoch   1" in out
    assert "End of training" not in out
    assert out.splitlines()[-1] == "| stopped (SIGTERM); --resume m.pt goes on"
    assert load(tmp_path / "m.pt.state")["at"]["step"] == 31


def test_resume_auto_reads_each_file_once(trained, tmp_path, monkeypatch):
    """The state and the model, once each: a state is several times the weights."""
    whole = trained("--epochs", 1)
    for suffix in ("", ".state"):
        shutil.copy(f"{whole.path}{suffix}", tmp_path / f"m.pt{suffix}")
    read, load = [], torch.load

    def counted(file: Any, **how: Any) -> Any:
        read.append(Path(getattr(file, "name", file)).name)
        return load(file, **how)

    monkeypatch.setattr(torch, "load", counted)
    monkeypatch.chdir(tmp_path)
    assert toys.call(main, "--save", "m.pt", "--resume", "auto", "--epochs", 2, "--max_minutes", 1e-6) == 0
    assert sorted(name for name in read if name.startswith("m.pt")) == ["m.pt", "m.pt.state"]
