"""`main.py --keep_words`: words of training counted, and the weights kept at BabyLM's marks."""

import random

import pytest
import torch
from conftest import SMALL, load
from toys import LEVELS, call, prepare_levels

import export
import main
import train
from corpus import words
from corpus.codec import TokenizerCodec
from corpus.read import EOS, read_corpus
from corpus.words import MARKS, WordCount

SLOW = ["--lr", 0.5, "--epochs", 2, "--keep_words"]


@pytest.fixture
def hundreds(monkeypatch, tmp_path):
    """Marks after every 100 words instead of every million."""
    monkeypatch.setattr(words, "MILLION", 100)
    monkeypatch.chdir(tmp_path)


def test_the_marks_are_those_of_the_rules():
    """Every 1 M to 10 M, every 10 M to 100 M, every 100 M to 1000 M."""
    assert [*range(1, 11), *range(20, 101, 10), *range(200, 1001, 100)] == MARKS


def test_words_are_tokens_without_the_ends_of_lines():
    """Four columns of nine rows; the first row is nothing that a model has to predict."""
    vocab = [EOS, "a", "b"]
    ids = torch.tensor(random.Random(0).choices(range(3), k=38))
    count = WordCount(None, vocab, torch.device("cpu"))
    count.start_epoch(ids, 4)
    columns = ids[:36].view(4, 9)
    assert count.rows.tolist() == [int((columns[:, 1 : row + 1] != 0).sum()) for row in range(9)]


@pytest.mark.parametrize("level", LEVELS)
def test_words_of_the_text_with_a_tokenizer(tmp_path, level):
    """As many as white space separates, wherever the text is cut: counted over the decoded text itself."""
    lines = ["the cat  sat on a mat .", "Ünïcode wörds, and others!", "", "one", "x y z"] * 40
    corpus = read_corpus(str(prepare_levels(tmp_path, lines, 320)[level]))
    ids = corpus.train
    count = WordCount(corpus.tokenizer, corpus.vocab, torch.device("cpu"))
    count.start_epoch(ids, 1)
    codec = TokenizerCodec(corpus.tokenizer, "x")
    if level == "word":
        expected = sum(corpus.vocab[i] != EOS for i in ids[1:])
    else:
        text = "".join(codec.piece(corpus.vocab[i]) for i in ids.tolist())
        expected = len(text.split()) - 1  # the first word began with the first token
    assert int(count.rows[-1]) == expected


def test_a_piece_can_hold_several_words():
    """No tokenizer of prepare.py makes one, another can: the words within it count."""
    tokenizer = '{"decoder": {"type": "Other"}}'
    vocab = [EOS, "a b c", " d", "e ", "f", " "]
    order = [0, 1, 2, 3, 4, 5, 5, 4, 4, 0, 4]
    count = WordCount(tokenizer, vocab, torch.device("cpu"))
    count.start_epoch(torch.tensor(order), 1)
    text = "".join("\n" if i == 0 else vocab[i] for i in order)
    assert int(count.rows[-1]) == len(text.split())


def test_the_weights_are_kept_at_each_mark(corpus, hundreds, tmp_path, monkeypatch):
    """Each file holds the weights right after the step that passed its mark, in every epoch."""
    seen, counted = {}, 0
    step = train.train_step

    def noted(run, source, target):
        nonlocal counted
        loss = step(run, source, target)
        before, counted = counted, counted + sum(run.corpus.vocab[i] != EOS for i in target.flatten().tolist())
        for mark in MARKS:
            if before < mark * 100 <= counted:
                seen[mark] = run.model.encoder.weight.detach().clone()
        return loss

    monkeypatch.setattr(train, "train_step", noted)
    assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW) == 0
    kept = {mark: load(f"m.pt.chck_{mark}M") for mark in MARKS if (tmp_path / f"m.pt.chck_{mark}M").exists()}
    assert sorted(kept) == sorted(seen)
    assert len(kept) > 10
    for mark, saved in kept.items():
        assert torch.equal(saved["model"]["encoder.weight"], seen[mark]), mark
        assert saved["metrics"]["million_words"] == mark


@pytest.mark.parametrize("extra", [["--shuffle"], ["--average", "--optimizer", "adam", "--nonmono", 0]])
def test_a_run_that_goes_on_keeps_the_same_files(corpus, hundreds, tmp_path, extra):
    """Stopped in the middle of an epoch, and resumed without the flag, which the file has."""
    flags = ["--data", corpus, *SMALL, *SLOW, *extra]
    assert call(main, *flags, "--save", "whole.pt") == 0
    for steps in (2, 7, 9):
        resume = ["--resume", "cut.pt"] if steps > 2 else ["--save", "cut.pt", *flags]
        assert call(main, *resume, "--max_steps", steps) == 0
    assert call(main, "--resume", "cut.pt", "--max_steps", 0) == 0
    names = sorted(path.name.partition("M")[0].rpartition("_")[2] for path in tmp_path.glob("whole.pt.chck_*"))
    assert names == sorted(path.name.partition("M")[0].rpartition("_")[2] for path in tmp_path.glob("cut.pt.chck_*"))
    for name in names:
        whole, cut = (load(f"{run}.pt.chck_{name}M") for run in ("whole", "cut"))
        assert whole["metrics"] == cut["metrics"]
        for key, tensor in whole["model"].items():
            assert torch.equal(tensor, cut["model"][key]), (name, key)


def test_a_disk_that_does_not_take_a_file_does_not_stop_the_run(corpus, hundreds, tmp_path, capsys):
    (tmp_path / "m.pt.chck_1M").mkdir()
    assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW) == 0
    assert "m.pt.chck_1M: cannot be written" in capsys.readouterr().err
    assert (tmp_path / "m.pt.chck_2M").is_file()


def test_export_makes_a_folder_of_each(corpus, hundreds, tmp_path, capsys):
    assert call(main, "--data", corpus, *SMALL, "--save", "m.pt", *SLOW) == 0
    assert call(export, "m.pt", "--out", "out", "--checkpoints") == 0
    for mark in (1, 2, 10, 20):
        card = (tmp_path / f"out-chck_{mark}M" / "README.md").read_text()
        assert f"after {mark} million words of training" in card
        assert (tmp_path / f"out-chck_{mark}M" / "config.json").read_bytes() == (
            tmp_path / "out" / "config.json"
        ).read_bytes()
    assert len(list(tmp_path.glob("out-chck_*"))) == len(list(tmp_path.glob("m.pt.chck_*")))


def test_export_without_any_checkpoint_is_one_line(trained, tmp_path, capsys):
    assert call(export, trained("--epochs", 1).path, "--out", tmp_path / "out", "--checkpoints") == 2
    assert "--keep_words" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
