"""Models of other programs become saved models with the same log-probabilities, and nothing of a file is run."""

import os
import pickle
import re
import resource
import shlex
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
import toys
from foreign import WORDS
from runner import ROOT
from torch import nn

import convert
import dynamiceval
import finetune
import generate
import main
import pointer
import score
from bridges import pickles
from harness import files

LSTM = foreign.draw("LSTM", [8, 10, 10], tied=False)


def opened(path: Path) -> files.Opened:
    return files.to_evaluate(files.load_model(str(path), "--save"), torch.device("cpu"))


def difference(path: Path, w: foreign.Weights, dtype: torch.dtype = torch.float64) -> float:
    """The largest one between the log-probabilities of a saved model and the original's."""
    saved, x = opened(path), torch.randint(len(w.embedding), (12, 3))
    model, criterion = saved.model.to(dtype), saved.criterion.to(dtype)
    with torch.no_grad():
        output, _ = model(x, model.init_hidden(3))
        found = criterion.logprob(model.decoder.weight, model.decoder.bias, output)
    return float((found.double().view(12, 3, -1) - foreign.reference(w, x)).abs().max())


def write_words(folder: Path, words: list[str] = WORDS) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(words), encoding="utf-8")  # without a last newline
    return path


def converted(folder: Path, *argv: object, vocab: Path | None = None) -> Path:
    """The saved model of folder/old.pt."""
    words = vocab or write_words(folder)
    assert toys.call(convert, folder / "old.pt", words, "--save", folder / "new.pt", "--force", *argv) == 0
    return folder / "new.pt"


# Layouts


def language(w: foreign.Weights) -> Any:
    return foreign.word_language_model(w)


LAYOUTS: dict[str, tuple[Any, foreign.Weights]] = {
    "Gulordava": (language, LSTM),
    "tied": (language, foreign.draw("LSTM", [10, 10, 10], tied=True)),
    "GRU": (language, foreign.draw("GRU", [8, 10, 10, 10], tied=False)),
    "one layer": (language, foreign.draw("LSTM", [8, 8], tied=True)),
    "awd LSTM": (foreign.awd_lstm_lm, foreign.draw("LSTM", [8, 12, 12, 8], tied=True)),
    "awd LSTM without weight drop": (lambda w: foreign.awd_lstm_lm(w, False), foreign.draw("LSTM", [8, 12, 8], True)),
    "awd LSTM untied": (foreign.awd_lstm_lm, foreign.draw("LSTM", [8, 12, 9], tied=False)),
    "awd QRNN": (foreign.awd_lstm_lm, foreign.draw("QRNN", [8, 12, 12, 8], tied=True)),
    "awd QRNN without weight drop": (lambda w: foreign.awd_lstm_lm(w, False), foreign.draw("QRNN", [8, 12, 8], True)),
    "awd splits": (foreign.awd_lstm_lm, foreign.draw("QRNN", [8, 12, 8], tied=True, splits=(7, 20, 33))),
}
STATES: dict[str, tuple[Any, foreign.Weights]] = {
    "state dict": (lambda w: language(w).state_dict(), LSTM),
    "checkpoint": (lambda w: {"epoch": 3, "loss": torch.ones(1), "model": language(w).state_dict()}, LSTM),
    "DataParallel": (lambda w: {f"module.{k}": v for k, v in language(w).state_dict().items()}, LSTM),
    "fastai 0.7": (lambda w: foreign.fastai(w, 0.7), foreign.draw("LSTM", [8, 12, 12, 8], True, bias=False)),
    "fastai 1": (lambda w: foreign.fastai(w, 1), foreign.draw("LSTM", [8, 12, 12, 8], True)),
    "MultiFiT": (lambda w: foreign.fastai(w, 1), foreign.draw("QRNN", [8, 12, 12, 8], True)),
    "torchqrnn": (lambda w: foreign.torchqrnn(w), foreign.draw("QRNN", [8, 12, 12], False)),
    "MultiFiT, other names": (lambda w: foreign.fastai(w, 2), foreign.draw("QRNN", [8, 12, 8], True)),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["old format", "zip"])
@pytest.mark.parametrize("name", [*LAYOUTS, *STATES])
def test_a_model_keeps_its_log_probabilities(tmp_path, name, zipped):
    """Of every layout, in both formats, to rounding in float64 and float32."""
    make, w = (LAYOUTS | STATES)[name]
    foreign.save(make(w), tmp_path / "old.pt", zipped, "torch 1" if zipped else "torch 0.3")
    path = converted(tmp_path)
    assert difference(path, w) < 1e-12
    assert difference(path, w, torch.float32) < 1e-5
    args = torch.load(path, weights_only=True)["args"]
    assert (args["model"], args["tied"], args["splits"]) == (w.kind, w.tied, w.splits)


@pytest.mark.parametrize("era", foreign.ERAS)
@pytest.mark.parametrize("name", ["Gulordava", "awd LSTM", "awd splits"])
def test_pickles_of_every_time(tmp_path, name, era):
    """Python 2's and torch 0.3's among them; a GPU's storages; a plain pickle's protocol makes no difference."""
    make, w = LAYOUTS[name]
    path = foreign.save(make(w), tmp_path / "old.pt", era=era)
    cpu, gpu = {"Python 2": (b"U\3cpu", b"U\6cuda:0")}.get(era, (b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    assert cpu in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(cpu, gpu))
    assert difference(converted(tmp_path), w) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(tmp_path, dtype):
    """Halves are exact in float32; doubles are rounded."""
    foreign.save({name: tensor.to(dtype) for name, tensor in language(LSTM).state_dict().items()}, tmp_path / "old.pt")
    w = LSTM._replace(
        embedding=LSTM.embedding.to(dtype).float(), decoder=LSTM.decoder.to(dtype).float(),
        bias=LSTM.bias.to(dtype).float(), layers=[[t.to(dtype).float() for t in layer] for layer in LSTM.layers],
    )  # fmt: skip
    assert difference(converted(tmp_path), w) < 1e-12


def test_views_and_missing_biases(tmp_path):
    """Weights that are parts of one storage, as cuDNN packs them, a transposed one; layers without biases."""
    state = language(LSTM).state_dict()
    packed = torch.cat([tensor.flatten() for name, tensor in state.items() if "rnn" in name])
    pieces = iter(packed.split([tensor.numel() for name, tensor in state.items() if "rnn" in name]))
    state = {name: next(pieces).view_as(tensor) if "rnn" in name else tensor for name, tensor in state.items()}
    state["encoder.weight"] = state["encoder.weight"].T.contiguous().T
    foreign.save(state, tmp_path / "old.pt")
    assert difference(converted(tmp_path), LSTM) < 1e-12
    foreign.save({name: part for name, part in state.items() if "rnn.bias" not in name}, tmp_path / "old.pt", True)
    layers = [[*layer[:2], *(torch.zeros_like(bias) for bias in layer[2:])] for layer in LSTM.layers]
    assert difference(converted(tmp_path), LSTM._replace(layers=layers)) < 1e-12


def test_a_qrnn_that_looks_at_one_word_only(tmp_path):
    """Ours has a place for the word before; zeros fill it."""
    w = foreign.draw("QRNN", [8, 12, 8], tied=True)
    w.layers[0][0] = w.layers[0][0][:, :8].clone()
    foreign.save(foreign.awd_lstm_lm(w), tmp_path / "old.pt")
    assert difference(converted(tmp_path), w) < 1e-12


# Vocabularies


def vocabularies(folder: Path) -> dict[str, Path]:
    """The words in every form in which they come."""
    text = "\n".join(WORDS)
    for name, data in (
        ("newline", f"{text}\n"),
        ("windows", text.replace("\n", "\r\n")),
        ("spaces", text[:9].replace("\n", "\xa0") + text[9:]),
    ):
        (folder / f"{name}.txt").write_bytes(data.encode())
    dictionary = foreign.Dictionary(WORDS)
    table = dict(dictionary.word2idx)
    made = {f"list {n}": foreign.dump(WORDS, folder / f"list{n}.pkl", n) for n in range(5)}
    made |= {f"dictionary {n}": foreign.dump(dictionary, folder / f"dict{n}.bin", n) for n in (0, 2, 4)}
    made |= {
        "table": foreign.dump(table, folder / "table.pkl"),
        "fastai": foreign.dump(foreign.Vocab(WORDS), folder / "v.pkl"),
    }
    made |= {"names": foreign.dump(dict(enumerate(WORDS)), folder / "names.pkl")}
    for zipped in (False, True):
        made[f"dictionary of torch {zipped}"] = foreign.save(dictionary, folder / f"t{zipped}.bin", zipped)
        made[f"corpus {zipped}"] = foreign.save(foreign.Corpus(WORDS), folder / f"c{zipped}.data", zipped)
    made["corpus of Python 2"] = foreign.save(foreign.Corpus(WORDS), folder / "c2.data", era="Python 2")
    made["tuple"] = foreign.save((1, 2, 3, dictionary), folder / "tuple.bin")
    return made | {path.stem: path for path in folder.glob("*.txt")}


def test_every_form_of_a_vocabulary(tmp_path):
    foreign.save(language(LSTM), tmp_path / "old.pt")
    for name, path in vocabularies(tmp_path).items():
        saved = torch.load(converted(tmp_path, vocab=path), weights_only=True)
        assert saved["vocab"] == WORDS, name


def test_words_of_other_alphabets(tmp_path):
    """As UTF-8, in text and in the strings of Python 2."""
    words = ["<unk>", *(f"слово{i}" for i in range(19)), *(f"מילה{i}" for i in range(20)), "<eos>"]
    foreign.save(language(LSTM), tmp_path / "old.pt")
    corpus = foreign.save(foreign.Corpus(words), tmp_path / "c.data", era="Python 2")
    for vocab in (write_words(tmp_path, words), corpus):
        assert torch.load(converted(tmp_path, vocab=vocab), weights_only=True)["vocab"] == words


def test_the_vocabulary_of_fastai(tmp_path, capsys):
    """Its padding words get numbers; --eos and --unk name the words that play those parts."""
    words = ["xxunk", "xxpad", "xxbos", *WORDS[1:34], *["xxfake"] * 5]
    foreign.save(foreign.fastai(LSTM, 1), tmp_path / "old.pt")
    vocab = foreign.dump(words, tmp_path / "itos.pkl")
    assert toys.call(convert, tmp_path / "old.pt", vocab, "--save", tmp_path / "new.pt") == 2
    assert "--eos, here xxbos" in toys.error_line(capsys)
    path = converted(tmp_path, "--eos", "xxbos", vocab=vocab)
    assert "--unk xxunk" in capsys.readouterr().out
    path = converted(tmp_path, "--eos", "xxbos", "--unk", "xxunk", vocab=vocab)
    assert "4 words stand more than once" in capsys.readouterr().out
    found = torch.load(path, weights_only=True)["vocab"]
    assert found[:3] == ["<unk>", "xxpad", "<eos>"]
    assert found[35:] == ["w32", "xxfake", *(f"xxfake#{i}" for i in range(37, 41))][: len(found[35:])]
    assert len(set(found)) == 41
    assert difference(path, LSTM) < 1e-12


def test_a_vocabulary_within_the_file(tmp_path):
    """A checkpoint that has its words needs no other file."""
    foreign.save({"model": language(LSTM).state_dict(), "vocab": foreign.Vocab(WORDS)}, tmp_path / "old.pt")
    assert toys.call(convert, tmp_path / "old.pt", "--save", tmp_path / "new.pt") == 0
    assert difference(tmp_path / "new.pt", LSTM) < 1e-12


@pytest.mark.parametrize("page", ["docs/convert.md", "convert.py"])
def test_the_commands_of_the_pages(tmp_path, monkeypatch, capsys, page):
    """Each is taken as far as the file that is not here."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    python convert.py (.*)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) > 2
    for command in commands:
        assert toys.call(convert, *shlex.split(command, comments=True)) == 2
        assert "No such file or directory; give the path of a file" in toys.error_line(capsys)


# What the other scripts do with it


@pytest.mark.parametrize("name", ["Gulordava", "awd splits", "GRU"])
def test_every_script_opens_it(tmp_path, corpus, capsys, name):
    """Evaluation, surprisal, the pointer, text, fine-tuning and training on; the surprisal is the original's."""
    make, w = LAYOUTS[name]
    foreign.save(make(w), tmp_path / "old.pt")
    path = converted(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("w3 w17 w2 <unk> w38\n")
    capsys.readouterr()
    rows = toys.text_of(capsys, score, "--save", path, text, "--tokens", "--nats").splitlines()[1:]
    ids = torch.tensor([[40, 4, 18, 3, 0, 39, 40]]).T
    expected = -foreign.reference(w, ids)[:-1, 0].gather(1, ids[1:])[:, 0]
    assert [float(row.split("\t")[3]) for row in rows] == pytest.approx(expected.tolist(), abs=2e-5)
    data, loss = ("--data", corpus), mean_loss(w, corpus / "test.txt")
    assert f"test loss {loss:5.2f} |" in toys.text_of(capsys, main, "--resume", path, "--epochs", 0, *data)
    pointed = toys.text_of(capsys, pointer, "--save", path, *data, "--lambdasm", 0, "--window", 50)
    assert f"test loss {loss:5.2f} |" in pointed
    assert len(toys.text_of(capsys, generate, "--save", path, "--next", 5).splitlines()) == 5
    for script, flags in ((main, ["--resume", path, "--save", tmp_path / "more.pt"]), (finetune, ["--save", path])):
        assert toys.call(script, *flags, *data, "--max_steps", 1, "--lr", 1e-9, "--batch_size", 4) == 0


def mean_loss(w: foreign.Weights, path: Path) -> float:
    """By the reference, from a state of zeros."""
    words = path.read_text().replace("\n", " <eos> ").split()
    ids = torch.tensor([WORDS.index(word) for word in words])[:, None]
    return float(-foreign.reference(w, ids)[:-1, 0].gather(1, ids[1:]).mean())


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("module", [False, True])
def test_the_error_for_a_foreign_file_names_the_command(tmp_path, corpus, capsys, zipped, module):
    model = language(LSTM)
    path = foreign.save(model if module else model.state_dict(), tmp_path / "old.pt", zipped)
    text = write_words(tmp_path)
    for script in (main, finetune, pointer, dynamiceval, generate, score):
        flag = ["--resume", path] if script is main else ["--save", path]
        assert toys.call(script, *flag, *[text] * (script is score), *["--data", corpus] * (script is main)) == 2
        line = toys.error_line(capsys)
        assert "old.pt" in line
        assert "convert.py" in line


# Files that are never run


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.call = function, args, state

    def __reduce__(self) -> Any:
        function, args, state = self.call
        return (function, args, state) if state else (function, args)

    def __call__(self) -> None:
        """Pickle asks of a function that it can be called."""


class Chain:
    """getattr(__import__("os"), "system")(command): the function called is made by calls."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return Calls(getattr, Calls(__import__, "os"), "system"), (self.command,)


def attacks(target: Path) -> dict[str, Any]:
    """Objects whose pickles make a file when they are loaded without care."""
    touch = f"touch {target}"
    call = Calls(os.system, touch)
    return {
        "call": call,
        "nested": [LSTM, {"a": (1, call)}],
        "eval": Calls(eval, f"open({str(target)!r}, 'w')"),
        "chain": Chain(touch),
        "state": Calls(OrderedDict, state={"x": call}),
        "tensor": Calls(torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, OrderedDict()),
        "tensor's type": Calls(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (touch,), {}),
        "parameter": Calls(nn.Parameter, call),
        "bytes": Calls(torch.storage._load_from_bytes, pickle.dumps(call)),
    }


OPCODES = {
    "protocol 0": "cos\nsystem\n(S'touch {}'\ntR.",
    "instance": "(S'touch {}'\nios\nsystem\n.",
    "object": "(cos\nsystem\nS'touch {}'\no.",
    "import": "ctrap_of_convert\nx\n.",
    "persistent id": "Ptouch {}\n.",
    "setstate": "ctrap_of_convert\nx\n)\x81S'touch {}'\nb.",
}


@pytest.mark.parametrize("name", [*attacks(Path()), *OPCODES])
def test_nothing_of_a_file_is_run(tmp_path, monkeypatch, capsys, name):
    """As a model, as its vocabulary, within a good model, in every form of a file: no call, no import."""
    target = tmp_path / "trapped"
    (tmp_path / "trap_of_convert.py").write_text(f"open({str(target)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    good = foreign.save(language(LSTM), tmp_path / "good.pt")
    bad = []
    if name in OPCODES:
        bad.append(tmp_path / "bad.pkl")
        bad[0].write_bytes(b"\x80\x02" * (name == "setstate") + OPCODES[name].format(target).encode("latin-1"))
    else:
        value = attacks(target)[name]
        bad += [foreign.save(value, tmp_path / f"{z}.pt", z, "today") for z in (False, True)]
        bad += [foreign.dump(value, tmp_path / f"{protocol}.pkl", protocol) for protocol in (0, 2, 4)]
        model = language(LSTM)
        model.more = value
        model._parameters["trap"] = value
        foreign.save(model, tmp_path / "old.pt", era="today")
        converted(tmp_path)  # it is a good model
        assert difference(tmp_path / "new.pt", LSTM) < 1e-12
    capsys.readouterr()
    for path in bad:
        for files_given in ([path, write_words(tmp_path)], [good, path]):
            assert toys.call(convert, *files_given, "--save", tmp_path / "other.pt") == 2
            assert path.name in toys.error_line(capsys)
    assert not target.exists()
    assert not (tmp_path / "other.pt").exists()


def test_what_was_not_called_is_named(tmp_path, capsys):
    foreign.dump(Calls(os.system, "true"), tmp_path / "old.pt")
    assert toys.call(convert, tmp_path / "old.pt", "--save", tmp_path / "new.pt") == 2
    assert "a call of posix.system, which was not made" in toys.error_line(capsys)


# Files that ask for memory or time

BIG = 2**62


def plainly(value: Any) -> bytes:
    """The instructions that put a value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def claims(shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The pickle of a language model whose embedding has this shape; all weights lie in one storage of 4 numbers."""
    storage = b"(" + plainly("storage") + b"ctorch\nFloatStorage\n" + plainly("0") + plainly("cpu") + b"K\4tQ"
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0"
    small, given = ((plainly(a) + plainly(b) + b"\x89}tR") for a, b in (((4, 1), (1, 1)), (shape, stride)))
    weights = {"encoder.weight": given, "rnn.weight_ih_l0": small, "rnn.weight_hh_l0": small, "decoder.weight": given}
    return b"\x80\2}(" + b"".join(plainly(name) + start + end for name, end in weights.items()) + b"u."


def greedy(path: Path) -> dict[str, Any]:
    """Pickles of a few bytes that make Python's unpickler, or a careless reader, take all memory or overflow."""
    huge = struct.pack("<Q", BIG)
    plain = {
        "bytearray": b"\x80\5\x96" + huge + b".",
        "bytes": b"\x80\4\x8e" + huge + b".",
        "text": b"\x80\4\x8d" + huge + b".",
        "text of 4 GB": b"\x80\2X\xff\xff\xff\xff.",
        "memo": b"\x80\2]r\xff\xff\xff\x7f.",
        "frame": b"\x80\4\x95" + huge + b".",
        "call": b"\x80\2cbuiltins\nbytearray\nM\xff\xffR.",
        "number": b"\x80\2\x8b\xff\xff\xff\x7f1.",
        "digits": b"I" + b"9" * 60000 + b"\n.",
        "deep lists": b"\x80\2" + b"]" * 40000 + b"a" * 39999 + b".",
        "deep key": b"\x80\2})" + b"\x85" * 10**5 + b"K\1s.",
        "deep call": b"\x80\2" + b"cx\ny\n" * 30000 + b")" + b"R" * 30000 + b".",
        "doubling": b"\x80\2]q\0" + b"".join(b"](h%ch%ce" % (i, i) + b"q%c" % (i + 1) for i in range(200)) + b".",
        "copies": b"\x80\2]q\0(" + b"K\1" * 50000 + b"eq\1" + b"ccollections\nOrderedDict\nh\1\x85R" * 5000 + b".",
        "itself": b"\x80\2]q\0h\0a.",
        "no stop": b"\x80\2]q\0h\0a",
        "underflow": b"\x80\2\x86.",
        "pop": b"0.",
        "setitem": b"\x80\2K\1K\2K\3s.",
        "extension": b"\x80\2\x82\1.",
    }
    for name, data in plain.items():
        (path / f"{name}.pkl").write_bytes(data)
    with zipfile.ZipFile(path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\2X\0\0\0\4" + b"a" * 2**26 + b".")
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    for name, shape, stride in (
        ("many", (10**12, 1), (1, 1)), ("expanded", (10**12, 1), (0, 0)), ("outside", (5, 1), (1, 1)),
        ("no dimension", (), ()), ("negative", (2, -2), (1, 1)),
    ):  # fmt: skip
        with zipfile.ZipFile(path / f"{name}.pt", "w") as archive:
            archive.writestr("x/data.pkl", claims(shape, stride))
            archive.writestr("x/data/0", numbers)
    return {file.name: file for file in sorted([*path.glob("*.pkl"), *path.glob("*.pt")])}


def test_files_that_ask_for_everything(tmp_path, capsys, monkeypatch):
    """Memory, depth, time: each is refused in a line, with little memory, as a model and as a vocabulary."""
    monkeypatch.setattr(pickles, "MOST_STEPS", 10**6)
    good = foreign.save(language(LSTM), tmp_path / "good.pt")
    (tmp_path / "bad").mkdir()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, before[1]))
    try:
        for name, path in greedy(tmp_path / "bad").items():
            for given in ([path, write_words(tmp_path)], [good, path]):
                assert toys.call(convert, *given, "--save", tmp_path / "new.pt") == 2, name
                assert path.name in toys.error_line(capsys), name
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# Files that are cut, or hold something else


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_cut_anywhere(tmp_path, capsys, zipped):
    """Whatever is left of it: one line that says so, nothing written."""
    whole = foreign.save(foreign.awd_lstm_lm(LAYOUTS["awd splits"][1]), tmp_path / "whole.pt", zipped).read_bytes()
    words = write_words(tmp_path)
    for length in range(0, len(whole), len(whole) // 60):
        (tmp_path / "old.pt").write_bytes(whole[:length])
        assert toys.call(convert, tmp_path / "old.pt", words, "--save", tmp_path / "new.pt") == 2
        assert "old.pt: is " in toys.error_line(capsys)
    assert not (tmp_path / "new.pt").exists()


def test_a_zip_with_other_bytes(tmp_path, capsys):
    """The checksum of each record is compared."""
    path = foreign.save(language(LSTM), tmp_path / "old.pt", True)
    number = struct.pack("<f", float(LSTM.embedding[3, 3]))
    assert path.read_bytes().count(number) == 1
    path.write_bytes(path.read_bytes().replace(number, struct.pack("<f", 1.5)))
    assert toys.call(convert, path, write_words(tmp_path), "--save", tmp_path / "new.pt") == 2
    assert "damaged" in toys.error_line(capsys)


def module_with(rnn: nn.Module) -> Any:
    model = foreign.ends(foreign.RNNModel(), LSTM)
    model.rnn = rnn
    return model


def qrnn_with(**attributes: Any) -> Any:
    contents = foreign.awd_lstm_lm(LAYOUTS["awd QRNN"][1])
    contents[0].rnns[1].__dict__.update(attributes)
    return contents


def with_splits(*splits: int) -> Any:
    return foreign.awd_lstm_lm(foreign.draw("LSTM", [8, 12, 8], True, splits))


def without(start: str) -> Any:
    return {name: part for name, part in language(LSTM).state_dict().items() if not name.startswith(start)}


def with_nan() -> Any:
    state = {name: part.clone() for name, part in language(LSTM).state_dict().items()}
    state["rnn.bias_hh_l1"][3] = torch.nan
    return state


def own(**parts: Any) -> dict[str, Any]:
    return {"format": files.MODEL_FORMAT, **parts}


OTHERS = {
    "RNN": (lambda: module_with(nn.RNN(8, 10, 2)), "RNN_TANH"),
    "bidirectional": (lambda: module_with(nn.LSTM(8, 5, 2, bidirectional=True)), "bidirectional"),
    "projection": (lambda: module_with(nn.LSTM(8, 20, 2, proj_size=10)), "projection"),
    "zoneout": (lambda: qrnn_with(zoneout=0.1), "zoneout"),
    "no output gate": (lambda: qrnn_with(output_gate=False), "output gate"),
    "a split past the end": (lambda: with_splits(7, 50), "do not fit 41 words: a list of 2 (7, 50)"),
    "no decoder": (lambda: without("decoder"), "without the decoder"),
    "no embedding": (lambda: without("encoder"), "rnn.weight_ih_l0 (40, 8)"),
    "a layer missing": (lambda: without("rnn.weight_ih_l1"), "without its weight"),
    "two models": (lambda: {**language(LSTM).state_dict(), "module.encoder.weight": LSTM.embedding}, "two models"),
    "another cell": (lambda: module_with(foreign.LayerNormLSTM(8, 10, 2)), "custom.LayerNormLSTM"),
    "nan": (with_nan, "nan"),
    "classifier": (
        lambda: {"0.encoder.weight": torch.ones(41, 8), "1.layers.0.weight": torch.ones(3)},
        "1.layers.0.weight (3,)",
    ),
    "vision": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "0.weight (4, 3, 3, 3)"),
    "tensor": (lambda: torch.ones(3, 4), "a tensor (3, 4)"),
    "words": (lambda: WORDS, "a list of 41 ('<unk>', 'w0', 'w1', ...)"),
    "nothing": (lambda: {}, "an empty dict"),
    "object": (lambda: foreign.Corpus(WORDS), "an object data.Corpus"),
    "our own model": (lambda: own(args={}), "is a saved model of this toolkit"),
    "control characters": (lambda: {"\x1b[2J\n" * 99: torch.ones(3)}, "?[2J?"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_converted_is_named(tmp_path, capsys, name):
    make, problem = OTHERS[name]
    for zipped in (False, True):
        path = foreign.save(make(), tmp_path / "old.pt", zipped, "torch 1")
        assert toys.call(convert, path, write_words(tmp_path), "--save", tmp_path / "new.pt") == 2
        line = toys.error_line(capsys)
        assert problem in line
        assert len(line) < 400
        assert line.isprintable()
    assert not (tmp_path / "new.pt").exists()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"PTB\n", "no file of torch.save"),
        (b"\x1f\x8b" + b"x" * 99, "unpack it"),
        (b"\x89HDF\r\n" + b"x" * 99, "HDF5"),
        (b'\x40\0\0\0\0\0\0\0{"__metadata__"', "safetensors"),
    ],
)
def test_files_of_other_kinds(tmp_path, capsys, data, problem):
    (tmp_path / "old.pt").write_bytes(data)
    assert toys.call(convert, tmp_path / "old.pt", write_words(tmp_path), "--save", tmp_path / "new.pt") == 2
    assert problem in toys.error_line(capsys)


def test_other_archives(tmp_path, capsys):
    for names, problem in ((["x/data.pkl", "x/constants.pkl"], "TorchScript"), (["a.npy"], "it holds a.npy")):
        with zipfile.ZipFile(tmp_path / "old.pt", "w") as archive:
            for name in names:
                archive.writestr(name, b"\x80\2N.")
        assert toys.call(convert, tmp_path / "old.pt", "--save", tmp_path / "new.pt") == 2
        assert problem in toys.error_line(capsys)


def test_vocabularies_that_do_not_fit(tmp_path, capsys):
    """Another number of words, no words, no such file, a word that is not there, one that is there already."""
    foreign.save(language(LSTM), tmp_path / "old.pt")
    short, none = write_words(tmp_path, WORDS[:-1]), foreign.dump({"a": [1]}, tmp_path / "none.pkl")
    short = short.rename(tmp_path / "short.txt")
    good = write_words(tmp_path)
    for argv, problem in (
        ([short], "short.txt: has 40 words, and the model 41"),
        ([none], "none.pkl: is a pickle without a list of words"),
        ([tmp_path / "gone.txt"], "gone.txt: No such file"),
        ([], "old.pt: has no vocabulary in it; give the file of its 41 words"),
        ([good, "--eos", "w99"], "--eos w99: is not in the vocabulary"),
        ([good, "--unk", "w7"], "has <unk> already"),
    ):
        assert toys.call(convert, tmp_path / "old.pt", *argv, "--save", tmp_path / "new.pt") == 2
        assert problem in toys.error_line(capsys)
    assert not (tmp_path / "new.pt").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    """Not without --force; never what is read, nor a model beside the state of a run."""
    old, new = foreign.save(language(LSTM), tmp_path / "old.pt"), tmp_path / "new.pt"
    words, before = write_words(tmp_path), old.read_bytes()
    new.write_text("precious")
    for save, more, problem in (
        (new, [], "new.pt: exists"),
        (old, ["--force"], "is a file to read"),
        (words, ["--force"], "is a file to read"),
        (tmp_path / "none" / "new.pt", [], "No such file"),
        (tmp_path, ["--force"], "is a folder"),
    ):
        assert toys.call(convert, old, words, "--save", save, *more) == 2
        assert problem in toys.error_line(capsys)
    assert (new.read_text(), old.read_bytes(), words.read_text()) == ("precious", before, "\n".join(WORDS))
    Path(f"{new}.state").write_text("")
    assert toys.call(convert, old, words, "--save", new, "--force") == 2
    assert "new.pt.state" in toys.error_line(capsys)
    Path(f"{new}.state").unlink()
    assert toys.call(convert, old, words, "--save", new, "--force") == 0
    assert difference(new, LSTM) < 1e-12
    assert toys.call(convert, tmp_path / "gone.pt", "--save", tmp_path / "x.pt") == 2
    assert "gone.pt: No such file" in capsys.readouterr().err
