"""Long runs: full disks, kills, time limits, numbered states, --resume auto, and what is seen on the way."""

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from runner import ENVIRONMENT, ROOT, Result, Running, run_cli, run_fresh, start
from test_resume_cli import EPOCHS, RUNS, SHORT, assert_same_end, seen

# A state of a megabyte or two: writing one takes a while, and it does not fit where little is left.
LARGE = ["--emsize", 16, "--nhid", 250, "--nlayers", 2, "--batch_size", 4, "--bptt", 14, "--lr", 5]
OFTEN = ["--log-interval", 1, "--checkpoint_every", 1, "--device", "cpu"]
FIT = 200_000  # bytes: more than what is printed, less than a model


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def until(running: Running, seen_there: object) -> None:
    """Waits for a text on stderr."""
    running.wait_for(lambda _: seen_there in running.err.read_text())


def has_improved(out: str) -> bool:
    """Whether a validation after the first was better, and the epoch after it has begun."""
    found = [float(ppl) for ppl in re.findall(r"valid ppl +([\d.]+)", out)]
    return any(ppl < found[0] for ppl in found[1:]) and "batches" in out[out.rindex("end of epoch") :]


class Disk:
    """A folder whose disk can be full: a small tmpfs, or a limit on file sizes where none can be mounted."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.ballast = folder, folder / "ballast"
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
        self.mounted = subprocess.run(command, capture_output=True).returncode == 0

    def fill(self, running: Running) -> None:
        if not self.mounted:
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (FIT, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))

    def free(self, running: Running) -> None:
        if self.mounted:
            self.ballast.unlink()
        else:
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request, tmp_path, monkeypatch) -> Iterator[Disk]:
    if request.param == "limit":
        monkeypatch.setenv("PATH", str(tmp_path))  # no mount is found there
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    disk = Disk(tmp_path / "disk")
    yield disk
    if disk.mounted:
        subprocess.run(["umount", disk.folder], check=True)


def train_to_first_model(disk: Disk, corpus: Path, tmp_path: Path) -> Running:
    """A run whose disk is full since the end of the first epoch."""
    flags = ["--data", corpus, *LARGE, *OFTEN, "--save", disk.folder / "m.pt", "--epochs", 500]
    running = start(*flags, cwd=tmp_path)
    running.wait_for(lambda out: out.count("end of epoch") >= 1 and seen(2, 1)(out))
    disk.fill(running)
    until(running, "cannot be written")
    return running


def test_a_disk_that_fills_costs_no_run(disk, corpus, tmp_path):
    """Said once; the old files stay whole while the run goes on; with space again the best model is there."""
    running = train_to_first_model(disk, corpus, tmp_path)
    model, state = disk.folder / "m.pt", disk.folder / "m.pt.state"
    before = model.read_bytes(), state.read_bytes()
    running.wait_for(has_improved)
    assert (model.read_bytes(), state.read_bytes()) == before
    assert load(model)["metrics"]["epoch"] == 1
    assert not temporaries(disk.folder) or running.process.is_alive()  # one is being tried, perhaps

    disk.free(running)
    until(running, "works again")
    running.kill(signal.SIGTERM)
    result = running.result()
    assert result.status == 143, result
    first, second = result.err.splitlines()
    assert "m.pt.state: cannot be written" in first
    assert "tries again" in first
    assert "works again" in second
    progress = load(state)["progress"]
    assert load(model)["metrics"]["valid_loss"] == progress["best_loss"] == min(progress["history"])
    assert not temporaries(disk.folder)


def test_a_disk_that_stays_full_is_an_error_at_the_end(disk, corpus, tmp_path):
    """The best model could not be written: status 1 and one line more; the old files are whole."""
    running = train_to_first_model(disk, corpus, tmp_path)
    running.wait_for(has_improved)
    running.kill(signal.SIGINT)
    result = running.result()
    assert result.status == 1, result
    assert len(result.err.splitlines()) == 2
    assert "m.pt: cannot be written" in result.err.splitlines()[1]
    assert "End of training" not in result.out
    assert load(disk.folder / "m.pt")["metrics"]["epoch"] == 1
    assert load(disk.folder / "m.pt.state")["progress"]["epoch"] <= 2


def test_a_disk_that_is_full_before_the_start_is_told_at_once(corpus, tmp_path):
    """Status 1 and one line before the first batch; no file is left."""
    flags = ["--data", corpus, *LARGE, *OFTEN, "--save", "m.pt", "--epochs", 5]
    result = run_cli(*flags, cwd=tmp_path, file_limit=FIT)
    assert (result.status, len(result.err.splitlines())) == (1, 1), result
    assert "m.pt.state: cannot be written" in result.err
    assert "batches" not in result.out
    assert [p.name for p in tmp_path.iterdir()] == [".runs"]


def test_a_model_that_waits_travels_in_the_state(tmp_path):
    """Its file cannot be written, the state can: a killed run loses nothing, and a later one drops it."""
    from files import RunFiles

    (tmp_path / "m.pt").mkdir()  # no file can be renamed to it
    files = RunFiles(str(tmp_path / "m.pt"), keep_last=0)
    state = {"displaced": None, "progress": {"step": 3}}
    files.save_model({"weights": torch.ones(2)})
    assert files.save_state(state)
    assert torch.equal(load(tmp_path / "m.pt.state")["displaced"]["weights"], torch.ones(2))
    (tmp_path / "m.pt").rmdir()
    assert files.save_state(state)
    assert load(tmp_path / "m.pt.state")["displaced"] is None
    assert torch.equal(load(tmp_path / "m.pt")["weights"], torch.ones(2))
    files.require_written()


def test_output_on_a_full_disk_is_not_worth_the_run(corpus, tmp_path):
    """Stdout, log and checkpoints have no place: the run goes on, and ends well when they have again."""
    flags = ["--data", corpus, *SMALL, *OFTEN, "--save", "m.pt", "--epochs", 8]
    running = start(*flags, cwd=tmp_path)
    running.wait_for(seen(1, 4))
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    time.sleep(0.1)
    assert running.process.is_alive()
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    result = running.result()
    assert result.status == 0, result
    assert "| End of training | test loss" in result.out
    for line in (tmp_path / "m.pt.log.jsonl").read_text().splitlines()[-3:]:
        json.loads(line)


def test_killed_in_mid_write(corpus, tmp_path):
    """One command, killed again and again while it writes: whole files, nothing piles up, it goes on."""
    flags = ["--data", corpus, *LARGE, *OFTEN, "--save", "m.pt", "--resume", "auto", "--keep_last", 2]
    rng, steps = random.Random(5), [0]
    for _ in range(6):
        running = start(*flags, "--epochs", 100, cwd=tmp_path)
        lines = rng.randrange(2, 30)
        running.wait_for(lambda out, lines=lines: out.count("ms/batch") >= lines)
        time.sleep(rng.uniform(0, 0.03))
        running.kill(signal.SIGKILL)
        assert running.result().status == -signal.SIGKILL
        saved = {p.name: load(p) for p in tmp_path.glob("m.pt*") if p.suffix != ".jsonl"}
        steps.append(saved["m.pt.state"]["progress"]["step"])
        assert steps[-1] > steps[-2]
        assert len(temporaries(tmp_path)) <= 1
    copies = [name for name in saved if name.startswith("m.pt.state.")]
    assert len(copies) in (2, 3), "a third one when the kill came before the oldest was dropped"
    assert run_cli(*flags, "--epochs", 1, cwd=tmp_path).status == 0
    assert not temporaries(tmp_path)


def test_the_temporary_file_of_a_living_writer_is_left_alone(tmp_path):
    """Two runs under one name: only what a dead one left is removed."""
    from utils import remove_stale, temporary_beside

    (tmp_path / ".m.pt.state.dead.tmp").touch()
    (tmp_path / ".other.pt.dead.tmp").touch()
    with temporary_beside(tmp_path / "m.pt") as file:
        remove_stale(tmp_path / "m.pt")
        assert {p.name for p in temporaries(tmp_path)} == {os.path.basename(file.name), ".other.pt.dead.tmp"}


@pytest.fixture
def lstm(trained, corpus):
    """The averaging LSTM's flags, and its whole run."""
    flags = RUNS["averaging LSTM"]
    return ["--data", corpus, *SHORT, *flags, *EPOCHS], trained(*flags, *EPOCHS)


def test_checkpoint_minutes(lstm, tmp_path):
    """The state is written by the clock between two steps: a kill costs no more than that."""
    flags, whole = lstm
    running = start(*flags, "--checkpoint_minutes", 1e-6, "--log-interval", 1, cwd=tmp_path)
    running.wait_for(seen(2, 4))
    running.kill(signal.SIGKILL)
    running.result()
    assert load(tmp_path / "m.pt.state")["progress"]["batch"] >= 3
    assert_same_end(tmp_path, run_cli("--resume", "m.pt", cwd=tmp_path), whole)


def pasted(command: str, folder: Path) -> Result:
    """What a user gets who pastes a printed command."""
    _, script, *flags = shlex.split(command)
    return run_cli(*flags, cwd=folder, script=script)


def test_max_minutes(lstm, tmp_path):
    """Status 0, no test, the state saved; the command that is printed goes on, quoted and complete."""
    flags, whole = lstm
    (tmp_path / "a b").mkdir()
    result = run_cli(*flags, "--save", "a b/m.pt", "--max_minutes", 0.002, cwd=tmp_path)
    assert result.status == 0, result
    assert "End of" not in result.out.replace("end of epoch", "")
    command = result.out.splitlines()[-1].removeprefix("| stopped; go on with: ")
    assert command.endswith("main.py --resume 'a b/m.pt' --device cpu --max_minutes 0.002")
    result = pasted(command.replace("0.002", "0"), tmp_path)
    assert_same_end(tmp_path / "a b", result, whole)


def test_the_command_that_goes_on_with_a_fine_tuning(trained, tmp_path):
    """It names the --output, not the model that is only read."""
    shutil.copy(trained("--epochs", 2).path, tmp_path / "m.pt")
    flags = ["--save", "m.pt", "--output", "t.pt", "--lr", 2, "--epochs", 300, "--log-interval", 1]
    running = start(*flags, cwd=tmp_path, script="finetune.py")
    running.wait_for(seen(2, 3))
    running.kill(signal.SIGTERM)
    result = running.result()
    assert result.status == 143, result
    command = result.out.splitlines()[-1].removeprefix("| stopped; go on with: ")
    before = (tmp_path / "m.pt").read_bytes()
    assert pasted(f"{command} --epochs 2", tmp_path).status == 0
    assert (tmp_path / "m.pt").read_bytes() == before


def test_resume_auto_is_one_command_for_all_jobs(trained, corpus, tmp_path):
    """Killed, submitted again, ended, submitted again: the whole run's end; then it just tests.

    The rate that --when has divided is not taken back by the --lr of the same command.
    """
    own = RUNS["Adam QRNN"]
    flags = ["--data", corpus, *SHORT, *own, *EPOCHS, "--resume", "auto", *OFTEN]
    for batch in (9, 12):
        running = start(*flags, cwd=tmp_path)
        running.wait_for(seen(2 if batch == 9 else 3, batch))
        running.kill(signal.SIGKILL)
        text = running.result().out
        found = "no run of m.pt yet, starts one" if batch == 9 else "goes on with m.pt"
        assert text.splitlines()[0] == f"| --resume auto: {found}"
    result = run_cli(*flags, cwd=tmp_path)
    assert_same_end(tmp_path, result, trained(*own, *EPOCHS))
    before = (tmp_path / "m.pt").read_bytes()
    again = run_cli(*flags, cwd=tmp_path)
    assert again.status == 0, again
    assert again.out.splitlines()[-2] == result.out.splitlines()[-2]
    assert "batches" not in again.out
    assert (tmp_path / "m.pt").read_bytes() == before


def test_resume_auto_does_no_step_past_max_steps(lstm, tmp_path):
    """A job that had reached --max_steps in mid-epoch is over."""
    flags, _ = lstm
    flags = [*flags, "--resume", "auto", "--max_steps", 27]
    first, second = (run_cli(*flags, cwd=tmp_path) for _ in range(2))
    assert second.status == 0, second
    assert second.out.splitlines()[-2] == first.out.splitlines()[-2]
    assert load(tmp_path / "m.pt.state")["progress"]["step"] == 27


def test_resume_auto_fine_tunes_a_trained_model(trained, tmp_path):
    """main.py's state is none to go on with: a new fine-tuning; after that its own is."""
    good = trained("--epochs", 2)
    for suffix in ("", ".state"):
        shutil.copy(f"{good.path}{suffix}", tmp_path / f"m.pt{suffix}")
    flags = ["--save", "m.pt", "--lr", 2, "--epochs", 2, "--resume", "auto"]
    first = run_cli(*flags, cwd=tmp_path, script="finetune.py")
    assert first.status == 0, first
    assert "| before fine-tuning" in first.out
    again = run_cli(*flags, cwd=tmp_path, script="finetune.py")
    assert again.status == 0, again
    assert "before fine-tuning" not in again.out
    assert again.out.splitlines()[-2] == first.out.splitlines()[-2]


@pytest.mark.parametrize("script", ["main.py", "finetune.py"])
def test_resume_auto_needs_a_name(corpus, tmp_path, script):
    """Without --save every job would have a name of its own."""
    result = run_cli("--data", corpus, "--resume", "auto", cwd=tmp_path, script=script)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result
    assert "--save" in result.err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max_minutes", "-1"),
        ("--checkpoint_minutes", "nan"),
        ("--keep_last", "1.5"),
        ("--resume", "auto.pt"),
    ],
)
def test_a_bad_flag(corpus, tmp_path, flag, value):
    """Status 2 and one line that names the flag and has the value."""
    result = run_cli("--data", corpus, "--save", "m.pt", flag, value, cwd=tmp_path)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result
    assert flag in result.err
    assert value in result.err


def test_keep_last(lstm, tmp_path):
    """The newest states stay under their steps, the older ones go; each of them can be gone on from."""
    flags, whole = lstm
    often = ["--checkpoint_every", 9, "--keep_last", 3]
    result = run_cli(*flags, *often, cwd=tmp_path)
    assert_same_end(tmp_path, result, whole)
    last = load(tmp_path / "m.pt.state")["progress"]["step"]
    steps = sorted(int(p.suffix[1:]) for p in tmp_path.glob("m.pt.state.*"))
    assert len(steps) == 3
    assert steps[-1] == last
    assert [load(tmp_path / f"m.pt.state.{step}")["progress"]["step"] for step in steps] == steps
    assert steps[0] < last - 1, "the older ones are from before the last epoch's end"

    before = (tmp_path / f"m.pt.state.{steps[0]}").read_bytes()
    flags = ["--resume", f"m.pt.state.{steps[0]}"]
    elsewhere = run_cli(*flags, "--save", "new/m.pt", cwd=make(tmp_path / "new"))
    assert_same_end(tmp_path / "new", elsewhere, whole)
    assert (tmp_path / f"m.pt.state.{steps[0]}").read_bytes() == before
    assert_same_end(tmp_path, run_cli(*flags, cwd=tmp_path), whole)


def make(folder: Path) -> Path:
    """Makes a folder; returns the one above it."""
    folder.mkdir()
    return folder.parent


def test_going_back_never_replaces_a_better_model(corpus, tmp_path):
    """From an older state at a useless rate: the better model of the later steps stays, and is tested."""
    flags = ["--data", corpus, *SHORT, "--epochs", 3, "--checkpoint_every", 30, "--keep_last", 9]
    first = run_cli(*flags, cwd=tmp_path)
    assert first.status == 0, first
    before = (tmp_path / "m.pt").read_bytes()
    step = sorted(int(p.suffix[1:]) for p in tmp_path.glob("m.pt.state.*"))[1]
    state = load(tmp_path / f"m.pt.state.{step}")["progress"]
    assert load(tmp_path / "m.pt")["metrics"]["step"] > step
    assert state["best_loss"] > load(tmp_path / "m.pt")["metrics"]["valid_loss"]
    result = run_cli("--resume", f"m.pt.state.{step}", "--lr", 100, "--clip", 9, cwd=tmp_path)
    assert result.status == 0, result
    assert "kept until a better one" in result.out
    assert result.out.splitlines()[-2] == first.out.splitlines()[-2]
    assert (tmp_path / "m.pt").read_bytes() == before


def on_terminal(*argv: object, cwd: Path, ctrl_c_at: str = "") -> tuple[int, str]:
    """The exit status of main.py, and all that it wrote, on a terminal of 120 columns."""
    pid, master = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        os.chdir(cwd)
        command = [sys.executable, str(ROOT / "main.py"), *map(str, argv)]
        os.execve(sys.executable, command, os.environ | ENVIRONMENT)
    written, pressed = b"", False
    with contextlib.suppress(OSError):  # the terminal's end
        while chunk := os.read(master, 4096):
            written += chunk
            if ctrl_c_at and not pressed and re.search(ctrl_c_at, written.decode()):
                os.write(master, b"\x03")
                pressed = True
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode()


def screen(written: str) -> list[str]:
    """What is left on a terminal's screen: carriage return, erasing, and overwriting are carried out."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[K|\x1b\[A|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif part == "\n":
            lines.append("")
        elif part == "\r":
            column = 0
        else:
            assert part != "\x1b[A"
            lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def without_times(lines: list[str]) -> list[str]:
    kept = [re.sub(r"(ms/batch|time:) +[\d.]+s?", r"\1", line) for line in lines if line]
    return [line for line in kept if not line.startswith("Args")]


def test_a_bar_on_a_terminal(corpus, tmp_path):
    """It shows where the epoch stands and is gone at its end: the lines that stay are those of a file."""
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--epochs", 2]
    status, written = on_terminal(*flags, cwd=tmp_path)
    assert status == 0, written
    bar = r"epoch +1 \|.{20}\| +\d+% [\d.]+k?/1\.45k tokens, .*tokens/s, \d+:\d+ left, loss \d.*ppl \d"
    assert re.search(bar, written), written
    plain = run_cli(*flags, cwd=make(tmp_path / "plain") / "plain")
    assert without_times(screen(written)) == without_times(plain.out.splitlines())
    assert "tokens/s" not in plain.out
    assert "\r" not in plain.out


def test_ctrl_c_leaves_no_bar_behind(corpus, tmp_path):
    """The line that says how to go on stands alone, and so do all others."""
    flags = ["--data", corpus, *SMALL, *OFTEN, "--save", "m.pt", "--epochs", 400]
    status, written = on_terminal(*flags, cwd=tmp_path, ctrl_c_at=r"end of epoch +2 ")
    assert status == 0, written
    lines = screen(written)
    assert not [line for line in lines if "tokens/s" in line or "^C" in line.lstrip("^C")], lines
    assert any(line.startswith("| stopped; go on with: ") for line in lines)
    assert all(re.match(r"\||-+$|=+$|Args|Model|$", line) for line in lines), lines


def test_the_log_says_more_than_the_lines(lstm):
    """A start, gradient norms and tokens a second, and the switch to averaging where it was printed."""
    _, whole = lstm
    assert whole.log("start") == [{"kind": "start", "script": "main.py", "epoch": 1, "batch": 0, "step": 0}]
    for entry in whole.log("train"):
        assert entry["grad_norm"] > 0
        assert entry["tokens_per_s"] > 0
    (switch,) = whole.log("averaging")
    assert [entry["averaged"] for entry in whole.log("valid")] == [
        entry["epoch"] > switch["epoch"] for entry in whole.log("valid")
    ]


@pytest.mark.parametrize("clip", [1, 0])
def test_tensorboard(corpus, tmp_path, clip):
    """The log's figures, unrounded, and the norms of weights and gradient, though nothing may be clipped."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*SHORT, "--nonmono", 0, "--lr", 20 if clip else 2, "--clip", clip, *EPOCHS]
    result = run_cli("--data", corpus, *flags, "--tensorboard", "tb", cwd=tmp_path)
    assert result.status == 0, result
    events = EventAccumulator(str(tmp_path / "tb" / "m.pt")).Reload()
    log = [*map(json.loads, (tmp_path / "m.pt.log.jsonl").read_text().splitlines())]
    train, valid = ([e for e in log if e["kind"] == kind] for kind in ("train", "valid"))
    tags = {name: name for name in ("grad_norm", "tokens_per_s")}
    for tag, name in {**tags, "loss/train": "loss", "ppl/train": "ppl", "rate": "lr"}.items():
        entries = train if tag != "rate" else [e for e in log if "lr" in e]
        found = [(scalar.step, scalar.value) for scalar in events.Scalars(tag)]
        assert found == [(e["step"], pytest.approx(e[name], rel=1e-6)) for e in entries], tag
    assert [s.value for s in events.Scalars("averaging")] == [float(e["averaged"]) for e in valid]
    norms = [s.value for s in events.Scalars("weight_norm/model.encoder.weight")]
    assert len(norms) == len(train)
    if clip:
        assert any("averaging" in tag for tag in events.Tags()["tensors"])


@pytest.mark.parametrize("bad", ["missing package", "a file in the way"])
def test_tensorboard_that_cannot_be_had(corpus, tmp_path, monkeypatch, bad):
    """One line before any training: what to install, or that the folder cannot be written."""
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--tensorboard", "tb"]
    if bad == "missing package":
        (tmp_path / "tensorboard.py").write_text("raise ImportError\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        result = run_fresh(*flags, cwd=tmp_path)
        assert "pip install tensorboard" in result.err
    else:
        (tmp_path / "tb").touch()
        result = run_cli(*flags, cwd=tmp_path)
        assert "--tensorboard tb" in result.err
    assert (result.status, len(result.err.splitlines())) == (2, 1), result
