"""One run per --save: a second one waits, then goes on or ends. And all that ends a run from outside."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Trained, load, read_log
from runner import (
    ENVIRONMENT,
    PRELUDE,
    ROOT,
    WALL_S,
    Result,
    Running,
    assert_refused,
    is_stopped,
    run_cli,
    signal_itself,
    start,
)
from test_parallel import run_ranks
from test_resume_cli import EPOCHS, RUNS, SHORT, assert_same_end, seen
from toys import call

import finetune
import harness.start
import main
import utils

LONG = ["--epochs", 9000, "--log-interval", 1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def flags(corpus) -> list[object]:
    """An averaging run; to be followed by EPOCHS or LONG."""
    return ["--data", corpus, *SHORT, *RUNS["averaging LSTM"]]


@pytest.fixture(scope="module")
def whole(trained) -> Trained:
    return trained(*RUNS["averaging LSTM"], *EPOCHS)


@contextlib.contextmanager
def a_run(flags: list[object], folder: Path, epoch: int = 2) -> Iterator[Running]:
    """A run that goes on while the block is entered, from this epoch on."""
    running = start(*flags, *LONG, cwd=folder)
    try:
        running.wait_for(seen(epoch, 1))
        yield running
    finally:
        running.kill(signal.SIGKILL)
        running.process.join(WALL_S)


def steps(out: str) -> int:
    """The number of steps of a run that logs each of them."""
    return len(re.findall(r"(?m)^\| epoch .* ms/batch", out))


# The lock


@pytest.mark.parametrize("name", ["m.pt", "./link/../m.pt"])
def test_a_second_run_is_refused(flags, tmp_path, monkeypatch, capsys, name):
    """It waits for a while, says so, and ends with one line; the first run has not noticed anything."""
    monkeypatch.setattr(harness.start, "PATIENCE_S", 0.3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").mkdir()
    with a_run(flags, tmp_path) as first:
        begin = time.monotonic()
        assert call(main, *flags, *LONG, "--save", name, "--resume", "auto", "--max_steps", 1) == 2
        assert time.monotonic() - begin > 0.3
        out, err = capsys.readouterr()
        assert len(re.findall("another run is writing it; waits", out)) == len(out.splitlines()) == 1
        assert_refused(Result(2, "", err), 2, f"--save {name}: another run is writing it", "another --save")
        assert call(main, "--resume", "m.pt", "--max_steps", 1) == 2
        assert call(main, *flags, *LONG, "--save", "other.pt", "--max_steps", 1) == 0
        first.kill(signal.SIGTERM)
        result = first.result()
    assert (result.status, result.err) == (143, "")
    assert [entry["kind"] for entry in read_log(tmp_path / "m.pt.log.jsonl")].count("start") == 1


def test_a_second_run_goes_on_where_the_first_one_ends(flags, tmp_path):
    """It reads the state only once the first run has ended: what that writes last is where it goes on."""
    patient = "import harness.start; harness.start.PATIENCE_S = 400"
    with a_run(flags, tmp_path) as first:
        line = patient, "main.py", *flags, *LONG, "--resume", "auto", "--max_steps", 1
        second = start(*line, cwd=tmp_path, script=PRELUDE)
        second.wait_for(lambda out: "another run is writing it" in out)
        done = steps(first.out.read_text())
        first.wait_for(lambda out: steps(out) > done + 2)
        first.kill(signal.SIGTERM)
        assert first.result().status == 143
        result = second.result()
    assert result.status == 0, result
    assert "| --resume auto: goes on with m.pt\n" in result.out
    assert load(tmp_path / "m.pt.state")["at"]["step"] == steps(first.out.read_text()) > done + 2


def test_a_killed_run_leaves_no_lock(flags, tmp_path, monkeypatch, capsys):
    """SIGKILL: the next run does not wait at all."""
    monkeypatch.setattr(harness.start, "PATIENCE_S", -1)
    monkeypatch.chdir(tmp_path)
    with a_run(flags, tmp_path) as first:
        first.kill(signal.SIGKILL)
        assert first.result().status == -signal.SIGKILL
    assert call(main, *flags, *LONG, "--resume", "auto", "--max_steps", 1) == 0
    assert "another run" not in capsys.readouterr().out


def test_fine_tuning_locks_what_it_writes(flags, base, monkeypatch, capsys):
    """With --output another file than --save: a run that writes --save goes on beside it."""
    monkeypatch.setattr(harness.start, "PATIENCE_S", 0)
    monkeypatch.chdir(base)
    tune = start(
        "--save", "m.pt", "--output", "b.pt", "--lr", 1, *LONG, "--nonmono", 9000, cwd=base, script="finetune.py"
    )
    try:
        tune.wait_for(seen(1, 2))
        assert call(main, *flags, "--save", "b.pt", "--epochs", 1) == 2
        assert call(main, *flags, "--max_steps", 1) == 0
    finally:
        tune.kill(signal.SIGKILL)
        tune.process.join(WALL_S)
    assert "b.pt: another run" in capsys.readouterr().err


def test_fine_tuning_for_no_epoch_writes_too(base, monkeypatch):
    """finetune.py --epochs 0 --output B makes B and its state: not while another run has B."""
    monkeypatch.setattr(harness.start, "PATIENCE_S", 0)
    monkeypatch.chdir(base)
    with (base / "b.pt.log.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert call(finetune, "--save", "m.pt", "--output", "b.pt", "--epochs", 0) == 2
    assert not (base / "b.pt").exists()


def test_two_runs_that_start_together(flags, whole, tmp_path):
    """One trains, the other one waits and finds that nothing is left to do; both end as one alone does."""
    patient = "import harness.start; harness.start.PATIENCE_S = 400"
    line = patient, "main.py", *flags, *EPOCHS, "--resume", "auto"
    both = [running.result() for running in [start(*line, cwd=tmp_path, script=PRELUDE) for _ in range(2)]]
    for result in both:
        assert_same_end(tmp_path, result, whole)
    assert sorted(steps(result.out) > 0 for result in both) == [False, True]
    assert sum("another run is writing it" in result.out for result in both) <= 1


def test_evaluating_beside_a_run(flags, corpus, tmp_path):
    """Nothing that reads a model waits for the run that trains it."""
    (tmp_path / "text").write_text("w1 w2 w3\n")
    with a_run(flags, tmp_path) as first:
        for script, *line in (
            ["main.py", "--resume", "m.pt", "--epochs", 0],
            ["score.py", "--save", "m.pt", "text"],
            ["pointer.py", "--save", "m.pt", "--window", 5],
            ["dynamiceval.py", "--save", "m.pt"],
            ["generate.py", "--save", "m.pt", "--words", 5],
        ):
            result = run_cli(*line, cwd=tmp_path, script=script)
            assert (result.status, "another run" in result.out + result.err) == (0, False), result
        first.kill(signal.SIGTERM)
        assert first.result().status == 143
    assert read_log(tmp_path / "m.pt.log.jsonl")  # every line is whole


def test_where_there_are_no_locks_a_warning_says_so(flags, tmp_path, monkeypatch, capsys):
    """Once; and the run goes on, whoever else writes."""
    monkeypatch.chdir(tmp_path)
    for module in (utils, harness.start):
        monkeypatch.setattr(module, "try_lock", lambda file: None)
    with (tmp_path / "m.pt.log.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert call(main, *flags, "--epochs", 1) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"main.py: warning: \S+m.pt.log.jsonl: cannot be locked here; .*\n", err)
    assert "another run" not in out


def test_a_run_that_does_not_begin_leaves_no_log(flags, tmp_path, monkeypatch):
    """Nor does it remove one that another run holds, empty as it may be."""
    monkeypatch.setattr(harness.start, "PATIENCE_S", 0)
    monkeypatch.chdir(tmp_path)
    assert call(main, *flags, "--data", "nowhere") == 2
    assert call(main, "--resume", "m.pt") == 2
    assert not list(tmp_path.iterdir())
    with (tmp_path / "m.pt.log.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert call(main, *flags, "--epochs", 1) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt.log.jsonl"]


def test_a_log_that_is_linked_to_a_device_stays(flags, tmp_path, monkeypatch):
    """`ln -s /dev/null m.pt.log.jsonl`: no log is wanted. The device looks like an empty file, and is not removed."""
    removed, unlink = [], os.unlink

    def watched(path: str, *rest: object, **how: object) -> None:
        removed.append(str(path))
        if str(path) != os.devnull:
            unlink(path, *rest, **how)

    monkeypatch.setattr(os, "unlink", watched)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pt.log.jsonl").symlink_to(os.devnull)
    assert call(main, *flags, "--epochs", 1) == 0
    assert os.devnull not in removed


def test_a_place_that_cannot_be_written_is_bad_usage(flags, tmp_path):
    """A folder that is read-only, or a folder in the place of the log: a line that names it, status 2."""
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "m.pt.log.jsonl").mkdir()
    for name in ("closed/m.pt", "m.pt"):
        result = run_cli(*flags, "--epochs", 1, "--save", name, cwd=tmp_path, permissions=True)
        assert_refused(result, 2, name, "; ")


# Signals, and streams that are closed


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 129), ("SIGUSR1", 138), ("SIGTERM", 143)])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_signal_writes_the_state(flags, whole, tmp_path, name, status, epoch):
    """Before the first model too: a line, the status of the signal, and an exact resume."""
    line = signal_itself(getattr(signal, name), epoch, 3), "main.py", *flags, *EPOCHS
    result = start(*line, cwd=tmp_path, script=PRELUDE).result()
    assert (result.status, result.err) == (status, ""), result
    assert result.out.splitlines()[-1] == f"| stopped ({name}); --resume m.pt goes on"
    assert load(tmp_path / "m.pt.state")["at"]["epoch"] == epoch
    assert_same_end(tmp_path, run_cli("--resume", "m.pt", cwd=tmp_path), whole)


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 129), ("SIGUSR1", 138), ("SIGTERM", 143)])
def test_a_signal_before_the_first_step(flags, tmp_path, name, status):
    """There is nothing to save yet: the status of the signal, no traceback, nothing left behind."""
    code = f"import os, signal, train; train.start_run = lambda start: os.kill(os.getpid(), signal.{name})"
    result = start(code, "main.py", *flags, *EPOCHS, cwd=tmp_path, script=PRELUDE).result()
    assert (result.status, result.err) == (status, ""), result
    assert not list(tmp_path.glob("m.pt*"))


def test_nohup(flags, whole, tmp_path):
    """SIGHUP that is ignored when the run starts stays ignored; SIGUSR1 too."""
    code = "import signal\nfor name in ('HUP', 'USR1'): signal.signal(getattr(signal, f'SIG{name}'), signal.SIG_IGN)"
    line = code, "main.py", *flags, *EPOCHS, "--log-interval", 1
    running = start(*line, cwd=tmp_path, script=PRELUDE)
    for epoch, number in ((1, signal.SIGHUP), (2, signal.SIGUSR1)):
        running.wait_for(seen(epoch, 3))
        running.kill(number)
    assert_same_end(tmp_path, running.result(), whole)


@contextlib.contextmanager
def piped(*line: object, cwd: Path, **how: object) -> Iterator[subprocess.Popen]:
    """A process whose stdout is a pipe, closed at the end of the block; killed if it does not end in time."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        list(map(str, line)), cwd=cwd, env=environment | ENVIRONMENT, stdout=subprocess.PIPE, text=True, **how
    )  # fmt: skip
    try:
        with process.stdout:
            yield process
        process.wait(WALL_S)
    finally:
        process.kill()


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_closed_stdout_writes_the_state(flags, whole, tmp_path, unbuffered):
    """`| head`: the next line that cannot be printed ends the run with the status of SIGPIPE and a line on stderr."""
    code = signal_itself(signal.SIGSTOP, 2, 3)
    line = sys.executable, *unbuffered, ROOT / PRELUDE, code, "main.py", *flags, *EPOCHS, "--log-interval", 1
    with (tmp_path / "err").open("w") as err, piped(*line, cwd=tmp_path, stderr=err) as process:
        while not is_stopped(process.pid):
            assert process.poll() is None
            time.sleep(0.01)
        process.stdout.close()
        process.send_signal(signal.SIGCONT)
    assert process.returncode == 141
    assert (tmp_path / "err").read_text() == "main.py: warning: | stopped (SIGPIPE); --resume m.pt goes on\n"
    assert load(tmp_path / "m.pt.state")["at"]["epoch"] == 2
    assert_same_end(tmp_path, run_cli("--resume", "m.pt", cwd=tmp_path), whole)


def test_a_closed_stdout_and_stderr_write_the_state(flags, tmp_path):
    """`2>&1 | head -1`: nobody can be told."""
    line = sys.executable, ROOT / "main.py", *flags, *LONG
    with piped(*line, cwd=tmp_path, stderr=subprocess.STDOUT) as process:
        process.stdout.readline()
    assert process.returncode == 141
    assert load(tmp_path / "m.pt.state")["at"]["step"] >= 1


@pytest.mark.parametrize("when", ["before the first step", "at the test"])
def test_a_stdout_that_is_closed_outside_training(flags, whole, tmp_path, when):
    """The status says that the run was cut short by a closed pipe, as that of any command does."""
    code = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); sys.stdout = os.fdopen(1, 'w')"
    if when == "at the test":
        code = f"import train\ntest = train.test\ndef closing(*args): exec({code!r}); test(*args)\ntrain.test = closing"
    result = start(code, "main.py", *flags, *EPOCHS, "--resume", "auto", cwd=tmp_path, script=PRELUDE).result()
    assert (result.status, "Traceback" in result.err) == (141, False), result
    assert_same_end(tmp_path, run_cli(*flags, *EPOCHS, "--resume", "auto", cwd=tmp_path), whole)


def in_shell(line: str, cwd: Path) -> subprocess.CompletedProcess:
    """A line of a shell; PYTHON and ROOT stand for what they say."""
    environment = os.environ | ENVIRONMENT | {"PYTHON": sys.executable, "ROOT": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, timeout=WALL_S
    )  # fmt: skip


def test_closed_streams(flags, base):
    """All three closed: the work is done, into the right files. What goes wrong still has its status."""
    (base / "text").write_text("w1 w2 w3\n")
    line = " ".join(map(str, [*flags, "--epochs", 1, "--save", "n.pt"]))
    assert in_shell(f'"$PYTHON" "$ROOT/main.py" {line} <&- >&- 2>&-', base).returncode == 0
    assert load(base / "n.pt")["metrics"]["epoch"] == load(base / "n.pt.state")["at"]["epoch"] - 1 == 1
    assert {entry["kind"] for entry in read_log(base / "n.pt.log.jsonl")} == {"start", "train", "valid", "test"}
    before = (base / "text").read_bytes()
    assert in_shell('"$PYTHON" "$ROOT/score.py" --save m.pt text <&- >&- 2>&-', base).returncode == 0
    assert in_shell('"$PYTHON" "$ROOT/score.py" --save nowhere.pt text <&- >&- 2>&-', base).returncode == 2
    end = in_shell('"$PYTHON" "$ROOT/score.py" --save m.pt - <&-', base)
    assert_refused(Result(end.returncode, end.stdout, end.stderr), 2, "-: is empty")
    assert (base / "text").read_bytes() == before


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_left_over_rank_changes_nothing(base, corpus, rank):
    """In an environment where torchrun once was, scripts for one process do their work."""
    left = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
    for script, *line in (
        ["score.py", "--save", "m.pt", corpus / "test.txt"],
        ["prepare.py", corpus / "train.txt", "--documents", "lines", "--out", "out"],
    ):
        found, expected = (run_cli(*line, cwd=base, script=script, environment=each) for each in (left, {}))
        assert found == expected
        assert found.status == 0
        assert found.out
    alone = run_cli("--resume", "m.pt", "--epochs", 0, cwd=base, environment={"RANK": rank})
    assert alone.status == 0, alone


# torchrun


class Torchrun:
    """torchrun with two ranks of main.py that run `code` first; each has the file pid.RANK once it has begun."""

    def __init__(self, code: str, *argv: object, cwd: Path) -> None:
        pid = (
            "import os; open('pid.new', 'w').write(str(os.getpid())); os.rename('pid.new', 'pid.' + os.environ['RANK'])"
        )
        pid = pid.replace("'pid.new'", "f'new.{os.getpid()}'")
        line = [*TORCHRUN, ROOT / PRELUDE, f"{pid}\n{code}", "main.py", *argv]
        self.folder, self.out = cwd, cwd / "out"
        with self.out.open("w") as out, (cwd / "err").open("w") as err:
            self.process = subprocess.Popen(
                list(map(str, line)), cwd=cwd, env=os.environ | ENVIRONMENT, stdout=out, stderr=err
            )  # fmt: skip

    def __enter__(self) -> "Torchrun":
        self.wait_for(lambda: all((self.folder / f"pid.{rank}").exists() for rank in (0, 1)))
        self.pids = [int((self.folder / f"pid.{rank}").read_text()) for rank in (0, 1)]
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for pid in filter(is_alive, self.pids):
            os.kill(pid, signal.SIGKILL)

    def wait_for(self, done: Callable[[], bool], limit_s: float = WALL_S) -> None:
        end = time.monotonic() + limit_s
        while not done():
            assert time.monotonic() < end, self.out.read_text() + (self.folder / "err").read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL to torchrun; its ranks have to end, as promised within ten seconds, on a busy machine a bit later."""
        self.process.kill()
        self.process.wait()
        self.wait_for(lambda: not any(map(is_alive, self.pids)), 60)


def is_alive(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_ranks_end_with_torchrun(flags, tmp_path):
    """As by SIGTERM: the state is written, and two ranks go on from it."""
    with Torchrun("", *flags, *LONG, cwd=tmp_path) as torchrun:
        torchrun.wait_for(lambda: bool(seen(2, 2)(torchrun.out.read_text())))
        torchrun.kill()
    out = torchrun.out.read_text()
    assert out.endswith("\n| stopped (SIGTERM); --resume m.pt goes on\n")
    step = load(tmp_path / "m.pt.state")["at"]["step"]
    assert step == steps(out)
    assert run_ranks(2, "--resume", "m.pt", "--max_steps", step + 2, cwd=tmp_path).status == 0


def test_ranks_that_hang_end_with_torchrun(flags, tmp_path):
    """One that is deaf to signals, and one that waits for it."""
    deaf = "import time, train\nif os.environ['RANK'] == '1': train.train_step = lambda *_: print(time.sleep(9999))"
    with Torchrun(deaf, *flags, *LONG, cwd=tmp_path) as torchrun:
        torchrun.wait_for(lambda: "Args:" in torchrun.out.read_text())
        torchrun.kill()


def test_ranks_end_with_a_torchrun_that_is_killed_while_they_start(flags, tmp_path):
    """While they import torch, before they can know whose children they are."""
    orphaned = "import time; parent, end = os.getppid(), time.time() + 99\n"
    orphaned += "while os.getppid() == parent and time.time() < end: time.sleep(0.01)"
    with Torchrun(orphaned, *flags, *LONG, cwd=tmp_path) as torchrun:
        torchrun.kill()
    assert not (tmp_path / "m.pt.state").exists()
