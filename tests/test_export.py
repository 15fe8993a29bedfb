"""The folder that export.py makes: its files, its refusals, and reading it back bit for bit.

test_hub_model.py runs the model's code; tests/hub/run.sh opens such folders in Transformers, minicons and
lm-evaluation-harness.
"""

import ast
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from toys import LEVELS, MODELS, WORDS, call, error_line, file_limit, names_of, prepare_levels, save_model

import convert
import export
from corpus.files import read_tokenizer
from corpus.read import EOS, UNK
from harness import files
from harness.flags import MODEL, OPTIMISATION, REGULARISATION, RUN, ArgumentParser
from hub.card import command_of
from hub.folder import pack_tensors, read_back, unpack_tensors
from hub.tokenizer import make_tokenizer
from model import LAYERS, build
from surprisal import Reader
from utils import UserError

NAMES = {
    "README.md", "awd_lm.json", "config.json", "configuration_awd_lm.py", "generation_config.json", "layers_awd_lm.py",
    "model.safetensors", "modeling_awd_lm.py", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


EXPORTED = {name: how for name, how in MODELS.items() if names_of(how.get("rnn_type", "LSTM"))["model"] in export.KINDS}


def assert_same(found: Any, saved: Any) -> None:
    """Equal, of the same types, in the same order; tensors to the bit."""
    assert type(found) is type(saved)
    if isinstance(saved, torch.Tensor):
        assert found.dtype == saved.dtype
        assert found.shape == saved.shape
        assert torch.equal(found.view(-1).view(torch.uint8), saved.view(-1).view(torch.uint8))
    elif isinstance(saved, dict):
        assert list(found) == list(saved)
        for name in saved:
            assert_same(found[name], saved[name])
    elif isinstance(saved, list):
        assert len(found) == len(saved)
        for x, y in zip(found, saved, strict=True):
            assert_same(x, y)
    else:
        assert found == saved


@pytest.mark.parametrize("how", EXPORTED.values(), ids=EXPORTED)
def test_a_folder_read_back_is_the_model_bit_for_bit(tmp_path, capsys, how):
    path = save_model(tmp_path / "toy.pt", **how)
    assert call(export, path, "--out", tmp_path / "new" / "hub") == 0
    folder = tmp_path / "new" / "hub"
    assert {*os.listdir(folder)} == NAMES
    assert_same(read_back(folder), load(path))
    assert call(convert, folder, "--save", tmp_path / "again.pt") in (0, None)
    assert_same(load(tmp_path / "again.pt"), load(path))
    assert call(convert, folder, "--save", tmp_path / "more.pt", "--eos", "x") == 2
    assert "leave out VOCAB" in capsys.readouterr().err


def test_a_trained_model_is_read_back(tmp_path, trained, capsys):
    """With weight drop's names, all settings and figures."""
    run = trained("--epochs", 2)
    assert call(export, run.path, "--out", tmp_path / "hub") == 0
    saved = read_back(tmp_path / "hub")
    assert_same(saved, run.saved)
    assert any(name.endswith("_raw") for name in saved["model"])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"{saved['metrics']['valid_loss']:.4f}" in card
    assert "--emsize 8 --nhid 10 --nlayers 2" in card
    assert "1708.02182" in card
    assert str(tmp_path.parent) not in card


def test_config_and_tensors(tmp_path):
    """`<pad>` is one more row, of no probability; a tied weight is there once."""
    for name, how in {"tied": {}, "split": {"splits": (7, 20)}, "mixture": {"n_experts": 3}}.items():
        path = save_model(tmp_path / f"{name}.pt", **how)
        assert call(export, path, "--out", tmp_path / name) == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["vocab_size"], config["pad_token_id"], config["bos_token_id"]) == (51, 50, 0)
        assert config["splits"] == list(how.get("splits", ()))
        assert config["n_experts"] == how.get("n_experts", 0)
        assert config["sizes"] == [12, 16, 12]
        tensors = unpack_tensors((tmp_path / name / "model.safetensors").read_bytes())
        assert torch.equal(tensors["model.encoder.weight"][:-1], load(path)["model"]["encoder.weight"])
        assert not tensors["model.encoder.weight"][-1].any()
        assert tensors["decoder.bias"][-1] == -1e4
        assert "decoder.weight" not in tensors
        assert {file.name for file in (tmp_path / name).iterdir()} == set(export.NAMES)


def test_the_modeling_file_stands_alone():
    """It imports torch, Transformers, the standard library, and the file of settings beside it."""
    for name in export.CODE:
        tree = ast.parse((export.HUB / name).read_text())
        found = {node.module if node.level == 0 else "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        tops = {name.partition(".")[0] for name in found}
        assert tops <= {"", "torch", "transformers", "collections", "dataclasses", "functools", "itertools", "typing"}


def test_a_kind_of_layer_that_the_modeling_file_lacks_is_refused(tmp_path, capsys, monkeypatch):
    assert set(export.KINDS) <= set(LAYERS)
    monkeypatch.setattr(export, "KINDS", ("LSTM",))
    path = save_model(tmp_path / "toy.pt", rnn_type="GRU")
    assert call(export, path, "--out", tmp_path / "hub") == 2
    assert "GRU" in error_line(capsys)
    monkeypatch.setattr(export, "SETTINGS", [name for name in export.SETTINGS if name != "emsize"])
    assert call(export, save_model(tmp_path / "toy.pt"), "--out", tmp_path / "hub") == 2
    assert "--emsize 12" in error_line(capsys)


def test_safetensors_has_its_layout():
    """https://huggingface.co/docs/safetensors: a length, a header in JSON, numbers that begin at a multiple of 8."""
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "c": torch.ones(()),
    }
    data = pack_tensors(tensors)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert header["b"] == {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]}
    assert length % 8 == 0
    assert len(data) == 8 + length + 32
    assert_same(unpack_tensors(data), tensors)


# The tokenizer


def encode(made: dict[str, Any], text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(made)).encode(text).ids


def test_words_are_split_as_score_splits_them(tmp_path):
    """`<eos>` comes first, and for every newline."""
    made = make_tokenizer(None, WORDS, "<pad>", "toy")
    for line in ("w1 w2 zebra", "w1\u00a0w2\u2003w3  w4\tw5\x1cw6\x85w7 ", "<unk> w1,w2 W1", "a<unk>b w1"):
        ids = [WORDS.index(word) if word in WORDS else 1 for word in line.split()]
        assert encode(made, line) == [0, *ids]
    assert encode(made, "w1 w2\nw3\n") == [0, 3, 4, 0, 5, 0]
    assert encode(made, "w1 <eos> w2") == [0, 3, 0, 4]


def test_a_vocabulary_without_unk(tmp_path):
    """An unknown word is an error, as in score.py; Transformers is told of no `<unk>`."""
    path = save_model(tmp_path / "toy.pt", vocab=["w1", EOS, "w2"])
    assert call(export, path, "--out", tmp_path / "hub") == 0
    made = json.loads((tmp_path / "hub" / "tokenizer.json").read_text())
    assert encode(made, "w2 w1\n") == [1, 2, 0, 1]
    with pytest.raises(Exception, match="UNK"):
        encode(made, "zebra")
    assert "unk_token" not in json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())


def test_a_word_that_is_called_pad_stays_one(tmp_path):
    vocab = [EOS, UNK, "<pad>", "w1"]
    path = save_model(tmp_path / "toy.pt", vocab=vocab)
    assert call(export, path, "--out", tmp_path / "hub") == 0
    made = json.loads((tmp_path / "hub" / "tokenizer.json").read_text())
    assert encode(made, "<pad> w1") == [0, 2, 3]
    assert json.loads((tmp_path / "hub" / "special_tokens_map.json").read_text())["pad_token"] == "<<pad>>"


@pytest.mark.parametrize("level", LEVELS)
def test_a_tokenizer_of_prepare_gets_the_ids_of_the_model(tmp_path, capsys, level):
    text = ["She opened the door, and looked.", "The horse raced past  the barn: fell!", "Crème brûlée"] * 3
    contents, pieces = read_tokenizer(prepare_levels(tmp_path, text, 300)[level])
    vocab = [*reversed(pieces), EOS]
    path = save_model(tmp_path / "toy.pt", contents, vocab)
    assert call(export, path, "--out", tmp_path / "hub") == 0
    made = json.loads((tmp_path / "hub" / "tokenizer.json").read_text())
    reader, eos = Reader(opened(path), "toy"), len(vocab) - 1
    ids = [reader.line(1, line, "text").ids for line in text[:3]]
    for line, expected in zip(text, ids, strict=False):
        assert encode(made, line) == [eos, *expected]
    assert encode(made, "\n".join(text[:2])) == [eos, *ids[0], eos, *ids[1]]
    assert_same(read_back(tmp_path / "hub"), load(path))


def opened(path: Path) -> files.Opened:
    return files.to_evaluate(files.load_model(str(path), "--save"), torch.device("cpu"))


def test_a_vocabulary_without_pieces_of_its_tokenizer(tmp_path, capsys):
    """Words that the model lacks are unknown; of subwords there is no way to say so, and the model is refused."""
    text = ["She opened the door, and looked.", "The horse raced past the barn."] * 3
    corpora = prepare_levels(tmp_path, text, 270)
    capsys.readouterr()
    contents, pieces = read_tokenizer(corpora["word"])
    made = make_tokenizer(contents, [EOS, *(piece for piece in pieces if piece != "door")], "<pad>", "toy")
    assert encode(made, "door")[1:] == [[EOS, *pieces].index(UNK)]
    contents, pieces = read_tokenizer(corpora["subword"])
    path = save_model(tmp_path / "toy.pt", contents, [EOS, UNK, *pieces[:100]])
    assert call(export, path, "--out", tmp_path / "hub") == 2
    assert "lacks pieces of its tokenizer" in error_line(capsys)
    assert not (tmp_path / "hub").exists()


# The folder on disk


def test_content_of_a_folder_is_kept(tmp_path, capsys):
    """Without --force nothing is written; with it other files stay. An empty folder is taken."""
    path, folder = save_model(tmp_path / "toy.pt"), tmp_path / "hub"
    folder.mkdir()
    assert call(export, path, "--out", folder) == 0
    other = save_model(tmp_path / "other.pt", rnn_type="GRU")
    (folder / "notes.txt").write_text("mine")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    capsys.readouterr()
    for out in (folder, path, path / "x"):
        assert call(export, other, "--out", out) == 2
        assert f"--out {out}" in error_line(capsys)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert call(export, other, "--out", folder, "--force") == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert_same(read_back(folder), load(other))


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, capsys):
    path, folder = save_model(tmp_path / "toy.pt"), tmp_path / "hub"
    with file_limit(3000):
        assert call(export, path, "--out", folder) == 1
    assert "hub" in error_line(capsys)
    assert not folder.exists()
    assert call(export, path, "--out", folder) == 0
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with file_limit(3000):
        assert call(export, path, "--out", folder, "--force") == 1
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_what_a_kill_leaves_is_no_model_and_no_hindrance(tmp_path, capsys, monkeypatch):
    """config.json, without which nothing opens a folder, is there only beside all other files."""
    path, folder, renamed = save_model(tmp_path / "toy.pt"), tmp_path / "hub", []
    replace = os.replace

    def watch(source: str, target: str) -> None:
        renamed.append((os.path.basename(target), "config.json" in os.listdir(folder)))
        replace(source, target)

    assert call(export, path, "--out", folder) == 0
    monkeypatch.setattr(os, "replace", watch)
    assert call(export, path, "--out", folder, "--force") == 0
    assert [name for name, _ in renamed][-1] == "config.json"
    assert {*map(str, dict(renamed))} == NAMES
    assert not any(there for _, there in renamed)
    (folder / "config.json").unlink()
    (folder / "model.safetensors.0123abcd.tmp").write_bytes(b"x")
    assert call(export, path, "--out", folder) == 0
    assert {*os.listdir(folder)} == NAMES


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    path = save_model(tmp_path / "toy.pt")
    no_eos = save_model(tmp_path / "no_eos.pt", vocab=["w1", "w2"])
    damaged = save_model(tmp_path / "damaged.pt", tokenizer="{}")
    odd = load(path)
    odd["metrics"]["pair"] = (1, 2)
    torch.save(odd, tmp_path / "odd.pt")
    for argv, name in (
        ([tmp_path / "none.pt", "--out", tmp_path / "x"], "none.pt"),
        ([path], "--out"),
        ([no_eos, "--out", tmp_path / "x"], "<eos>"),
        ([damaged, "--out", tmp_path / "x"], "tokenizer"),
        ([tmp_path / "odd.pt", "--out", tmp_path / "x"], "metrics"),
    ):
        assert call(export, *argv) == 2
        assert name in error_line(capsys)
    assert not (tmp_path / "x").exists()


def test_a_damaged_folder_is_one_line(tmp_path, capsys):
    path, folder = save_model(tmp_path / "toy.pt"), tmp_path / "hub"
    assert call(export, path, "--out", folder) == 0
    good = {name: (folder / name).read_bytes() for name in ("model.safetensors", "awd_lm.json")}
    header = int.from_bytes(good["model.safetensors"][:8], "little")
    for name, data in (
        ("model.safetensors", good["model.safetensors"][:-1]),
        ("model.safetensors", good["model.safetensors"][: header - 1]),
        ("model.safetensors", b""),
        ("model.safetensors", good["model.safetensors"].replace(b"model.encoder.weight", b"model.encoder.weighs")),
        ("model.safetensors", good["model.safetensors"].replace(b'"F32"', b'"F16"')),
        ("model.safetensors", good["model.safetensors"].replace(b"[51, 12]", b"[12, 51]")),
        ("model.safetensors", good["model.safetensors"].replace(b"[51, 12]", b"[-51,-12]")),
        ("awd_lm.json", good["awd_lm.json"].replace(b"awd-lm model 1", b"awd-lm model 9")),
        ("awd_lm.json", good["awd_lm.json"].replace(b'"w1"', b'"w2"')),
        ("awd_lm.json", b"[]"),
        ("awd_lm.json", b"[" * 10**5),
        ("awd_lm.json", None),
    ):
        (folder / name).write_bytes(data) if data is not None else (folder / name).unlink()
        with pytest.raises(UserError) as error:
            read_back(folder)
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
        (folder / name).write_bytes(good[name])
    read_back(folder)


def test_the_command_of_the_card():
    args = vars(
        Namespace(model="GRU", data="/home/me/data/penn", tied=False, emsize=400, nhid=9, when=[3, 5], wdrop=0.5)
    )
    assert command_of(args, "main.py") == "python main.py --data penn --model GRU --untied --nhid 9 --when 3 5"
    build({**args, "nlayers": 1}, 5)


def test_the_command_of_the_card_of_a_fine_tuned_model():
    """The model's settings that finetune.py has no flags for are not in it."""
    args = {"model": "LSTM", "data": "penn", "splits": [], "min_count": 2, "chrono": 20.0, "wdrop": 0.1}
    command = command_of(args, "finetune.py")
    assert command == "python finetune.py --data penn --save MODEL.pt --wdrop 0.1"
    ArgumentParser("", RUN, MODEL, REGULARISATION, OPTIMISATION, saved=True).parse_args(command.split()[2:])
