"""Long runs: full disks, kills while writing, time limits, --resume auto."""

import contextlib
import errno
import io
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import load
from runner import PRELUDE, Running, assert_refused, is_stopped, run_cli, signal_itself, start
from test_resume_cli import EPOCHS, RUNS, SHORT, assert_same_end, seen
from toys import NO_DROPOUT_FLAGS, call

import main
from harness import files

# A state of a megabyte or two: writing one takes a while, and it does not fit where little is left.
LARGE = ["--emsize", 16, "--nhid", 250, "--nlayers", 2, "--batch_size", 4, "--bptt", 14, "--lr", 5]
OFTEN = ["--log-interval", 1, "--checkpoint_every", 1, "--device", "cpu"]
# It gets better epoch after epoch.
STEADY = ["--lr", 0.3, *NO_DROPOUT_FLAGS]
FIT = 200_000  # bytes: more than what is printed, less than a model


def temporaries(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.tmp")}


@contextlib.contextmanager
def stopped_between_writes(running: Running, folder: Path) -> Iterator[None]:
    """Stops the run at a moment when it is writing no file. A file that it then gave up would free space."""
    try:
        while True:
            running.kill(signal.SIGSTOP)
            running.wait_for(lambda _: is_stopped(running.process.pid))
            if not temporaries(folder):
                break
            running.kill(signal.SIGCONT)
            time.sleep(0.005)
        yield
    finally:
        running.kill(signal.SIGCONT)


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
        full = contextlib.suppress(OSError)
        with stopped_between_writes(running, self.folder), full, self.ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(2**12))

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


def train_until_full(disk: Disk, corpus: Path, tmp_path: Path) -> Running:
    """A run whose disk is full since its second epoch, and that has tried to write both files after that."""
    flags = ["--data", corpus, *LARGE, *STEADY, *OFTEN, "--save", disk.folder / "m.pt", "--epochs", 500]
    running = start(*flags, cwd=tmp_path)
    running.wait_for(lambda out: out.count("end of epoch") >= 1 and seen(2, 1)(out))
    disk.fill(running)
    running.wait_for(lambda _: running.err.read_text().count("cannot be written") == 2)
    return running


def test_a_disk_that_fills_costs_no_run(disk, corpus, tmp_path):
    """Each file is named once and stays whole while the run goes on; with space again a better one comes."""
    running = train_until_full(disk, corpus, tmp_path)
    model, state = disk.folder / "m.pt", disk.folder / "m.pt.state"
    kept, reached = load(model)["metrics"], load(state)["at"]["epoch"]
    assert kept["epoch"] <= reached <= kept["epoch"] + 1

    disk.free(running)
    running.wait_for(lambda _: load(model)["metrics"]["epoch"] > kept["epoch"] and load(state)["at"]["epoch"] > reached)
    running.kill(signal.SIGTERM)
    result = running.result()
    assert result.status == 143, result
    assert sorted(re.findall(r"(?m)^main.py: warning: \S*(m.pt\S*): cannot be written", result.err)) == [
        "m.pt",
        "m.pt.state",
    ]
    assert len(result.err.splitlines()) == 2
    assert result.err.count("tries again") == 2
    at = load(state)["at"]
    assert load(model)["metrics"]["valid_loss"] == at["best_loss"] < kept["valid_loss"]
    assert not temporaries(disk.folder)


def test_a_disk_that_stays_full_is_an_error_at_the_end(disk, corpus, tmp_path):
    """The last attempt failed: status 1 and one line more; the old files are whole."""
    running = train_until_full(disk, corpus, tmp_path)
    kept = [load(disk.folder / name) for name in ("m.pt", "m.pt.state")]
    running.kill(signal.SIGINT)
    result = running.result()
    assert result.status == 1, result
    assert len(result.err.splitlines()) == 3
    assert re.search(r"main.py: error: \S*m.pt\S*: cannot be written \(.*\), .* kept; .*\n$", result.err)
    assert load(disk.folder / "m.pt")["metrics"] == kept[0]["metrics"]
    assert load(disk.folder / "m.pt.state")["at"] == kept[1]["at"]
    assert not temporaries(disk.folder)


class FullDisk(io.StringIO):
    """Standard output on a disk that is full whenever a line with one of `words` is due."""

    def __init__(self, *words: str) -> None:
        super().__init__()
        self.words = words

    def write(self, text: str) -> int:
        if any(word in text for word in self.words):
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_lines_that_a_full_disk_does_not_take_cost_no_run(corpus, tmp_path, monkeypatch):
    """`main.py ... > log` on a full disk: training goes on. A result that cannot be printed is an error."""
    flags = ["--data", corpus, *SHORT, "--epochs", 2, "--save", tmp_path / "m.pt"]
    monkeypatch.setattr(sys, "stdout", FullDisk("ms/batch", "end of epoch"))
    monkeypatch.setattr(sys, "stderr", FullDisk("warning"))
    monkeypatch.setattr(files, "copy", lambda *_: (_ for _ in ()).throw(files.NotWrittenError("m.pt.e1", "full")))
    assert call(main, *flags, "--when", 1) == 0
    assert "End of training" in sys.stdout.getvalue()
    assert load(tmp_path / "m.pt.state")["at"]["epoch"] == 3
    monkeypatch.setattr(sys, "stdout", FullDisk("End of training"))
    assert call(main, "--resume", tmp_path / "m.pt", "--epochs", 3) == 1
    assert "No space left on device" in sys.stderr.getvalue()


def test_a_copy_that_cannot_be_written_is_told_once_and_costs_no_status(corpus, tmp_path):
    """`--when` keeps copies of the model; a folder of that name is in the way."""
    (tmp_path / "m.pt.e1").mkdir()
    result = run_cli("--data", corpus, *SHORT, "--epochs", 2, "--when", 1, cwd=tmp_path)
    assert result.status == 0, result
    assert re.fullmatch(r"main.py: warning: m.pt.e1: cannot be written \(.*\n", result.err)


def test_killed_in_mid_write(corpus, tmp_path):
    """One command, killed again and again while it writes: whole files, nothing piles up, it goes on."""
    flags = ["--data", corpus, *LARGE, *OFTEN, "--save", "m.pt", "--resume", "auto"]
    rng, step = random.Random(5), 0
    for _ in range(6):
        running = start(*flags, "--epochs", 100, cwd=tmp_path)
        lines = rng.randrange(2, 30)
        running.wait_for(lambda out, lines=lines: out.count("ms/batch") >= lines)
        time.sleep(rng.uniform(0, 0.03))
        running.kill(signal.SIGKILL)
        assert running.result().status == -signal.SIGKILL
        before, step = step, load(tmp_path / "m.pt.state")["at"]["step"]
        assert step > before
        if (tmp_path / "m.pt").exists():
            load(tmp_path / "m.pt")
        assert len(temporaries(tmp_path)) <= 2
    (tmp_path / "m.pt.01234567.tmp").touch()
    assert run_cli(*flags, "--epochs", 1, cwd=tmp_path).status == 0
    assert not temporaries(tmp_path)


def test_a_killed_run_takes_no_lock_with_it(tmp_path):
    """Runs of these tests share no lock, tqdm's least of all: one killed while it holds it stops no other."""
    (tmp_path / "holds.py").write_text(
        "import sys, time\nfrom tqdm import tqdm\n"
        "tqdm.get_lock().acquire()\nprint('held')\ntime.sleep('wait' in sys.argv and 99)\n"
    )
    running = start("wait", cwd=tmp_path, script=str(tmp_path / "holds.py"))
    running.wait_for(lambda out: "held" in out)
    running.kill(signal.SIGKILL)
    assert running.result().status == -signal.SIGKILL
    assert run_cli(cwd=tmp_path, script=str(tmp_path / "holds.py")) == (0, "held\n", "")


@pytest.fixture
def lstm(trained, corpus):
    """The averaging LSTM's flags, and its whole run."""
    flags = RUNS["averaging LSTM"]
    return ["--data", corpus, *SHORT, *flags, *EPOCHS], trained(*flags, *EPOCHS)


def test_max_minutes(lstm, tmp_path):
    """Status 0, no test, the state saved; the last line says how to go on."""
    flags, whole = lstm
    result = run_cli(*flags, "--max_minutes", 0.002, cwd=tmp_path)
    assert result.status == 0, result
    assert "End of" not in result.out.replace("end of epoch", "")
    assert result.out.splitlines()[-1] == "| stopped (--max_minutes); --resume m.pt goes on"
    assert_same_end(tmp_path, run_cli("--resume", "m.pt", cwd=tmp_path), whole)


def test_resume_auto_is_one_command_for_all_jobs(trained, corpus, tmp_path):
    """Killed, submitted again, ended, submitted again: the whole run's end; then it just tests.

    The rate that --when has divided is not taken back by the --lr of the same command.
    """
    own = RUNS["Adam QRNN"]
    flags = ["--data", corpus, *SHORT, *own, *EPOCHS, "--resume", "auto", *OFTEN]
    for batch in (9, 12):
        killed = signal_itself(signal.SIGKILL, 2 if batch == 9 else 3, batch)
        result = start(killed, "main.py", *flags, cwd=tmp_path, script=PRELUDE).result()
        assert result.status == -signal.SIGKILL
        text = result.out
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
    assert load(tmp_path / "m.pt.state")["at"]["step"] == 27


def test_resume_auto_fine_tunes_a_trained_model(trained, tmp_path):
    """main.py's state is none to go on with, a new one begins; its own is; and then main.py just tests."""
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
    over = run_cli("--save", "m.pt", "--resume", "auto", "--data", good.saved["args"]["data"], cwd=tmp_path)
    assert over.out.splitlines()[0].startswith("| --resume auto: finetune.py has gone on with m.pt"), over
    assert over.out.splitlines()[-2] == first.out.splitlines()[-2]


@pytest.mark.parametrize("script", ["main.py", "finetune.py"])
def test_resume_auto_needs_a_name(corpus, tmp_path, script):
    """Without --save every job would have a name of its own."""
    result = run_cli("--data", corpus, "--resume", "auto", cwd=tmp_path, script=script)
    assert_refused(result, 2, "--save")
