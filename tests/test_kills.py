"""Killed at a file operation, given the same command again: the end of a run that was never killed, bit for bit.

kill_runs.py has the commands, and says what a moment is; as a script it tries all moments.
"""

import shutil
import signal
from pathlib import Path

import kill_runs
import pytest
import torch
from conftest import load
from kill_runs import CASES, SABOTAGE, Whole, differs, kill, run, run_whole
from runner import PRELUDE, Result, run_cli, start

from corpus.read import read_corpus
from utils import UserError

# Of the files of a run the state comes first, then the model, then at each epoch's end the model if it is better, and
# the state. The first two operations "unlink" are those of the check that files can be written.
MOMENTS = {
    "averaging": [
        ["after flock:1"],
        ["before save:1"],
        ["before replace:1", "after replace:1"],
        ["before save:2", "after replace:2", "before fsync:5"],
    ],
    "two-tailed": [["after replace:2", "before save:2"], ["before save:4"]],
    "Adam": [["after replace:8", "before save:6"], ["before fsync:18", "after replace:3"]],
    "worsening": [["after replace:2"]],
    "warm start": [["before chmod:1"], ["after replace:1", "after replace:1"]],
    "elsewhere": [["before save:2"]],
    "elsewhere, no better": [["after replace:1", "before replace:2"]],
    "finetune in place": [["before replace:1"], ["after replace:1"], ["after replace:2", "before save:2"]],
    "finetune --output": [["after replace:1"], ["after replace:2", "before save:1"]],
    "finetune --output, no better": [["after replace:1"], ["after replace:2"]],
    "two ranks": [["after replace:1", "before all_reduce:40@1"], ["before save:3"]],
    "statistics": [["before save:1"], ["before replace:1", "after replace:1"]],
}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    return kill_runs.make_base(tmp_path_factory.mktemp("base") / "run", corpus)


@pytest.fixture(scope="module")
def wholes(corpus, base, tmp_path_factory):
    """`wholes(name)`: the whole run of a case; done once."""
    done: dict[str, Whole] = {}

    def whole(name: str) -> Whole:
        if name not in done:
            done[name] = run_whole(CASES[name], corpus, base, tmp_path_factory.mktemp("whole") / "run")
        return done[name]

    return whole


@pytest.mark.parametrize(
    ("name", "moments"),
    [pytest.param(name, each, id=f"{name}, {', '.join(each)}") for name in CASES for each in MOMENTS[name]],
)
def test_killed_at_a_file_operation(corpus, base, wholes, tmp_path, name, moments):
    """Each moment is reached, what it leaves can be loaded, and the last run's files are those of the whole run."""
    case, whole = CASES[name], wholes(name)
    case.prepare(tmp_path, base)
    for moment in moments:
        killed, fault = kill(case, corpus, tmp_path, moment, whole.seconds)
        assert killed, f"{moment} is not reached"
        assert not fault, f"{moment}: {fault}"
    first, *_ = run(case, corpus, tmp_path)
    assert not (fault := differs(case, tmp_path, first, whole)), fault
    assert set(kill_runs.contents(tmp_path)) >= {"m.pt"}


def test_the_cases_are_what_they_are_for(wholes, base):
    """Averaging begins; one fine-tuning gets better, one does not; a copy is made; the states are many."""
    assert load(wholes("averaging").folder / "m.pt.state")["mean"] is not None
    assert load(wholes("averaging").folder / "m.pt")["metrics"]["averaged"]
    assert load(wholes("worsening").folder / "m.pt")["metrics"]["epoch"] == 1
    assert load(wholes("elsewhere, no better").folder / "m.pt")["metrics"]["epoch"] <= 2
    assert (wholes("Adam").folder / "m.pt.e1").exists()
    for name in ("finetune in place", "finetune --output"):
        assert load(wholes(name).folder / "m.pt")["metrics"]["step"] > 0
    assert load(wholes("finetune --output, no better").folder / "m.pt")["metrics"]["step"] == 0
    assert wholes("Adam").operations.count("replace:12") == 1


@pytest.mark.parametrize("moment", ["before replace:2", "after replace:2", "before save:3"])
def test_a_run_that_goes_on_elsewhere_goes_on_there(corpus, base, wholes, tmp_path, moment):
    """`--resume A --save B`, killed once B's state is there: `--resume B` is enough, with B's model there or not."""
    case, whole = CASES["elsewhere, no better"], wholes("elsewhere, no better")
    case.prepare(tmp_path, base)
    killed, fault = kill(case, corpus, tmp_path, moment, whole.seconds)
    assert killed
    assert not fault
    result = run_cli("--resume", "m.pt", cwd=tmp_path)
    assert not (fault := differs(case, tmp_path, result, whole)), fault


def sabotaged(moment: str, script: str, *argv: object, cwd: Path) -> Result:
    """A script that is killed at a moment."""
    line = f"MOMENT = {moment!r}\n{SABOTAGE}", script, *argv
    result = start(*line, cwd=cwd, script=PRELUDE).result()
    assert result.status == -signal.SIGKILL, result
    return result


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """A text, and the corpora that prepare.py makes of it with two seeds: "1" and "2"."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "text").write_text("".join(f"line {i} of a text\n" for i in range(60)))
    for seed in (1, 2):
        result = run_cli(*make(folder, folder / str(seed), seed), cwd=folder, script="prepare.py")
        assert result.status == 0, result
        read_corpus(str(folder / str(seed)))
    return folder


def make(corpora: Path, out: Path, seed: int) -> list[object]:
    return [corpora / "text", "--level", "char", "--documents", "lines", "--seed", seed, "--out", out]


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".txt", ".json", ".tmp")}


def read_as(out: Path, corpora: Path) -> str:
    """The seed of the corpus that is read from a folder; or the error that refuses it."""
    try:
        found = read_corpus(str(out))
    except UserError as error:
        return str(error)
    expected = {seed: read_corpus(str(corpora / seed)) for seed in ("1", "2")}
    same = [
        seed
        for seed, other in expected.items()
        if all(torch.equal(getattr(found, text), getattr(other, text)) for text in ("train", "valid", "test"))
        and found.vocab == other.vocab
    ]
    return same[0] if same else "a mixture"


@pytest.mark.parametrize(
    ("moment", "over_another", "in_a_new_folder"),
    [
        ("before replace:1", "1", "is missing"),
        ("after replace:1", "does not belong to the other files", "is missing"),
        ("after replace:2", "does not belong to the other files", "is missing"),
        ("before fsync:7", "does not belong to the other files", "is missing"),
        ("after replace:4", "does not belong to the other files", "is missing"),
        ("after replace:5", "2", "2"),
    ],
)
def test_prepare_killed_at_a_file_operation(corpora, tmp_path, moment, over_another, in_a_new_folder):
    """What is left is the corpus from before, the new one, or refused; the same command then makes the new one."""
    for name, expected in (("old", over_another), ("new", in_a_new_folder)):
        out, flags = tmp_path / name, make(corpora, tmp_path / name, 2)
        if name == "old":
            shutil.copytree(corpora / "1", out, ignore=shutil.ignore_patterns(".cache*"))
        sabotaged(moment, "prepare.py", *flags, cwd=tmp_path)
        assert expected in read_as(out, corpora)
        result = run_cli(*flags, cwd=tmp_path, script="prepare.py")
        assert result.status == 0, result
        assert texts(out) == texts(corpora / "2")
        assert read_as(out, corpora) == "2"


def test_a_cache_that_was_half_written_is_removed_at_the_next_start(corpus, base, tmp_path):
    """By whatever run reads the text next, also when it has a cache of its own rule and writes none."""
    shutil.copytree(corpus, tmp_path / "c", ignore=shutil.ignore_patterns(".cache*"))
    flags = ["--data", "c", *kill_runs.SHORT, "--epochs", 1]
    assert run_cli(*flags, cwd=tmp_path).status == 0
    sabotaged("before save:1", "main.py", *flags, "--vocab_size", 20, cwd=tmp_path)
    assert len(list((tmp_path / "c").glob(".cache-*.tmp"))) == 1
    assert run_cli(*flags, cwd=tmp_path).status == 0
    assert not list((tmp_path / "c").glob(".cache-*.tmp"))
