"""Fixtures: tiny corpora made on the fly, and training runs that several tests look at, each done once."""

import os

# Both before torch is imported. To tensors this small a second thread is nothing but a wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `torch.cuda.is_available()` then leaves CUDA alone: processes forked from one that began with it cannot use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
from runner import Result, end_all, run_cli

import layers.recurrent

# The model and the batches of all runs here: small, and every epoch is some twenty steps of uneven length.
SMALL = ["--emsize", 8, "--nhid", 10, "--nlayers", 2, "--batch_size", 4, "--bptt", 14]
SMALL += ["--lr", 5, "--log-interval", 5, "--device", "cpu"]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; JSON has no Infinity and no NaN, though Python's reader takes them."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def load(path: Path | str) -> dict[str, Any]:
    """What a file of a model, or its .state, contains."""
    return torch.load(path, weights_only=True)


class Trained(NamedTuple):
    """A finished run: its folder, how it ended, and the files that it left."""

    folder: Path
    result: Result
    path: Path

    @property
    def saved(self) -> dict[str, Any]:
        return load(self.path)

    @property
    def state(self) -> dict[str, Any]:
        return load(f"{self.path}.state")

    def log(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in read_log(Path(f"{self.path}.log.jsonl")) if entry["kind"] == kind]


def write_corpus(folder: Path, tokens: tuple[int, int, int] = (1300, 500, 300), seed: int = 0) -> Path:
    """Lines of words whose odds follow Zipf and depend on the word before, so that a model can learn."""
    rng = np.random.default_rng(seed)
    words = np.array(["<unk>", *(f"w{i}" for i in range(39))])
    odds = 1 / np.arange(1, 41)
    folder.mkdir(parents=True, exist_ok=True)
    for split, length in zip(("train", "valid", "test"), tokens, strict=True):
        ids = rng.choice(40, size=length, p=odds / odds.sum())
        ids[1::2] = (3 * ids[:-1:2] + 1) % 40
        ids[-40:] = np.arange(40) if split == "train" else ids[-40:]
        ends = np.unique(rng.choice(length, size=length // 8))
        lines = [" ".join(line) for line in np.split(words[ids], ends)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


# Under nohup SIGHUP is ignored, and so it would be in every run that a test hangs up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests without the mark `cuda` run on the CPU, whatever the machine has."""
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _no_run_left() -> Iterator[None]:
    """A run that a failed test has not ended would slow down the tests after it."""
    yield
    end_all()


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets texts of a few steps have more than one block of steps."""
    monkeypatch.setattr(layers.recurrent, "BLOCK", 3)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 40 words and <eos>; training on it takes 1,450 tokens an epoch."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """`trained(*flags)`: a run of main.py with these flags beside SMALL, to its end; done once a session."""
    done: dict[tuple[str, ...], Trained] = {}

    def train(*flags: object) -> Trained:
        key = tuple(map(str, flags))
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            result = run_cli("--data", corpus, *SMALL, "--save", "m.pt", *key, cwd=folder)
            assert result.status == 0, result
            done[key] = Trained(folder, result, folder / "m.pt")
        return done[key]

    return train


@pytest.fixture
def base(trained: Callable[..., Trained], tmp_path: Path) -> Path:
    """A folder with a model of two epochs, without its state."""
    shutil.copy(trained("--epochs", 2).path, tmp_path / "m.pt")
    return tmp_path
