"""What a person sees of a run: the log beside the model, the bar on a terminal, TensorBoard."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import SMALL, read_log
from runner import ENVIRONMENT, ROOT, WALL_S, run_cli
from toys import call, error_line

import main
from harness.log import RunLog

# The log


def test_a_line_has_the_figures_unrounded(tmp_path):
    """A loss brings its perplexity and bits per token; what is not finite is null."""
    log = RunLog(str(tmp_path / "log"))
    log.write("valid", 1.25, epoch=3)
    log.write("pointer", math.inf, theta=1.0)
    log.write("train", 2.0, grad_norm=math.nan)
    valid, pointer, train = read_log(tmp_path / "log")
    assert valid == {"kind": "valid", "epoch": 3, "loss": 1.25, "ppl": math.exp(1.25), "bpc": 1.25 / math.log(2)}
    assert pointer == {"kind": "pointer", "theta": 1.0, "loss": None, "ppl": None, "bpc": None}
    assert train["grad_norm"] is None


def test_a_line_that_was_cut_short_is_ended(tmp_path):
    """By a kill or a full disk: the next one stands on a line of its own."""
    path = tmp_path / "log"
    path.write_text('{"kind": "start"}\n{"kind": "tra')
    RunLog(str(path)).write("test", 1.0)
    assert [line[:8] for line in path.read_text().splitlines()] == ['{"kind":'] * 3
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 1.0


def test_the_log_of_a_run(trained):
    """A start, then figures with gradient norms and tokens per second; the switch where it was printed."""
    whole = trained("--bptt", 20, "--nonmono", 0, "--lr", 20, "--clip", 1, "--epochs", 4)
    assert whole.log("start") == [{"kind": "start", "script": "main.py", "epoch": 1, "batch": 0, "step": 0}]
    for entry in whole.log("train"):
        assert entry["grad_norm"] > 0
        assert entry["tokens_per_s"] > 0
    (switch,) = whole.log("averaging")
    valid = whole.log("valid")
    assert [entry["averaged"] for entry in valid] == [entry["epoch"] > switch["epoch"] for entry in valid]


# The bar


def on_terminal(*argv: object, cwd: Path, ctrl_c_at: str = "") -> tuple[int, str]:
    """The exit status of main.py, and all that it wrote, on a terminal of 120 columns."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, str(ROOT / "main.py"), *map(str, argv)]
    running = subprocess.Popen(
        command, cwd=cwd, env=os.environ | ENVIRONMENT, stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY),  # Ctrl-C is for it
    )  # fmt: skip
    os.close(terminal)
    written, pressed = b"", False
    with contextlib.suppress(OSError):  # the terminal's end
        while chunk := os.read(master, 4096):
            written += chunk
            if ctrl_c_at and not pressed and re.search(ctrl_c_at, written.decode(errors="ignore")):
                os.write(master, b"\x03")
                pressed = True
    os.close(master)
    return running.wait(WALL_S), written.decode()


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
    """It shows where the epoch stands, and is gone at its end and at Ctrl-C: what stays is as in a file."""
    flags = ["--data", corpus, *SMALL, "--log-interval", 1, "--save", "m.pt", "--epochs", 400]
    status, written = on_terminal(*flags, cwd=tmp_path, ctrl_c_at=r"epoch +3 \|.{20}\|")
    assert status == 0, written
    bar = r"epoch +1 \|.{20}\| +\d+% [\d.]+k?/1\.45k tokens, .*tokens/s, \d+:\d+ left, loss \d.*ppl \d"
    assert re.search(bar, written), written
    lines = screen(written)
    stop = lines.index("| stopped (SIGINT); --resume m.pt goes on")
    assert all(re.match(r"\||=+$|$", line) for line in lines[stop:]), lines[stop:]
    (tmp_path / "plain").mkdir()
    epochs = max(map(int, re.findall(r"(?m)^\| epoch +(\d+) \|", "\n".join(lines))))
    plain = run_cli(*flags, "--epochs", epochs, cwd=tmp_path / "plain")
    assert "\r" not in plain.out
    found, expected = without_times(lines[:stop]), without_times(plain.out.splitlines())
    assert len(found) > 60
    assert found == expected[: len(found)]


# TensorBoard


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: tag -> steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_figures_of_the_log(corpus, tmp_path):
    """Of all kinds of lines, unrounded, at their steps; a resumed run hides what it repeats."""
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--tensorboard", "tb", "--epochs", 2]
    result = run_cli(*flags, "--max_steps", 33, cwd=tmp_path)
    assert result.status == 0, result
    state = (tmp_path / "m.pt.state").read_bytes()
    for _ in range(2):  # the second time from the state of before: the same steps again
        (tmp_path / "m.pt.state").write_bytes(state)
        result = run_cli("--resume", "m.pt", "--tensorboard", "tb", cwd=tmp_path)
        assert result.status == 0, result
    log = read_log(tmp_path / "m.pt.log.jsonl")
    last = max(i for i, entry in enumerate(log) if entry["kind"] == "start")
    first = next(i for i, entry in enumerate(log) if entry["kind"] == "test") + 1
    log = [entry for entry in log[:first] + log[last:] if not entry.get("partial")]  # the first and the third
    found = read_board(tmp_path / "tb" / "m.pt")
    for kind, names in (
        ("train", ("loss", "ppl", "lr", "grad_norm", "tokens_per_s")),
        ("valid", ("loss", "averaged")),
    ):
        entries = [entry for entry in log if entry["kind"] == kind]
        assert len(entries) > 1
        for name in names:
            expected = [(entry["step"], pytest.approx(float(entry[name]), rel=1e-6)) for entry in entries]
            assert [point for point in found[f"{kind}/{name}"] if point[0] != 33] == expected, name
    assert found["test/loss"][-1][1] == pytest.approx(log[-1]["loss"], rel=1e-6)


FULL = """
import os, resource
from harness.log import EpochBar, RunLog

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

for moment in ("first", "later"):
    os.mkdir(moment)
    limit(10 if moment == "first" else resource.RLIM_INFINITY)
    log = RunLog(f"{moment}.log", moment)
    log.write("start", script="main.py", epoch=1, batch=0, step=0)
    log.write("train", 2.0, step=1)
    limit(10)
    with EpochBar(1, 0, 30) as bar:
        for step in range(2, 30):
            bar.show(1, 2.0)
            log.write("valid" if step % 10 == 0 else "train", 2.0, step=step)
print("done")
"""


def test_a_full_disk_costs_the_log_and_nothing_else(tmp_path):
    """TensorBoard is given up with one warning, lines are dropped: no traceback, not from its thread either."""
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    end = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True, timeout=WALL_S,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": modules},
    )  # fmt: skip
    assert (end.returncode, end.stdout) == (0, "done\n"), end
    assert end.stderr.splitlines() == [
        f"-c: warning: --tensorboard {moment}: File too large; the run goes on without it"
        for moment in ("first", "later")
    ]
    assert [(tmp_path / f"{moment}.log").read_text().count("\n") for moment in ("first", "later")] == [0, 2]


def test_tensorboard_that_cannot_be_had(corpus, tmp_path, monkeypatch, capsys):
    """One line before any training: that the folder cannot be written, or what to install."""
    (tmp_path / "file").touch()
    flags = ["--data", corpus, *SMALL, "--save", tmp_path / "m.pt", "--tensorboard"]
    assert call(main, *flags, tmp_path / "file") == 2
    assert f"--tensorboard {tmp_path / 'file'}: " in error_line(capsys)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert call(main, *flags, tmp_path / "tb") == 2
    assert "pip install tensorboard" in error_line(capsys)
