"""What a run writes beside its model: numbered states that do not fit, TensorBoard's folders."""

import errno
import os
from pathlib import Path

import pytest
from conftest import SMALL
from runner import run_cli

import checkpoint
from files import RunFiles
from watch import board_folder


def test_copies_that_do_not_fit_are_said_once(tmp_path, monkeypatch, capsys):
    """No hard links, no room for a copy: one line for all checkpoints, and the state itself is there."""

    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def save_bytes(path, write, save=checkpoint.save_bytes):
        if str(path)[-1].isdecimal():
            raise checkpoint.NotWrittenError(path, "No space left on device")
        save(path, write)

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(checkpoint, "save_bytes", save_bytes)
    files = RunFiles(str(tmp_path / "m.pt"), keep_last=2)
    for step in (1, 2, 3):
        assert files.save_state({"displaced": None, "progress": {"step": step}})
    files.require_written()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'm.pt'}.state.1: cannot be written (No space left on device)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt.state"]


@pytest.mark.parametrize(
    ("save", "script", "folder"),
    [
        ("m.pt", "main.py", "m.pt"),
        ("m.pt", "finetune.py", "m.pt.finetune"),
        ("./a/m.pt", "main.py", "a/m.pt"),
        ("../b/m.pt", "main.py", "b/m.pt"),
        ("/x/m.pt", "main.py", "x/m.pt"),
    ],
)
def test_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch, save, script, folder):
    """Called as the model with its folders, within --tensorboard; by its absolute path the same."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    found = board_folder("tb", save, script)
    assert Path(found).is_dir()
    assert found == f"tb/{folder}"
    assert board_folder("tb", os.path.abspath(save), script) == found


def test_fine_tuning_hides_no_curve_of_the_training(corpus, tmp_path):
    """With the same --tensorboard and --save both are there, each under its name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--data", corpus, *SMALL, "--save", "m.pt", "--tensorboard", "tb", "--epochs", 1]
    found = []
    for script, name in (("main.py", "m.pt"), ("finetune.py", "m.pt.finetune")):
        result = run_cli(*flags, cwd=tmp_path, script=script)
        assert result.status == 0, result
        boards = {folder: tmp_path / "tb" / folder for folder in ("m.pt", name)}
        points = {folder: EventAccumulator(str(board)).Reload() for folder, board in boards.items()}
        found.append([scalar.value for scalar in points["m.pt"].Scalars("loss/train")])
        assert points[name].Scalars("loss/valid")
    assert len(found[0]) > 1
    assert found[0] == found[1]
