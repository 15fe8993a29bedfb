"""What goes wrong with main.py ends with a status and one line, never a traceback, and costs no file."""

import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write_corpus
from runner import Result, run_cli, run_fresh


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, the outputs and the corpus' cache left out."""
    files = (p for p in folder.rglob("*") if p.is_file() and ".runs" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if not p.name.startswith(".cache")}


def assert_refused(result: Result, status: int, *named: str) -> None:
    """The status, and one line on stderr that holds all of `named`."""
    assert result.status == status, result
    assert len(result.err.splitlines()) == 1, result.err
    assert "Traceback" not in result.out + result.err
    for name in named:
        assert name in result.err, result.err


@pytest.fixture
def old(trained, tmp_path) -> Path:
    """A folder of its own with a good model and its state, which no failure may touch."""
    good = trained("--epochs", 1)
    for suffix in ("", ".state", ".log.jsonl"):
        shutil.copy(f"{good.path}{suffix}", tmp_path / f"m.pt{suffix}")
    return tmp_path


def refuse(old: Path, status: int, *named: str, flags: list[object], **how: object) -> None:
    """main.py with these flags ends as `assert_refused` says, and every file stays what it was."""
    before = contents(old)
    assert_refused(run_cli(*SMALL, *flags, cwd=old, **how), status, *named)
    assert contents(old) == before


# Text


def cut_file(path: Path) -> None:
    path.write_text("")


def one_word(path: Path) -> None:
    path.write_text("w1\n")


def latin_1(path: Path) -> None:
    path.write_bytes(b"w1 w2 caf\xe9 w3\n" + path.read_bytes())


def latin_1_late(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 300 + b"w1 w2 caf\xe9")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(
    "damage",
    [Path.unlink, cut_file, one_word, latin_1, latin_1_late, folder_instead],
    ids=lambda f: f.__name__,
)
def test_a_bad_split(old, split, damage):
    """Missing, empty, too short, not UTF-8 (at its start or end), a folder: the split is named."""
    path = write_corpus(old / "bad") / f"{split}.txt"
    damage(path)
    flags = ["--data", "bad", "--save", "m.pt", "--epochs", 1]
    if damage is one_word and split == "test":  # a single prediction is enough for the test
        assert run_cli(*SMALL, *flags, cwd=old).status == 0
    else:
        refuse(old, 2, f"{split}.txt" if damage is not one_word else split, flags=flags)


def test_a_corpus_that_is_not_there(old):
    """The folder is named, and so is the way to get a corpus."""
    refuse(old, 2, "data/nowhere", flags=["--data", "data/nowhere", "--save", "m.pt"])


def test_a_corpus_shorter_than_a_batch(old):
    """More columns than words: the line says so."""
    write_corpus(old / "bad", (60, 500, 300))
    refuse(old, 2, "train", "batch", flags=["--data", "bad", "--save", "m.pt", "--batch_size", 200])


# Flags


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "many"),
        ("--epochs", "-1"),
        ("--dropout", "1.5"),
        ("--dropouth", "-0.1"),
        ("--dropouti", "1"),
        ("--dropoute", "nan"),
        ("--wdrop", "1"),
        ("--batch_size", "0"),
        ("--bptt", "0"),
        ("--nlayers", "0"),
        ("--nhid", "-5"),
        ("--emsize", "0"),
        ("--lr", "nan"),
        ("--lr", "1e39"),
        ("--lr", "-1"),
        ("--clip", "inf"),
        ("--model", "RNN"),
        ("--optimizer", "lion"),
        ("--max_steps", "-2"),
        ("--checkpoint_every", "x"),
        ("--log-interval", "0"),
        ("--seed", "one"),
        ("--when", "soon"),
        ("--device", "abacus"),
        ("--device", "cuda"),
        ("--splits", "9 5"),
        ("--splits", "0"),
        ("--splits", "5 4000"),
        ("--no_such_flag", "1"),
    ],
)
def test_a_bad_flag(old, corpus, flag, value):
    """Status 2 and one line that names the flag and has the value."""
    flags = ["--data", corpus, "--save", "m.pt", flag, *value.split()]
    refuse(old, 2, flag.strip("-"), value.split()[-1], flags=flags)


def test_a_device_that_is_not_there_in_a_new_interpreter(old, corpus):
    """`--device cuda` without a GPU: the same as from a shell."""
    result = run_fresh("--data", corpus, *SMALL, "--save", "m.pt", "--device", "cuda", cwd=old)
    assert_refused(result, 2, "--device", "cuda")


# Places to write to


def test_saving_to_a_folder_that_is_not_there(old, corpus):
    """Told before any training."""
    refuse(old, 2, "nowhere", flags=["--data", corpus, "--save", "nowhere/m.pt", "--max_steps", 1])


def test_saving_below_a_file(old, corpus):
    """A file where a folder is needed."""
    refuse(old, 2, "m.pt/m.pt", flags=["--data", corpus, "--save", "m.pt/m.pt", "--max_steps", 1])


def test_saving_over_a_folder(old, corpus):
    """A folder where the file should go, found before any training."""
    (old / "there").mkdir()
    refuse(old, 2, "there", flags=["--data", corpus, "--save", "there", "--max_steps", 1])


def test_a_read_only_folder(old, corpus):
    """Nothing can be written: one line, and the model that is there stays."""
    old.joinpath(".runs").mkdir(exist_ok=True)
    os.chmod(old, 0o555)
    try:
        flags = ["--data", corpus, "--save", "m.pt", "--max_steps", 1]
        refuse(old, 2, "m.pt", flags=flags, permissions=True)
    finally:
        os.chmod(old, 0o755)


@pytest.mark.parametrize("fits", ["part of the model", "the model, not its state"])
def test_a_full_disk(old, corpus, fits):
    """Status 1 and one line; what was there is whole, and nothing half written is left."""
    before = contents(old)
    limit = 3000 if fits == "part of the model" else len(before["m.pt"]) + 1000
    flags = ["--data", corpus, "--save", "m.pt", "--max_steps", 1]
    result = run_cli(*SMALL, *flags, cwd=old, file_limit=limit)
    assert_refused(result, 1, "m.pt.state" if limit > 3000 else "m.pt")
    after = contents(old)
    assert set(after) == set(before), "no temporary file is left"
    assert after["m.pt.state"] == before["m.pt.state"]
    assert torch.load(old / "m.pt", weights_only=True)["vocab"]
    if limit == 3000:
        assert after["m.pt"] == before["m.pt"]


# Losses


@pytest.mark.parametrize("flags", [["--lr", "1e38"], ["--lr", "1e30", "--model", "QRNN"]])
def test_a_loss_that_is_not_finite(old, corpus, flags):
    """Status 1 with epoch, step and rate; the old model stays, and so does its state."""
    before = contents(old)
    small = ["--data", corpus, *SMALL, "--save", "m.pt", "--clip", 0, *flags]
    result = run_cli(*small, cwd=old)
    assert_refused(result, 1, "epoch 1", "step", flags[1].replace("1e", "1e+"))
    after = contents(old)
    assert {name: after[name] for name in ("m.pt", "m.pt.state")} == {
        name: before[name] for name in ("m.pt", "m.pt.state")
    }


def test_weights_that_are_not_finite_never_reach_the_state(old, corpus):
    """A step may end with a finite loss and useless weights: a checkpoint keeps the old state."""
    before = contents(old)
    flags = ("--save", "m.pt", "--clip", 0, "--lr", "1e38", "--wdecay", "1e38", "--checkpoint_every", 1)
    result = run_cli("--data", corpus, *SMALL, *flags, cwd=old)
    assert_refused(result, 1, "epoch 1, step 1", "a weight")
    assert contents(old)["m.pt.state"] == before["m.pt.state"]


# Files to resume from


class Trap:
    """Its pickle makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-600])


def cut_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(3000))


def text(path: Path) -> None:
    path.write_text("PTB\n")


def other_tensors(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def only_a_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def pickled_object(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def malicious(path: Path) -> None:
    torch.save({"format": "awd-lm model 1", "args": Trap(path.parent / "trapped")}, path)


def malicious_of_protocol_4(path: Path) -> None:
    """torch warns of the protocol, beside our own line."""
    path.write_bytes(pickle.dumps(Trap(path.parent / "trapped"), protocol=4))


def pickle_of_nothing(path: Path) -> None:
    """torch's reader ends with an IndexError."""
    path.write_bytes(b"\x80\x02.")


DAMAGES = [
    *(cut, cut_half, empty, noise, text, other_tensors, only_a_tensor, pickled_object, malicious),
    *(malicious_of_protocol_4, pickle_of_nothing),
]


@pytest.mark.parametrize("suffix", ["", ".state"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_bad_checkpoint(old, corpus, damage, suffix):
    """Truncated, foreign or malicious, the model or its state: named, not run, left as it is."""
    damage(old / f"m.pt{suffix}")
    refuse(
        old, 2, f"m.pt{suffix}", flags=["--data", corpus, "--resume", "m.pt", "--save", "m.pt", "--epochs", 2]
    )
    assert not (old / "trapped").exists()


def without(part: str):
    def damage(saved: dict) -> None:
        del saved[part]

    return damage


def edit(part: str, **changes: object):
    def damage(saved: dict) -> None:
        saved[part].update(changes)

    return damage


def shorter_vocab(saved: dict) -> None:
    saved["vocab"].pop()


def vocab_of_numbers(saved: dict) -> None:
    saved["vocab"] = list(range(len(saved["vocab"])))


def repeated_word(saved: dict) -> None:
    saved["vocab"][3] = saved["vocab"][4]


def missing_tensor(saved: dict) -> None:
    del saved["model"]["rnns.1.bias_hh_l0"]


@pytest.mark.parametrize(
    "damage",
    [
        *(without(part) for part in ("format", "args", "vocab", "model", "criterion")),
        edit("args", nhid=11),
        edit("args", nlayers=3),
        edit("args", nlayers=-1),
        edit("args", model="TCN"),
        edit("args", emsize="8"),
        edit("args", splits=[5]),
        edit("model", more=torch.zeros(2)),
        edit("model", **{"encoder.weight": torch.zeros(41, 9)}),
        edit("model", **{"encoder.weight": "no tensor"}),
        edit("criterion", tail_bias=torch.zeros(2)),
        shorter_vocab,
        vocab_of_numbers,
        repeated_word,
        missing_tensor,
    ],
)
def test_a_model_whose_parts_do_not_fit(old, corpus, damage):
    """A part missing, a size that is not the tensors', a vocabulary of another length: one line."""
    saved = torch.load(old / "m.pt", weights_only=True)
    damage(saved)
    torch.save(saved, old / "m.pt")
    (old / "m.pt.state").unlink()
    refuse(old, 2, "m.pt", flags=["--data", corpus, "--resume", "m.pt", "--save", "m.pt", "--epochs", 2])


@pytest.mark.parametrize(
    "part",
    [
        "script",
        "args",
        "vocab",
        "fingerprint",
        "weights",
        "average",
        "optimizer",
        "generators",
        "hidden",
        "progress",
    ],
)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_state_with_a_part_missing_or_odd(old, corpus, part, replaced):
    """A state that is not whole is refused in one line."""
    state = torch.load(old / "m.pt.state", weights_only=True)
    if replaced:
        state[part] = {"odd": torch.zeros(1)}
    else:
        del state[part]
    torch.save(state, old / "m.pt.state")
    refuse(
        old, 2, "m.pt.state", flags=["--data", corpus, "--resume", "m.pt", "--save", "m.pt", "--epochs", 2]
    )


def test_resuming_from_nothing(old, corpus):
    """A file that is not there is named with its flag."""
    refuse(old, 2, "--resume", "none.pt", flags=["--data", corpus, "--resume", "none.pt", "--save", "m.pt"])


def test_a_checkpoint_of_another_vocabulary(old):
    """Text with a word that the model does not know, and no <unk> for it, names the word."""
    saved = torch.load(old / "m.pt", weights_only=True)
    saved["vocab"][saved["vocab"].index("<unk>")] = "known"
    torch.save(saved, old / "m.pt")
    (old / "m.pt.state").unlink()
    other = write_corpus(old / "other")
    with (other / "train.txt").open("a") as file:
        file.write("w1 zebra\n")
    for split in ("train", "valid", "test"):
        path = other / f"{split}.txt"
        path.write_text(path.read_text().replace("<unk>", "known"))
    refuse(old, 2, "zebra", flags=["--data", "other", "--resume", "m.pt", "--save", "m.pt", "--epochs", 2])


def test_a_state_of_another_text(old):
    """A run cannot go on, bit for bit, on a text that has changed; the line says what to do."""
    write_corpus(old / "other", seed=3)
    refuse(
        old, 2, "m.pt.state", flags=["--data", "other", "--resume", "m.pt", "--save", "m.pt", "--epochs", 2]
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--nhid", 11],
        ["--emsize", 9],
        ["--nlayers", 3],
        ["--model", "GRU"],
        ["--untied"],
        ["--splits", 5, 12],
    ],
    ids=lambda f: f[0],
)
@pytest.mark.parametrize("warm", [False, True])
def test_a_flag_that_contradicts_the_shape(old, corpus, flags, warm):
    """Sizes, kind, tying and splits are the model's; another one on the command line is an error."""
    if warm:
        (old / "m.pt.state").unlink()
    refuse(old, 2, flags[0], "m.pt", flags=["--data", corpus, "--resume", "m.pt", "--epochs", 2, *flags])


def test_nothing_is_imported_from_the_working_folder(old, corpus):
    """Files of the user's folder that are called like modules change nothing."""
    (old / "torch.py").write_text("raise SystemExit('taken from the working folder')\n")
    result = run_fresh("--data", corpus, *SMALL, "--save", "m.pt", "--max_steps", 1, cwd=old)
    assert result.status == 0, result
