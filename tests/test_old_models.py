"""Models that an earlier toolkit saved, in tests/models/, load for ever and keep the figures that it printed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load, read_log
from runner import run_cli

MODELS = Path(__file__).parent / "models"
FIGURES = json.loads((MODELS / "figures.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with copies: what a script writes beside a model is not for the repository."""
    for path in MODELS.glob("*.pt"):
        shutil.copy(path, tmp_path)
    shutil.copytree(MODELS / "corpus", tmp_path / "corpus", ignore=shutil.ignore_patterns(".cache*"))
    return tmp_path


@pytest.mark.parametrize("name", FIGURES)
def test_a_model_keeps_its_figures(folder, name):
    """Test loss, and validation and test with the pointer; the file is as it was."""
    path, figures = folder / f"{name}.pt", FIGURES[name]
    result = run_cli("--resume", path.name, "--epochs", 0, "--data", "corpus", cwd=folder)
    assert result.status == 0, result
    (printed,) = re.findall(r"\| End of training \| test loss +(\S+) \| test ppl +(\S+) \|", result.out)
    loss = torch.tensor(figures["test"], dtype=torch.float64)
    assert printed == (f"{loss:.2f}", f"{loss.exp():.2f}")
    assert not Path(f"{path}.log.jsonl").exists()

    for share in (0.1, 0):  # without the pointer it is the plain loss
        flags = ["--data", "corpus", "--theta", 1, "--lambdasm", share, "--window", 100]
        result = run_cli("--save", path.name, *flags, cwd=folder, script="pointer.py")
        assert result.status == 0, result
    *pointed, _, plain = read_log(Path(f"{path}.log.jsonl"))
    assert plain["loss"] == pytest.approx(figures["test"], abs=1e-6)
    assert [entry["loss"] for entry in pointed] == [
        pytest.approx(figures[f"pointer {split}"], abs=1e-6) for split in ("val", "test")
    ]
    assert path.read_bytes() == (MODELS / path.name).read_bytes()


@pytest.mark.parametrize("name", ["lstm", "split", "untied"])
def test_a_model_can_be_trained_on(folder, name):
    """A warm start and a fine-tuning begin with the loss that it was saved with."""
    for script, flags in (("main.py", ["--resume", f"{name}.pt"]), ("finetune.py", ["--save", f"{name}.pt"])):
        flags += ["--data", "corpus", "--lr", 1e-9, "--max_steps", 1]
        result = run_cli(*flags, cwd=folder, script=script)
        assert result.status == 0, result
        loss = load(MODELS / f"{name}.pt")["metrics"]["valid_loss"]
        assert f" | valid loss {loss:5.2f} |" in result.out[: result.out.index("End of")]
        (folder / f"{name}.pt.state").unlink()


@pytest.mark.parametrize("name", ["qrnn", "gru"])
def test_settings_that_its_args_lack_have_their_defaults(folder, name):
    """As for every setting that is newer than a file."""
    saved = load(folder / f"{name}.pt")
    saved["args"] = {key: saved["args"][key] for key in ("model", "emsize", "nhid", "nlayers", "tied")}
    torch.save(saved, folder / "bare.pt")
    result = run_cli("--resume", "bare.pt", "--epochs", 0, "--data", "corpus", cwd=folder)
    assert result.status == 0, result
    assert f"test loss {FIGURES[name]['test']:5.2f} |" in result.out
    result = run_cli("--save", "bare.pt", "--tied", "--next", 3, cwd=folder, script="generate.py")
    assert (result.status, len(result.out.splitlines())) == (0, 3), result
