"""Tokenizers that travel with a corpus and a model: counts and text, against the plain text itself."""

import json
import math
import random
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, read_log
from toys import LEVELS, WORDS, call, error_line, make_model, prepare_levels, save_model, text_of

import dynamiceval
import generate
import main
import pointer
import prepare
from corpus.codec import count_units, make_codec
from corpus.read import EOS, read_corpus
from harness import files
from harness.files import load_model
from utils import UserError

MODELS = Path(__file__).parent / "models"
LINES = [
    "Don't panic, said “Zoë”: it's 3.5% (or $5)… e.g. at 10:30, well-known!",
    "  two  spaces, two before and one after ",
    "naïve café — 日本語、テスト。 👩‍🚀🎉 a\u0301 é",
    "",
    "x",
    " ",
    "<eos> </s> [MASK] &amp; #1 @x _y_ ▲ 🎉🎉",
]
SENTENCES = [
    "The cat, which sat on the mat, didn't move.",
    "Don't you (of all people) know?",
    '"Hello," he said, "it\'s me!"',
    "“Hello,” she said, “it’s fine.”",
    "A well-known state-of-the-art test; it cost $5: a 3.5% rise!",
    "He paid $1,000 (about £700) for [some] things.",
    "Wait... what? No!",
    "At 10:30 the U.S. market opened - slowly.",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A corpus of each level, of the same text."""
    rng, text = random.Random(0), [*LINES, *SENTENCES]
    lines = [*text, *(" ".join(rng.choices(" ".join(text).split(), k=9)) for _ in range(150))]
    return prepare_levels(tmp_path_factory.mktemp("corpora"), lines, 320)


def opened(folder: Path) -> tuple[str, list[str], dict[str, int]]:
    """The tokenizer of a corpus, its vocabulary, and word -> id."""
    corpus = read_corpus(str(folder))
    return corpus.tokenizer, corpus.vocab, {word: i for i, word in enumerate(corpus.vocab)}


# Of a corpus


@pytest.mark.parametrize("level", LEVELS)
def test_a_corpus_knows_its_tokenizer_and_all_its_pieces(folders, level):
    """The file as it is, read twice (then from the cache); pieces that no text has, too."""
    text = (folders[level] / "tokenizer.json").read_text()
    for _ in range(2):
        corpus = read_corpus(str(folders[level]))
        assert corpus.tokenizer == text
        assert sorted(corpus.vocab) == sorted({*json.loads(text)["model"]["vocab"], "<eos>"})
    if level == "subword":
        seen = set(corpus.train.unique().tolist())
        assert len(seen) < len(corpus.vocab)  # bytes, for one
        assert len(corpus.vocab) >= 257


def test_a_corpus_without_one_has_none(folders, tmp_path, corpus):
    """Also when it had one at the last time; and it notices another one."""
    assert read_corpus(str(corpus)).tokenizer is None
    shutil.copytree(folders["subword"], tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    first = read_corpus(str(tmp_path / "copy"))
    assert first.tokenizer == path.read_text()
    path.write_text(path.read_text() + "\n")
    assert read_corpus(str(tmp_path / "copy")).tokenizer == path.read_text()
    path.unlink()
    assert read_corpus(str(tmp_path / "copy")).tokenizer is None
    assert len(read_corpus(str(tmp_path / "copy")).vocab) < len(first.vocab)


@pytest.mark.parametrize(
    "data",
    [b"{}", b"", b"garbage", b"[]", b"3", b'{"model": {}}', b'{"model": {"vocab": 3}}', b'{"model": null}',
     b"\xff\xfe", b'{"model": {"vocab": {"a": "b", "c": 1}}}', b"[" * 100_000],
    ids=["object", "empty", "garbage", "list", "number", "no vocab", "number for vocab", "null", "latin", "ids",
         "deep"],
)  # fmt: skip
def test_a_tokenizer_that_is_none_is_one_line(corpus, tmp_path, data):
    shutil.copytree(corpus, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache*"))
    (tmp_path / "copy" / "tokenizer.json").write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.json") as error:
        read_corpus(str(tmp_path / "copy"))
    assert len(str(error.value).splitlines()) == 1


# Of a model


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_a_model_takes_it_along_and_has_figures_of_words_and_characters(folders, corpus, tmp_path, capsys, level):
    """Stored as it is; the last line, and the log, have figures that compare across tokenizers, if there are any.

    Words and characters are those of the plain test text, each line's end one of both.
    """
    folder, save = folders.get(level, corpus), tmp_path / "m.pt"
    flags = ["--emsize", 6, "--nhid", 6, "--nlayers", 1, "--batch_size", 8, "--max_steps", 2, "--device", "cpu"]
    assert call(main, "--data", folder, "--save", save, *flags) in (0, None)
    tokenizer = (folder / "tokenizer.json").read_text() if level else None
    assert load_model(str(save), "--save")["tokenizer"] == tokenizer
    end = [line for line in capsys.readouterr().out.splitlines() if "| End of training" in line][-1]
    (test,) = [entry for entry in read_log(Path(f"{save}.log.jsonl")) if entry["kind"] == "test"]
    if level in (None, "word"):
        assert end.count("|") == 4
        assert not {"ppl_per_word", "bits_per_character"} & set(test)
        return
    text = make_codec(tokenizer, read_corpus(str(folder)).vocab, "here")
    lines = ["".join(map(text.piece, line.split())) for line in (folder / "test.txt").read_text().split("\n")]
    tokens = len(read_corpus(str(folder)).test) - 1  # the first one is only read
    first = text.piece((folder / "test.txt").read_text().split()[0])
    lines[0] = lines[0].removeprefix(first)
    words, characters = sum(len(x.split()) + 1 for x in lines[:-1]), sum(len(x) + 1 for x in lines[:-1])
    per_word = math.exp(test["loss"] * tokens / words)
    per_character = test["loss"] * tokens / characters / math.log(2)
    assert test["ppl_per_word"] == pytest.approx(per_word, rel=1e-6)
    assert test["bits_per_character"] == pytest.approx(per_character, rel=1e-6)
    found = re.search(r"\| test ppl per word +([\d.]+) \| test bits per character +([\d.]+)$", end.strip(" |"))
    assert [float(x) for x in found.groups()] == [
        pytest.approx(test["ppl_per_word"], abs=0.006),
        pytest.approx(test["bits_per_character"], abs=0.0006),
    ]
    as_it_is = {pointer: ["--lambdasm", 0], dynamiceval: ["--lr", 0, "--lamb", 0]}
    for script, flags in as_it_is.items():
        assert call(script, "--save", save, *flags) in (0, None)
        figures = re.findall(r"(\w+) ppl per word +([\d.]+) \|", capsys.readouterr().out)
        assert [split for split, _ in figures] == ["val", "test"]
        assert float(figures[1][1]) == pytest.approx(test["ppl_per_word"], rel=1e-5)
        logged = read_log(Path(f"{save}.log.jsonl"))[-1]
        for unit in ("ppl_per_word", "bits_per_character"):
            assert logged[unit] == pytest.approx(test[unit], rel=1e-5)


def test_a_model_keeps_it_when_it_is_trained_on(folders, tmp_path):
    """Also on the bare text, without the tokenizer's file beside it."""
    flags = ["--emsize", 6, "--nhid", 6, "--nlayers", 1, "--batch_size", 8, "--max_steps", 1, "--device", "cpu"]
    save, bare = tmp_path / "m.pt", shutil.copytree(folders["char"], tmp_path / "bare")
    assert call(main, "--data", folders["char"], "--save", save, *flags) in (0, None)
    (bare / "tokenizer.json").unlink()
    Path(f"{save}.state").unlink()
    new = tmp_path / "n.pt"
    assert call(main, "--resume", save, "--data", bare, "--save", new, "--max_steps", 1) in (0, None)
    tokenizer = (folders["char"] / "tokenizer.json").read_text()
    assert load_model(str(new), "--save")["tokenizer"] == tokenizer


def test_older_models_have_none():
    for path in MODELS.glob("*.pt"):
        assert "tokenizer" not in load(path)
        assert load_model(str(path), "--save")["tokenizer"] is None


# Words and characters of a text


@pytest.mark.parametrize("level", ["char", "subword"])
def test_units_are_counted_as_in_the_plain_text(folders, level):
    """White-space words and characters, and one of both for each `<eos>`; by any vocabulary's ids."""
    tokenizer, vocab, _ = opened(folders[level])
    text = make_codec(tokenizer, vocab, "here")
    vocab = random.Random(1).sample(vocab, len(vocab))
    for lines in (LINES, LINES[::-1], *([line] for line in LINES), LINES * 3, ["", "", ""], []):
        pieces = " ".join(f"{text.encode(line)} <eos>" for line in lines).split()
        ids = np.array([vocab.index(piece) for piece in pieces], dtype=np.int32)
        words = sum(len(line.split()) + 1 for line in lines)
        assert count_units(tokenizer, vocab, ids) == (words, sum(len(line) + 1 for line in lines)), lines


def test_units_are_not_counted_where_words_are_the_tokens(folders, corpus):
    """Neither at word level nor without a tokenizer."""
    for folder in (folders["word"], corpus):
        found = read_corpus(str(folder))
        assert count_units(found.tokenizer, found.vocab, found.test.numpy()) is None


@pytest.mark.parametrize("damaged", ["garbage", "[]", "3", "{}", '{"decoder": 3}', '{"decoder": {}}', "[" * 10**5])
def test_units_of_a_damaged_tokenizer_are_left_out(damaged):
    """The last line of a run does without them."""
    assert count_units(damaged, WORDS, np.arange(3)) is None


def test_a_word_that_subwords_cannot_spell_is_counted_as_it_stands(folders):
    """A test text that prepare.py did not make may bring one."""
    tokenizer, vocab, index = opened(folders["subword"])
    ids = np.array([len(vocab), index[EOS]])
    assert count_units(tokenizer, [*vocab, "’日本"], ids) == (2, 4)


# Text to tokens and back


@pytest.mark.parametrize("level", LEVELS)
def test_text_comes_back_as_it_went_in(folders, level):
    """Characters and subwords: every line exactly; words: English sentences. Streamed, a newline for `<eos>`."""
    tokenizer, vocab, index = opened(folders[level])
    lines = SENTENCES if level == "word" else [*LINES, *SENTENCES]
    text, back = make_codec(tokenizer, vocab, "here"), []
    for line in lines:
        encoded = text.encode(line).split()
        assert set(encoded) <= set(index)
        assert [token.piece for token in text.tokens(line)] == encoded
        back.append("".join(map(text.piece, encoded)) + text.piece("<eos>"))
    assert back == [f"{line}\n" for line in lines]
    assert text.end() == ""
    assert text.piece(text.encode("The").split()[0])
    assert text.end().endswith("\n")


@pytest.mark.parametrize("level", LEVELS)
def test_tokens_know_their_text_and_word(folders, level):
    """The white-space words are their tokens' texts joined, numbered in order; unknown text is kept."""
    tokenizer, vocab, _ = opened(folders[level])
    text = make_codec(tokenizer, vocab, "here")
    lines = [*LINES, *SENTENCES, "qwertz Ωμέγα, said   the cat: “xyzzy!”"]
    for line in lines[:-1] if level == "subword" else lines:  # bytes of a character are no text of their own
        if level == "subword" and not line.isascii():
            continue
        tokens = text.tokens(line)
        numbers = [token.word for token in tokens]
        assert numbers == sorted(numbers)
        words = {}
        for token in tokens:
            words[token.word] = words.get(token.word, "") + token.text
        found = [word.replace("▁", " ").strip() for word in words.values()]
        assert [word for word in found if word] == line.split()


def test_bytes_of_a_character_wait_for_the_last(folders):
    """Nothing comes before the character is whole; what is cut short is replaced."""
    tokenizer, vocab, _ = opened(folders["subword"])
    text = make_codec(tokenizer, vocab, "here")
    pieces = text.encode("x€").split()
    rare = text.encode("x\u4e59").split()
    assert "".join(map(text.piece, pieces)) == "x€"
    assert len(rare) == 4
    assert [text.piece(piece) for piece in rare] == ["x", "", "", "乙"]
    text.piece("<eos>")
    assert text.piece(rare[1]) + text.piece("x") == "\ufffdx"
    assert (text.piece(rare[1]) + text.piece("<eos>")).endswith("\n")
    assert text.piece("x") + text.piece(rare[1]) + text.end() in ("x\n", "x\ufffd\n")


@pytest.mark.parametrize("level", LEVELS)
def test_a_token_by_itself_is_shown_as_text(folders, level):
    """What `generate.py --next` prints: no mark of the tokenizer's own, a space where the text has one."""
    tokenizer, vocab, _ = opened(folders[level])
    text = make_codec(tokenizer, vocab, "--save m.pt")
    shown = [text.shown(word) for word in vocab]
    assert shown[vocab.index(EOS)] == EOS
    assert "\n" not in "".join(shown)
    for word, known in zip(shown, vocab, strict=True):
        if level == "subword" and known.removeprefix("Ġ").isascii() and known != EOS:
            assert word == known.replace("Ġ", " ")
        elif level == "word":
            assert word == known


@pytest.mark.parametrize("tokenizer", ["garbage", "{}", '{"model": {"vocab": {"a": 1}}}', "[]", "null"])
def test_a_garbage_tokenizer_is_one_line(tokenizer):
    with pytest.raises(UserError, match=r"^--save m\.pt") as error:
        make_codec(tokenizer, ["<eos>", "a"], "--save m.pt")
    assert len(str(error.value).splitlines()) == 1


# Generation


@pytest.mark.parametrize("level", LEVELS)
def test_prompt_and_text_are_plain(folders, tmp_path, capsys, level):
    """The prompt comes out as it went in, however many tokens it is; then plain text."""
    tokenizer, vocab, _ = opened(folders[level])
    save = save_model(tmp_path / "m.pt", vocab=vocab, tokenizer=tokenizer)
    prompt = f"{SENTENCES[3]}\n{SENTENCES[0]}" if level == "word" else f"{LINES[2]}\n{LINES[0]}"
    text = text_of(capsys, generate, "--save", save, "--prompt", prompt, "--words", 200)
    assert text.startswith(prompt)
    assert "<eos>" not in text.removeprefix(prompt)
    assert not re.search("[Ġ▁Ċ]", text.removeprefix(prompt))
    assert text.endswith("\n")
    assert len(text_of(capsys, generate, "--save", save, "--prompt", prompt, "--next", 5).splitlines()) == 5


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_unk_is_never_drawn_unless_asked_for(folders, tmp_path, capsys, level):
    """Not even by a model that hardly expects anything else. That of subwords has one by --vocab_size."""
    tokenizer, vocab, _ = opened(folders[level]) if level else (None, WORDS, {})
    vocab = [*vocab, *{"<unk>"} - {*vocab}]
    args, model, criterion = make_model(vocab=vocab)
    with torch.no_grad():
        model.decoder.bias[vocab.index("<unk>")] = 50
    save = tmp_path / "m.pt"
    files.save(str(save), files.model_contents(Namespace(**args), vocab, model, criterion, {}, tokenizer))
    for how in ([], ["--top_k", 1], ["--top_p", 0.5], ["--temperature", 0.01], ["--no_unk"]):
        argv = ["--save", save, "--words", 60, *how]
        assert "<unk>" not in text_of(capsys, generate, *argv)
        if how != ["--no_unk"]:
            assert text_of(capsys, generate, *argv, "--unk").count("<unk>") == 60
    assert "<unk>" in text_of(capsys, generate, "--save", save, "--next", 1)


def test_generate_with_a_garbage_tokenizer_is_one_line_and_status_2(tmp_path, capsys):
    save = save_model(tmp_path / "m.pt", tokenizer="garbage")
    assert call(generate, "--save", save) == 2
    assert "m.pt" in error_line(capsys)


@pytest.mark.parametrize(
    ("level", "line", "units"),
    [
        ("word", "hello there ▁ world", None),  # a token like the space of characters
        ("char", "日本語", (2, 4)),  # no space at all
        ("subword", "日本\u3000語 a\u00a0b\tc\fd", (7, 13)),  # all that Python calls white space
    ],
)
def test_units_of_odd_texts(tmp_path, level, line, units):
    source = tmp_path / "source"
    source.write_text(f"{line}\n" * 3)
    given = ["--valid_file", source, "--test_file", source, "--min_count", 1]
    assert call(prepare, source, "--level", level, *given, "--documents", "lines", "--out", tmp_path / "out") == 0
    corpus = read_corpus(str(tmp_path / "out"))
    ids = corpus.train.numpy()
    assert count_units(corpus.tokenizer, corpus.vocab, ids) == (units and tuple(3 * unit for unit in units))
