"""What a file claims is not believed: models, states, statistics, corpus caches, tokenizers, texts.

Each has to give what the sound file gives, or one line with a status, at once and in little memory.
"""

import hashlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_files
import pytest
import torch
import toys
from conftest import SMALL, load, write_corpus
from runner import Result, assert_refused

import corpus.read as reading
import corpus.reader as reader
import corpus.text as texts
import dynamiceval
import main
import prepare
from corpus.files import SPLITS, TOKENIZER, checksum, load_cache
from corpus.read import read_corpus
from harness import checkpoint, files
from harness.flags import resolve_args
from train import Run
from utils import UserError


@pytest.fixture
def old(trained, tmp_path, monkeypatch) -> Path:
    """A folder with a good model and its state, which is the working folder."""
    good = trained("--epochs", 1)
    for suffix in ("", ".state"):
        shutil.copy(f"{good.path}{suffix}", tmp_path / f"m.pt{suffix}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(old, corpus, capsys):
    """`refuse(*named)`: main.py does not evaluate m.pt (or with `epochs` go on from its state), in one line."""

    def refuse(*named: str, status: int = 2, epochs: int = 0) -> None:
        before = {path: path.read_bytes() for path in old.iterdir() if path.is_file()}
        ended = toys.call(main, "--data", corpus, *SMALL, "--resume", "m.pt", "--save", "m.pt", "--epochs", epochs)
        assert_refused(Result(ended, *capsys.readouterr()), status, *named)
        assert {path: path.read_bytes() for path in old.iterdir() if path.is_file()} == before

    return refuse


# The zip


def records_of(path: Path) -> list[tuple[str, int, int]]:
    """Name, place and length of every record that is not empty."""
    data, found = path.read_bytes(), []
    for info in zipfile.ZipFile(path).infolist():
        name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
        found.append((info.filename, info.header_offset + 30 + name + extra, info.file_size))
    return [record for record in found if record[2]]


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["", ".state"])
def test_a_flipped_bit_in_any_record_is_told(old, refuse, suffix):
    """torch writes checksums and does not compare them."""
    path = old / f"m.pt{suffix}"
    sound = path.read_bytes()
    for name, place, length in records_of(path):
        flip(path, place + length // 2, bit=3)
        with pytest.raises(UserError, match=r"m\.pt.* is truncated, damaged or not "):
            (files.load_state if suffix else files.load_model)(str(path), "--resume")
        if name.endswith(("data.pkl", "data/3")):
            refuse(f"m.pt{suffix}", "damaged", epochs=2 if suffix else 0)
        path.write_bytes(sound)


def test_statistics_with_a_flipped_bit_are_made_anew(old, corpus, capsys):
    """The figures are those of sound statistics, and the file is sound again."""
    flags = ["--data", corpus, "--save", "m.pt", "--device", "cpu", "--batch_size", 4, "--max_batches", 5]
    figures, path = toys.text_of(capsys, dynamiceval, *flags), old / "m.pt.stats"
    sound = path.read_bytes()
    for name, place, length in records_of(path):
        flip(path, place + length // 2, bit=6)
        if name.endswith("data/0"):
            assert toys.text_of(capsys, dynamiceval, *flags) == figures
            assert load(path)["ms"][0].equal(torch.load(io.BytesIO(sound), weights_only=True)["ms"][0])
        path.write_bytes(sound)


def rezip(path: Path, compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> None:
    """The same records, written by zipfile."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (records | (more or {})).items():
            archive.writestr(name, data)


def test_a_zip_is_a_zip(old):
    """Whoever writes it: plain zips are as good as torch's."""
    rezip(old / "m.pt")
    assert files.load_model("m.pt", "--save")["vocab"]


def test_compressed_records_are_refused_before_they_are_read(old, refuse):
    """A few kilobytes can stand for a gigabyte of zeros."""
    rezip(old / "m.pt", zipfile.ZIP_DEFLATED, {"archive/data/bomb": bytes(2**27)})
    assert (old / "m.pt").stat().st_size < 2**18
    tracemalloc.start()
    refuse("m.pt", "a record is compressed")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_records_that_lie_over_each_other_are_refused(old, refuse):
    """All of them claim the largest one's bytes: together more than the file."""
    path = old / "m.pt"
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (records | {"archive/data/0": bytes(10**6)}).items():
            archive.writestr(name, data)
        large = archive.getinfo("archive/data/0")
        for number in range(100, 110):
            copy = zipfile.ZipInfo(f"archive/data/{number}")
            copy.header_offset, copy.CRC = large.header_offset, large.CRC
            copy.file_size = copy.compress_size = large.file_size
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
        archive._didModify = True
    refuse("m.pt", "larger than the file")


def test_two_directories_two_names_and_bytes_around_a_zip_are_refused(old):
    """Two readers could see two files in them."""
    path = old / "m.pt"
    sound = path.read_bytes()
    for data, why in (
        (sound + b"\0", "directory"),
        (b"\0" * 64 + sound, "directory"),
        (sound + sound, "directory"),
        (sound[:-2] + b"\1\0" + b"x", "directory"),
        (b"PK\5\6" + bytes(18), "0 records"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=why):
            files.load_model("m.pt", "--save")
    path.write_bytes(sound)
    rezip(path, more={"archive/DATA/0": b"abcd"})
    with pytest.raises(UserError, match="two records have one name"):
        files.load_model("m.pt", "--save")


# The pickle


def write_pickle(path: Path, data: bytes, *records: bytes) -> None:
    """A zip as torch writes it, with this data.pkl and these records of tensors."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/version", b"3\n")
        for i, record in enumerate(records):
            archive.writestr(f"m/data/{i}", record)


class Named:
    """Pickled as a call of a global by this name; its module need not be there."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.name, self.arguments = name, arguments


class Numbers:
    """Pickled as a record of a tensor: kind of storage, key, how many numbers."""

    def __init__(self, kind: str, key: str, count: int) -> None:
        self.pid = kind, key, count


class Crafter(pickle._Pickler):
    """Writes what torch.save writes, and what it does not."""

    def persistent_id(self, value: object) -> object:
        if isinstance(value, Numbers):
            kind, key, count = value.pid
            return ("storage", Named(f"torch {kind}Storage"), key, "cpu", count)
        return None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Named):
            self.write(b"c" + "\n".join([*value.name.split(), ""]).encode())
            if value.arguments:
                super().save(value.arguments)
                self.write(b"R")
        else:
            super().save(value, save_persistent_id)


def craft(tree: object) -> bytes:
    file = io.BytesIO()
    Crafter(file, protocol=2).dump(tree)
    return file.getvalue()


def claim(count=4, offset=0, size=(2, 2), stride=(2, 1), kind="Float", grad=False, key="0") -> Named:
    """Pickled as a tensor: by default four numbers of float32, the whole record."""
    return Named("torch._utils _rebuild_tensor_v2", Numbers(kind, key, count), offset, size, stride, grad, Empty())


class Empty:
    """An OrderedDict, as torch.save writes the hooks of a tensor."""

    def __reduce__(self):
        return OrderedDict, ()


def tensors(value: object) -> Any:
    """What the reader makes of a pickle with a record of four numbers of float32."""
    path = Path("crafted.pt")
    data = value if isinstance(value, bytes) else craft(value)
    write_pickle(path, data, struct.pack("<4f", 1, 2, 3, 4))
    with reader.open_file(path) as file:
        return reader.read_tensors(file)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_torch_writes_is_read(here):
    """All views of a record that lie inside it, and numbers of each type."""
    plain = [1.5, None, True, -3, 2**62, "é"]
    read = tensors({"a": claim(), "b": [claim(offset=1, size=(3,), stride=(1,)), *plain], 3: (), "c": {}})
    assert read["a"].tolist() == [[1, 2], [3, 4]]
    assert read["b"][0].tolist() == [2, 3, 4]
    assert read["b"][1:] == plain
    torch.save({"x": torch.arange(6).view(2, 3).T[1:], "e": torch.zeros(0, 5), "tied": [torch.ones(3)] * 2}, "sound.pt")
    with reader.open_file("sound.pt") as file:
        read = reader.read_tensors(file)
    assert read["x"].tolist() == [[1, 4], [2, 5]]
    assert read["e"].shape == (0, 5)


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def laughs(levels: int = 40) -> object:
    tree: object = ["lol"]
    for _ in range(levels):
        tree = [tree] * 10
    return tree


GLOBALS = [
    *("builtins bytearray", "__builtin__ bytearray", "builtins set", "_codecs encode", "torch Tensor", "torch Size"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_meta_tensor_no_storage", "os system"),
    *("torch._utils _rebuild_qtensor", "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2"),
]


@pytest.mark.parametrize("name", GLOBALS)
def test_other_globals_are_refused(here, name):
    """`bytearray(10**10)` is twenty bytes in a file."""
    with pytest.raises(reader.ForbiddenError):
        tensors({"vocab": Named(name, 10**10)})


@pytest.mark.parametrize(
    "value",
    [
        pickle.dumps({"a": 1}, protocol=4),
        pickle.dumps({"a": b"bytes"}, protocol=3),
        pickle.dumps({"a": {1, 2}}, protocol=4),
        b"\x80\x02\x96" + struct.pack("<Q", 2**40) + b".",  # BYTEARRAY8
        {"storage": Numbers("Float", "0", 4)},
        {"type": Named("torch FloatStorage")},
        b"\x80\x02}(X\1\0\0\0ac_os\nsystem\nb.",
    ],
    ids=range(7),
)
def test_more_than_tensors_and_plain_data(here, value):
    """Other opcodes and other objects."""
    with pytest.raises(reader.ForbiddenError):
        tensors(value)


DAMAGED = {
    "deep": nested(10**6),
    "not so deep": nested(100),
    "laughs": laughs(),
    "wide": b"\x80\x02](" + b"]" * 10**6 + b"e.",
    "a memo of 64 GiB": b"\x80\x02]r\xff\xff\xff\xff.",
    "a text of 4 GiB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a long number": b"\x80\x02\x8a\x20" + b"\1" * 32 + b".",
    "half a character in a word": b"\x80\x02](X\x03\0\0\0\xed\xa0\x80e.",
    "cut": b"\x80\x02](",
    "more behind": b"\x80\x02].]",
    "itself": b"\x80\x02]q\0h\0a.",
    "a list as key": b"\x80\x02}]K\1s.",
    "None as key": {None: 1},
    "a record that is not there": {"a": claim(key="7")},
    "more numbers than the record": {"a": claim(count=5)},
    "fewer": {"a": claim(count=3)},
    "wider numbers": {"a": claim(kind="Double")},
    "two types of one record": {"a": claim(), "b": claim(kind="Int")},
    "behind its record": {"a": claim(offset=1)},
    "before it": {"a": claim(offset=-1)},
    "larger": {"a": claim(size=(10**12,), stride=(1,))},
    "stride 0": {"a": claim(size=(10**12,), stride=(0,))},
    "a small stride 0": {"a": claim(size=(8,), stride=(0,))},
    "a negative stride": {"a": claim(size=(2,), stride=(-1,), offset=3)},
    "no size": {"a": claim(size=5, stride=5)},
    "sizes that are texts": {"a": claim(size=("2", "2"), stride=("2", "1"))},
    "a gradient": {"a": claim(grad=True)},
    "a hundred names": {"a": [claim() for _ in range(100)]},
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_claims_that_cannot_be(here, name):
    """Refused within a second or two, with little more memory than the file takes."""
    value, began_s = DAMAGED[name], time.process_time()
    data = value if isinstance(value, bytes) else craft(value)
    tracemalloc.start()
    try:
        with pytest.raises(reader.DamagedError):
            tensors(data)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data) + 2**20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began_s < 5


def test_half_a_character_in_a_name_is_taken(here):
    """Settings have the names of files, which need not be UTF-8."""
    assert tensors({"save": "caf\udce9.pt"}) == {"save": "caf\udce9.pt"}


def test_it_is_refused_through_the_command_line(old, refuse):
    """The words of the two kinds of error, for a model and for a state."""
    write_pickle(old / "m.pt", DAMAGED["deep"])
    refuse("m.pt: is truncated, damaged or not a saved model (it has far more lists than tensors)")
    write_pickle(old / "m.pt", craft({"args": Named("builtins bytearray", 10**10)}))
    refuse("m.pt: holds more than tensors and plain data", "save the model again")
    write_pickle(old / "m.pt.state", craft({"args": Named("builtins bytearray", 10**10)}))
    refuse("m.pt.state: holds more than tensors and plain data", "remove it to warm-start", epochs=2)


# Tensors of a model


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x.to_sparse(), "holds more than tensors"),
        (lambda x: x.to("meta"), "holds more than tensors"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "holds more than tensors"),
        (lambda x: x.to(torch.float8_e4m3fn), "holds more than tensors"),
        (lambda x: x.to(torch.complex64), "holds more than tensors"),
        (torch.nn.Parameter, "holds more than tensors"),
        (lambda x: x.double(), "decoder.bias is not of float32"),
        (lambda x: x.half(), "decoder.bias is not of float32"),
        (lambda x: x.long(), "decoder.bias is not of float32"),
        (lambda x: torch.zeros(1).expand(x.shape), "not in its record"),
        (lambda x: x.tolist(), "decoder.bias"),
        (lambda x: torch.full_like(x, torch.nan), "decoder.bias holds nan"),
        (lambda x: torch.full_like(x, torch.inf), "decoder.bias holds nan"),
    ],
)
def test_weights_are_dense_float32_and_finite(old, refuse, change: Callable, named):
    """Other tensors are named; the run never starts."""
    saved = load("m.pt")
    saved["model"]["decoder.bias"] = change(saved["model"]["decoder.bias"])
    torch.save(saved, "m.pt")
    refuse("m.pt", named, status=1 if "nan" in named else 2)
    state = load("m.pt.state")
    state["weights"]["model.decoder.bias"] = change(state["weights"]["model.decoder.bias"])
    torch.save(state, "m.pt.state")
    refuse("m.pt.state", named, status=1 if "nan" in named else 2, epochs=2)


def test_weights_that_are_too_large_to_calculate_with(old, refuse):
    """Finite, and every figure would be nan."""
    saved = load("m.pt")
    saved["model"]["encoder.weight"].normal_().sign_().mul_(3e38)
    torch.save(saved, "m.pt")
    refuse("loss is", "too large", status=1)


@pytest.mark.parametrize("part", ["args", "model", "criterion", "metrics"])
def test_keys_are_texts(old, refuse, part):
    """Where they are names."""
    saved = load("m.pt")
    saved[part][7] = 1
    torch.save(saved, "m.pt")
    refuse("m.pt", part)


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("metrics", {"valid_loss": float("nan")}, "valid_loss"),
        ("metrics", {"step": float("inf")}, "step"),
        ("args", {"more": torch.zeros(2)}, "more"),
        ("args", {"more": {"a": 1}}, "more"),
        ("args", {"data": torch.zeros(2)}, "data"),
        ("args", {"alpha": float("nan")}, "alpha"),
        ("args", {"seed": -1}, "seed"),
    ],
)
def test_plain_data_of_a_model(old, refuse, part, changes, named):
    """Numbers are finite, settings are what a flag takes."""
    saved = load("m.pt")
    saved[part].update(changes)
    torch.save(saved, "m.pt")
    refuse("m.pt", named)


# A state


@pytest.fixture(scope="module")
def resumable(tmp_path_factory) -> Path:
    """A state of Adam, with a mean and shuffled columns, in the middle of an epoch."""
    return fuzz_files.make_state(tmp_path_factory.mktemp("state"))


def resume(state: dict[str, Any], path: Path) -> None:
    """What main.py --resume does with a state."""
    torch.save(state, path)
    loaded = files.load_state(str(path), "--resume")
    args = fuzz_files.run_settings(path.parent, shuffle=True, resume=str(path).removesuffix(".state"))
    run = Run("main.py", resolve_args(vars(args), loaded["args"]), fuzz_files.CORPUS, torch.device("cpu"))
    checkpoint.resume(run, loaded, {})


def at(tree: Any, *keys: Any) -> tuple[Any, Any]:
    """The part that holds a place, and its key; "*" is the first one."""
    for key in keys[:-1]:
        tree = tree[next(iter(tree))] if key == "*" else tree[key]
    return tree, keys[-1]


MOMENT = ("optimizer", "state", "*", "exp_avg")
GROUP = ("optimizer", "param_groups", 0)
STATES: list[tuple[tuple[Any, ...], Any]] = [
    (MOMENT, torch.zeros(1)),
    (MOMENT, lambda x: x.double()),
    (MOMENT, lambda x: x.flatten()),
    (MOMENT, lambda x: torch.full_like(x, torch.nan)),
    (MOMENT, "text"),
    (MOMENT, KeyError),
    (("optimizer", "state", "*", "step"), 3),
    (("optimizer", "state", "*", "step"), torch.tensor(-2.0)),
    (("optimizer", "state", "*", "step"), torch.tensor(torch.inf)),
    (("optimizer", "state", "*", "more"), torch.zeros(1)),
    (("optimizer", "state", "*"), None),
    (("optimizer", "state", 77), {}),
    (("optimizer", "state", -1), {}),
    (("optimizer", "state", "0"), {}),
    (("optimizer", "state"), []),
    (("optimizer", "param_groups"), []),
    (("optimizer", "param_groups"), lambda x: x * 2),
    ((*GROUP, "betas"), (0.9,)),
    ((*GROUP, "betas"), (0.9, float("nan"))),
    ((*GROUP, "eps"), "1e-8"),
    ((*GROUP, "eps"), float("inf")),
    ((*GROUP, "fused"), 3),
    ((*GROUP, "params"), [0]),
    ((*GROUP, "more"), 1),
    ((*GROUP, "lr"), KeyError),
    *((("at", name), value) for name in ("epoch", "row", "batch", "step", "loss_count") for value in (-1, 1.5, True)),
    (("at", "row"), 10**6),
    (("at", "epoch"), 0),
    *((("at", name), value) for name in ("lr", "loss_sum", "epoch_s") for value in (math.nan, "3", None, math.inf)),
    (("at", "lr"), -1.0),
    (("at", "best_loss"), float("nan")),
    (("at", "best_loss"), "3.0"),
    (("at", "history"), [3.0, float("nan")]),
    (("at", "history"), ["3.0"]),
    (("at", "history"), "3.0"),
    (("at", "initial_save_digest"), 5),
    (("at", "more"), 5),
    (("at", "step"), KeyError),
    (("hidden",), []),
    (("hidden", 0), ()),
    (("hidden", 0), torch.zeros(2, 1, 4, 10)),
    (("hidden",), lambda x: [tuple(y[:, :1] for y in layer) for layer in x]),
    (("hidden",), lambda x: [tuple(y.int() for y in layer) for layer in x]),
    (("hidden",), lambda x: [tuple(y * torch.nan for y in layer) for layer in x]),
    (("mean", "count"), -1),
    (("mean", "count"), 2.0),
    (("mean", "count"), None),
    (("mean", "weights", "model.decoder.bias"), KeyError),
    (("mean", "weights", "model.decoder.bias"), torch.zeros(1)),
    (("mean", "weights", "model.decoder.bias"), lambda x: x.double()),
    (("mean", "weights", "model.decoder.bias"), lambda x: x / 0),
    (("mean", "weights"), []),
    (("offsets",), "text"),
    (("offsets",), torch.zeros(3, dtype=torch.int64)),
    (("offsets",), lambda x: x.int()),
    (("offsets",), lambda x: x - 10**6),
    (("offsets",), lambda x: x + 10**6),
    (("generators", "cpu"), torch.zeros(5, dtype=torch.uint8)),
    (("generators", "cpu"), lambda x: torch.zeros_like(x)),
    (("generators", "cpu"), lambda x: x.float()),
    (("generators", "cpu"), KeyError),
    (("generators", "lengths"), lambda x: x[:-1]),
    (("generators", "lengths"), lambda x: torch.full_like(x, 255)),
    (("generators", "lengths"), 3),
    (("args", "batch_size"), KeyError),
    (("weights", 5), torch.zeros(2)),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value"), STATES, ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "")
def test_a_part_of_a_state_that_does_not_fit(resumable, tmp_path, keys, value, capsys):
    """One line, before torch computes with it."""
    path = Path(shutil.copy(str(resumable).removesuffix(".state"), tmp_path / "m.pt"))
    state = load(resumable)
    part, key = at(state, *keys)
    key = next(iter(part)) if key == "*" else key
    if value is KeyError:
        del part[key]
    else:
        part[key] = value(part[key]) if callable(value) else value
    with pytest.raises(UserError, match=r"m\.pt\.state") as raised:
        resume(state, Path(f"{path}.state"))
    assert "\n" not in str(raised.value)


def test_the_sound_state_goes_on(resumable, tmp_path, capsys):
    """Also with an older version's name of a part of its position, and with moments that are not there yet."""
    path = Path(shutil.copy(str(resumable).removesuffix(".state"), tmp_path / "m.pt"))
    state = load(resumable)
    state["at"]["before"] = state["at"].pop("initial_save_digest")
    state["optimizer"]["state"][1] = {}
    state["optimizer"]["state"].pop(2)
    state["hidden"] = [tuple(x.bfloat16() for x in layer) for layer in state["hidden"]]
    resume(state, Path(f"{path}.state"))
    assert "resumed at epoch 1, batch 3" in capsys.readouterr().out


def test_the_settings_of_the_groups_are_this_runs(resumable, tmp_path):
    """A file cannot turn the descent into an ascent."""
    path = Path(shutil.copy(str(resumable).removesuffix(".state"), tmp_path / "m.pt"))
    state = load(resumable)
    (group,) = state["optimizer"]["param_groups"]
    group |= {"maximize": True, "eps": 1e30}
    torch.save(state, f"{path}.state")
    loaded = files.load_state(f"{path}.state", "--resume")
    run = Run("main.py", fuzz_files.run_settings(tmp_path, shuffle=True), fuzz_files.CORPUS, torch.device("cpu"))
    checkpoint.restore(run, loaded, {})
    (group,) = run.optimizer.param_groups
    assert (group["maximize"], group["eps"]) == (False, 1e-8)
    assert len(run.optimizer.state) == len(run.parameters)


def test_moments_of_another_shape_through_the_command_line(old, corpus, capsys, tmp_path):
    """torch's fused Adam would write past their end."""
    flags = ["--data", corpus, *SMALL, "--optimizer", "adam", "--lr", 0.01, "--save", "adam.pt", "--epochs", 1]
    assert toys.call(main, *flags) == 0
    state = load("adam.pt.state")
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"] = torch.zeros(1)
    torch.save(state, "adam.pt.state")
    capsys.readouterr()
    assert toys.call(main, "--resume", "adam.pt", "--epochs", 2) == 2
    assert "adam.pt.state: a part of it does not fit this run (its exp_avg of" in toys.error_line(capsys)


# Paths


def odd_path(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


kinds = pytest.mark.parametrize("kind", ["pipe", "folder", "device"])


@kinds
@pytest.mark.timeout(60)
def test_a_model_state_or_statistics_that_is_no_file(old, corpus, capsys, kind):
    """Refused at once: nobody writes into the pipe, and the device has no end."""
    shutil.copy("m.pt", "other.pt")
    odd_path(old / "m.pt.state", kind)
    assert toys.call(main, "--data", corpus, *SMALL, "--resume", "m.pt", "--epochs", 2) == 2
    assert "m.pt.state: " in toys.error_line(capsys)
    odd_path(old / "m.pt", kind)
    assert toys.call(main, "--data", corpus, "--resume", "m.pt", "--epochs", 0) == 2
    assert "m.pt: " in toys.error_line(capsys)
    odd_path(old / "other.pt.stats", kind)
    flags = ["--data", corpus, "--save", "other.pt", "--device", "cpu", "--batch_size", 4]
    assert toys.call(dynamiceval, *flags) == 2
    assert "other.pt.stats: is a folder, a pipe or a device" in toys.error_line(capsys)


@kinds
@pytest.mark.timeout(60)
def test_a_tokenizer_or_text_that_is_no_file(tmp_path, capsys, kind):
    folder = write_corpus(tmp_path / "corpus")
    odd_path(folder / TOKENIZER, kind)
    with pytest.raises(UserError, match=TOKENIZER):
        read_corpus(str(folder))
    assert toys.call(prepare, folder / "train.txt", "--like", folder, "--out", tmp_path / "new") == 2
    assert TOKENIZER in toys.error_line(capsys)
    (folder / TOKENIZER).rmdir() if kind == "folder" else (folder / TOKENIZER).unlink()
    odd_path(folder / "valid.txt", kind)
    with pytest.raises(UserError, match=r"valid\.txt: is no file"):
        read_corpus(str(folder))


@kinds
@pytest.mark.timeout(60)
def test_a_cache_that_is_no_file_is_passed_over(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = write_corpus(tmp_path / "corpus")
    corpus = read_corpus(str(folder))
    (path,) = folder.glob(".cache-*.pt")
    odd_path(path, kind)
    assert load_cache(path, corpus.digest) is None
    for vocab in (None, corpus.vocab):
        assert read_corpus(str(folder), vocab).train.equal(corpus.train)


# Caches and tokenizers


@pytest.mark.parametrize(
    "changes",
    [
        {"train": lambda x: x + 100},
        {"train": lambda x: x - 100},
        {"valid": lambda x: x.long()},
        {"test": lambda x: x[None]},
        {"test": lambda x: x[:1]},
        {"vocab": lambda words: words[:-1]},
        {"vocab": lambda words: [words[1], *words[1:]]},
        {"vocab": lambda words: [7, *words[1:]]},
        {"vocab": lambda words: ["\ud800", *words[1:]]},
        {"vocab": lambda words: {word: 1 for word in words}},
        {"tokenizer": lambda _: 7},
        {"more": lambda _: 7},
    ],
)
def test_a_cache_whose_checksum_is_right_and_whose_parts_are_not(here, changes):
    """Anybody can calculate a checksum."""
    path = fuzz_files.make_cache(here)
    assert load_cache(path, "a digest")
    cached = load(path)
    contents = {**cached, "vocab": json.loads(cached["vocab"])}
    del contents["check"]
    contents |= {name: change(contents.get(name)) for name, change in changes.items()}
    torch.save({**contents, "vocab": json.dumps(contents["vocab"]), "check": checksum(contents)}, path)
    assert load_cache(path, "a digest") is None


def test_a_cache_that_inflates_is_passed_over(here):
    path = fuzz_files.make_cache(here)
    rezip(path, zipfile.ZIP_DEFLATED)
    assert load_cache(path, "a digest") is None
    data = craft({"train": claim(size=(10**12,), stride=(0,))})
    write_pickle(path, data, bytes(16))
    assert load_cache(path, "a digest") is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"model": {"vocab": {"a": 0, "b": 0}}}',
        '{"model": {"vocab": {"a": 0.5}}}',
        '{"model": {"vocab": {"a": null}}}',
        '{"model": {"vocab": ["a"]}}',
        '{"model": {"vocab": {"\\ud800": 0}}}',
        "null",
        "\udcff",
    ],
)
def test_a_tokenizer_that_is_none(tmp_path, text):
    folder = write_corpus(tmp_path / "corpus")
    (folder / TOKENIZER).write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(UserError, match=r"tokenizer\.json: is no tokenizer that prepare\.py made"):
        read_corpus(str(folder))


def test_a_tokenizer_that_makes_the_package_panic(here, capsys):
    """Rust's panic is no Exception, and writes lines of its own."""
    path = fuzz_files.make_tokenizer(here)
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["continuing_subword_prefix"] = "text"
    path.write_text(json.dumps(tokenizer))
    capsys.readouterr()
    assert toys.call(prepare, here / "text.txt", "--like", path.parent, "--out", here / "new") == 2
    assert "holds no tokenizer that can be read" in toys.error_line(capsys)


# Texts


@pytest.mark.parametrize("split", SPLITS)
def test_a_text_that_changes_between_hashing_and_reading(tmp_path, monkeypatch, split):
    """It is told, and no cache is left that would be taken for the text of that hash."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = write_corpus(tmp_path / "corpus")
    path, digest = folder / f"{split}.txt", reading.file_digest
    sound = path.read_bytes()

    def change(hashed: Path) -> str:
        value = digest(hashed)
        if hashed == path:
            path.write_bytes(sound.replace(b"w1", b"w2"))
        return value

    with monkeypatch.context() as patch:
        patch.setattr(reading, "file_digest", change)
        with pytest.raises(UserError, match=rf"{split}\.txt: has changed while it was read"):
            read_corpus(str(folder))
    assert not list(tmp_path.rglob(".cache-*"))
    path.write_bytes(sound)
    assert "w1" in read_corpus(str(folder)).vocab


def test_blocks_are_hashed_as_they_are_read(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfa b\n" * 10**5)
    with texts.HashingBar(disable=True) as bar:
        bar.sha256 = hashlib.sha256()
        assert sum(map(len, texts.read_blocks(path, bar))) == 4 * 10**5
        assert bar.sha256.hexdigest() == reading.file_digest(path)


# Everything at random


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", fuzz_files.KINDS)
def test_two_hundred_damaged_files_of_each_kind(name):
    """`python tests/fuzz_files.py 5000` tries more."""
    ends, faults = fuzz_files.fuzz(name, 200)
    assert not faults
    assert ends.total() == 200
    assert ends["refused"] + ends["passed over"] + ends["the same"] > 180
