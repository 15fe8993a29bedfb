"""What goes wrong with main.py ends with a status and one line, never a traceback, and costs no file."""

import os
import pickle
import random
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import toys
from conftest import SMALL, load, write_corpus
from runner import Result, assert_refused, run_cli

import dynamiceval
import generate
import main
import pointer
import score
from harness import files
from utils import UserError


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, the outputs and the corpus' cache left out."""
    found = (p for p in folder.rglob("*") if p.is_file() and ".runs" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if not p.name.startswith(".cache")}


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


@pytest.fixture
def refuse_here(old, monkeypatch, capsys):
    """`refuse` without a process per call: for what there is much of."""

    def refuse(status: int, *named: str, flags: list[object]) -> None:
        before = contents(old)
        monkeypatch.chdir(old)
        ended = toys.call(main, *SMALL, *flags)
        assert_refused(Result(ended, *capsys.readouterr()), status, *named)
        assert contents(old) == before

    return refuse


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


@pytest.mark.parametrize(
    ("split", "damage"),
    [
        *(("train", f) for f in (Path.unlink, cut_file, one_word, latin_1, latin_1_late, folder_instead)),
        *(("valid", f) for f in (cut_file, one_word)),
        ("test", latin_1),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_bad_split(old, split, damage):
    """Missing, empty, too short, not UTF-8 (at its start or end), a folder: the split is named."""
    damage(write_corpus(old / "bad") / f"{split}.txt")
    refuse(old, 2, f"{split}.txt" if damage is not one_word else split, flags=["--data", "bad", "--save", "m.pt"])


def test_a_single_prediction_is_enough_for_a_test(old):
    one_word(write_corpus(old / "short") / "test.txt")
    assert run_cli(*SMALL, "--data", "short", "--save", "m.pt", "--epochs", 1, cwd=old).status == 0


def test_a_corpus_shorter_than_a_batch(old):
    """The line names the text and its tokens, says how many are needed, and what to do: with validation text, more."""
    write_corpus(old / "bad", (60, 500, 300))
    flags = ["--data", "bad", "--save", "m.pt", "--batch_size", 200]
    refuse(old, 2, "bad: the training text has 68 tokens", "takes 400; give --batch_size 34 at most", flags=flags)
    write_corpus(old / "short", (500, 14, 300))
    flags = ["--data", "short", "--save", "m.pt"]
    refuse(old, 2, "short: the validation text has 16 tokens", "takes 20; give more validation text", flags=flags)


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
        ("--max_minutes", "-1"),
        ("--checkpoint_every", "x"),
        ("--log-interval", "0"),
        ("--seed", "one"),
        ("--seed", "18446744073709551616"),
        ("--seed", "1" * 400),
        ("--rank", "1" * 20),
        ("--when", "soon"),
        ("--anneal", "-1"),
        ("--anneal", "8000"),
        ("--device", "abacus"),
        ("--device", "cuda"),
        ("--data", "data/nowhere"),
        ("--splits", "9 5"),
        ("--splits", "0"),
        ("--splits", "5 4000"),
        ("--no_such_flag", "1"),
    ],
)
def test_a_bad_flag(refuse_here, corpus, flag, value):
    """Status 2 and one line that names the flag and has the value."""
    flags = ["--data", corpus, "--save", "m.pt", flag, *value.split()]
    refuse_here(2, flag.strip("-"), value.split()[-1], flags=flags)


# Places to write to


def test_places_that_cannot_be_saved_to(old, corpus):
    """No such folder, a file where a folder is needed, a folder, a device: told before any training."""
    (old / "folder").mkdir()
    (old / "device").symlink_to(os.devnull)
    for place in ("nowhere/m.pt", "m.pt/m.pt", "folder", "device"):
        refuse(old, 2, place.removesuffix("/m.pt"), flags=["--data", corpus, "--save", place, "--max_steps", 1])


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
    assert load(old / "m.pt")["vocab"]
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


# Memory and devices


@pytest.mark.parametrize(("nhid", "memory_limit"), [(10**9, 0), (1500, 2**25)], ids=["no memory", "this one's"])
def test_a_model_that_the_memory_does_not_hold(old, corpus, nhid, memory_limit):
    """Status 1, and a line that says what does not fit, and what to do."""
    flags = ["--data", corpus, "--save", "m.pt", "--nhid", nhid]
    refuse(old, 1, "memory", "smaller", flags=flags, memory_limit=memory_limit)


def test_too_little_memory_to_load_what_is_sound(corpus, tmp_path):
    """Neither a state nor a model is called damaged, and nobody is told to remove it."""
    small = ["--data", corpus, *SMALL, "--nhid", 1500, "--save", "m.pt", "--max_steps", 1]
    assert run_cli(*small, cwd=tmp_path).status == 0
    for name in ("m.pt.state", "m.pt"):
        before = contents(tmp_path)
        result = run_cli("--resume", "m.pt", "--device", "cpu", cwd=tmp_path, memory_limit=2**25)
        assert_refused(result, 1, "memory", "smaller")
        assert "damaged" not in result.err
        assert "remove" not in result.err
        assert contents(tmp_path) == before
        (tmp_path / name).unlink()


def test_the_memory_limit_of_these_tests_is_no_hindrance_by_itself(old):
    """A small model is evaluated under it."""
    result = run_cli("--resume", "m.pt", "--device", "cpu", "--epochs", 0, cwd=old, memory_limit=2**25)
    assert result.status == 0, result


@pytest.mark.parametrize("does", ["create", "execute"])
def test_too_little_memory_for_a_step(old, corpus, monkeypatch, capsys, does):
    """oneDNN's LSTM says no more than that it could not."""

    def fail(*_: object) -> NoReturn:
        raise RuntimeError(f"could not {does} a primitive")

    monkeypatch.chdir(old)
    monkeypatch.setattr(torch, "lstm", fail)
    assert toys.call(main, "--data", corpus, *SMALL, "--save", "m.pt") == 1
    assert f"error: out of memory (could not {does} a primitive); try a smaller" in toys.error_line(capsys)


def test_too_little_memory_while_a_state_is_put_in_its_place(old, monkeypatch, capsys):
    """It is read, and does not fit beside the model."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.chdir(old)
    monkeypatch.setattr(torch.optim.SGD, "load_state_dict", fail)
    assert toys.call(main, "--resume", "m.pt", "--device", "cpu", "--epochs", 2) == 1
    line = toys.error_line(capsys)
    assert "error: can't allocate memory: you tried to allocate 9 bytes; try a smaller" in line
    assert "remove" not in line


def test_a_device_that_is_full_is_there(old, corpus, monkeypatch, capsys):
    """It has run out of memory: that is what the line says, and the status is that of a run that failed."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has ...")

    monkeypatch.chdir(old)
    monkeypatch.setattr(torch, "empty", fail)
    assert toys.call(main, "--data", corpus, *SMALL, "--save", "m.pt") == 1
    assert "error: CUDA out of memory; try a smaller --batch_size" in toys.error_line(capsys)


@pytest.mark.parametrize("moment", ["a step", "saving"])
def test_a_device_that_fails_ends_the_run(old, corpus, monkeypatch, capsys, moment):
    """It is no full disk, after which a run would go on: status 1, one line, and the files are as they were."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore of it")

    before = contents(old)
    monkeypatch.chdir(old)
    if moment == "saving":
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(torch.optim.SGD, "step", fail)
    assert toys.call(main, "--data", corpus, *SMALL, "--save", "m.pt", "--epochs", 2) == 1
    line = toys.error_line(capsys)
    assert "error: the device failed: CUDA error: an illegal memory access was encountered; go on with" in line
    after = contents(old)
    assert {name: after[name] for name in ("m.pt", "m.pt.state")} == {
        name: before[name] for name in ("m.pt", "m.pt.state")
    }
    assert set(after) == set(before)


# Models that are opened


@pytest.mark.parametrize("script", [pointer, dynamiceval, generate, score], ids=lambda script: script.__name__)
def test_a_model_that_cannot_be_evaluated(script, tmp_path, capsys):
    """Missing, cut, foreign, contradicted, not given, or on a device that is not there: one line, nothing on stdout."""
    save, cut, text = toys.save_model(tmp_path / "toy.pt"), tmp_path / "cut.pt", tmp_path / "text.txt"
    cut.write_bytes(save.read_bytes()[:900])
    text.write_text("w1 w2\n")
    for flags, named in (
        (["--save", tmp_path / "none.pt"], "none.pt"),
        (["--save", cut], "cut.pt"),
        (["--save", text], "text.txt"),
        (["--save", save, "--emsize", 99], "--emsize 99"),
        (["--save", save, "--device", "cuda:99"], "cuda:99"),
        ([], "--save"),
    ):
        assert toys.call(script, *flags, *[text] * (script is score)) == 2
        result = Result(2, *capsys.readouterr())
        assert_refused(result, 2, named)
        assert not result.out


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
    flags = ["--data", corpus, "--resume", "m.pt", "--save", "m.pt", "--epochs", 2]
    refuse(old, 2, f"m.pt{suffix}", *["truncated"] * (damage in (cut, cut_half)), flags=flags)
    assert not (old / "trapped").exists()


def test_a_model_cut_anywhere(tmp_path):
    """Whatever is left of it, even when its end looks whole: no other complaint than that it is cut."""
    path = toys.save_model(tmp_path / "m.pt")
    whole = path.read_bytes()
    for length in range(0, len(whole), 401):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"m\.pt: is truncated"):
            files.load_model(str(path), "--save")


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
        edit("args", emsize=0),
        edit("args", nlayers=10**9),
        edit("args", rounds=10**9),
        edit("args", splits=[5]),
        edit("metrics", valid_loss="5.1"),
        edit("metrics", step=torch.zeros(2)),
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
def test_a_model_whose_parts_do_not_fit(old, refuse_here, corpus, damage):
    """A part missing, a size that is not the tensors', a vocabulary of another length: one line."""
    saved = load(old / "m.pt")
    damage(saved)
    torch.save(saved, old / "m.pt")
    (old / "m.pt.state").unlink()
    refuse_here(2, "m.pt", flags=["--data", corpus, "--resume", "m.pt", "--save", "m.pt", "--epochs", 2])


@pytest.mark.parametrize(
    "part",
    [*("script", "args", "vocab", "fingerprint", "weights", "mean", "optimizer", "generators", "hidden", "at")],
)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_state_with_a_part_missing_or_odd(old, refuse_here, corpus, part, replaced):
    """A state that is not whole is refused in one line."""
    state = load(old / "m.pt.state")
    if replaced:
        state[part] = {"odd": torch.zeros(1)}
    else:
        del state[part]
    torch.save(state, old / "m.pt.state")
    refuse_here(2, "m.pt.state", flags=["--data", corpus, "--resume", "m.pt", "--save", "m.pt", "--epochs", 2])


def test_a_state_of_no_position(old, refuse_here, corpus):
    """A count that is none."""
    state = load(old / "m.pt.state")
    for name in ("epoch", "row", "batch", "step", "loss_count"):
        torch.save({**state, "at": {**state["at"], name: 1.5}}, old / "m.pt.state")
        flags = ["--data", corpus, "--resume", "m.pt", "--save", "m.pt", "--epochs", 2]
        refuse_here(2, "m.pt.state", f"its {name} is 1.5", flags=flags)


def test_a_state_of_an_older_version(old, refuse_here):
    """It is refused; the model beside it is good for a warm start, and the line says so."""
    state = load(old / "m.pt.state")
    torch.save({**state, "format": "awd-lm state 1"}, old / "m.pt.state")
    refuse_here(2, "m.pt.state", "remove it to warm-start", flags=["--resume", "m.pt", "--epochs", 2])


def test_a_model_that_holds_nan(old):
    """No figure of it would mean anything: status 1, and the weight is named."""
    saved = load(old / "m.pt")
    saved["model"]["decoder.bias"][3] = torch.nan
    torch.save(saved, old / "m.pt")
    refuse(old, 1, "m.pt", "decoder.bias", flags=["--resume", "m.pt", "--epochs", 0])


def test_resuming_from_nothing(old, corpus):
    """A file that is not there is named with its flag, even when its name begins like the value `auto`."""
    for name in ("none.pt", "auto.pt"):
        refuse(old, 2, "--resume", name, flags=["--data", corpus, "--resume", name, "--save", "m.pt"])


def test_a_checkpoint_of_another_vocabulary(old):
    """Text with a word that the model does not know, and no <unk> for it, names the word."""
    saved = load(old / "m.pt")
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
    refuse(old, 2, "m.pt.state", flags=["--data", "other", "--resume", "m.pt", "--save", "m.pt", "--epochs", 2])


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_state_of_the_same_text_in_another_order(old, corpus, split):
    """The same lines, two of them swapped: as many words, the same words, another text."""
    shutil.copytree(corpus, old / "other", ignore=shutil.ignore_patterns(".cache*"))
    path = old / "other" / f"{split}.txt"
    first, *lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, first]) + "\n")
    refuse(old, 2, "other", "m.pt.state", flags=["--data", "other", "--resume", "m.pt", "--epochs", 2])


@pytest.mark.parametrize("warm", [False, True])
def test_a_flag_that_contradicts_the_shape(old, refuse_here, corpus, warm):
    """Sizes, kind, tying and splits are the model's; another one on the command line is an error."""
    if warm:
        (old / "m.pt.state").unlink()
    for flags in (
        *(["--nhid", 11], ["--emsize", 9], ["--nlayers", 3], ["--model", "GRU"], ["--untied"]),
        *(["--splits", 5, 12], ["--vocab_size", 20], ["--min_count", 2]),
    ):
        refuse_here(2, flags[0], "m.pt", flags=["--data", corpus, "--resume", "m.pt", "--epochs", 2, *flags])
