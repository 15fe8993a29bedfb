"""Scores of sentences under a saved model, against one word at a time in float64."""

import io
import math
import re
import sys

import pytest
import torch
from toys import WORDS, call, double_model, one_by_one, save_model

import score
import surprisal
from evaluate import evaluate

SENTENCES = ["w1 w2 w3", "", "w4 nobody knows w5 <unk>", *[f"w{i} w{2 * i} " * i for i in range(1, 20)]]
TOTAL = r"\| total \| lines (\d+) \| tokens (\d+) \| unknown (\d+) \| logprob (-?[\d.]+) \| ppl ([\d.]+)\n"


def scored(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[list[list[str]], list[float]]:
    """The cells of every row after the header, and the figures of the total: stdout is all table."""
    assert call(score, *argv) == 0
    out, err = capsys.readouterr()
    head, *rows = [line.split("\t") for line in out.splitlines()]
    assert head == ["line", "tokens", "unknown", "logprob", "ppl"]
    return rows, [float(value) for value in re.fullmatch(TOTAL, err).groups()]


@pytest.mark.parametrize("carry", [False, True])
def test_scores_are_those_of_one_word_at_a_time(tmp_path, capsys, monkeypatch, carry):
    """Each line's figures, and the total's, for state reset and carried, in batches and cut in pieces.

    A blank line is passed over, and counted by the numbers of those below it.
    """
    monkeypatch.setattr(surprisal, "BATCH_TOKENS", 64)
    save, file = save_model(tmp_path / "toy.pt"), tmp_path / "sentences.txt"
    file.write_text("\n".join(SENTENCES))
    rows, total = scored(capsys, "--save", save, file, *["--carry"] * carry)

    model, criterion = double_model()
    index, before, logprobs, tokens = {word: i for i, word in enumerate(WORDS)}, [], 0.0, 0
    numbered = [(number, sentence) for number, sentence in enumerate(SENTENCES, start=1) if sentence]
    for row, (number, sentence) in zip(rows, numbered, strict=True):
        ids = [0, *(index.get(word, 1) for word in sentence.split()), 0]
        source = [*before, *ids[:-1]]
        expected = one_by_one(model, criterion, source)[len(before) :]
        value = expected.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        before = source if carry else []
        unknown, n = [word for word in sentence.split() if word not in index], len(ids) - 1
        assert row[:3] == [str(number), str(n), str(len(unknown))]
        assert float(row[3]) == pytest.approx(value, abs=1e-3)
        assert float(row[4]) == pytest.approx(math.exp(-value / n), rel=1e-3, abs=0.005)
        logprobs, tokens = logprobs + value, tokens + n
    assert total[:3] == [len(numbered), tokens, 2]
    assert total[3] == pytest.approx(logprobs, abs=1e-2)
    assert total[4] == pytest.approx(math.exp(-logprobs / tokens), rel=1e-3)


def test_carried_scores_are_the_test_loss(tmp_path, capsys):
    """With --carry the total is the perplexity of the text as one stream, after an `<eos>`."""
    save, file = save_model(tmp_path / "toy.pt"), tmp_path / "text.txt"
    text = "w1 w2 w3\nw7 w5\nw2\n" * 30
    file.write_text(text)
    _, total = scored(capsys, "--save", save, file, "--carry")
    stream = [0, *(WORDS.index(word) for word in text.replace("\n", " <eos> ").split())]
    loss = evaluate(*double_model(), torch.tensor(stream), 70, 1)
    assert total[4] == pytest.approx(math.exp(loss), rel=1e-4)


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    """Texts that cannot be worked with, nothing on stdout; test_bad_input_cli.py has models that cannot be opened."""
    save = save_model(tmp_path / "toy.pt")
    no_unk = save_model(tmp_path / "no_unk.pt", vocab=["<eos>", "w1", "w2"])
    no_eos = save_model(tmp_path / "no_eos.pt", vocab=["w1", "w2"])
    text, latin, empty = (tmp_path / name for name in ("text.txt", "latin.txt", "empty.txt"))
    text.write_text("w1 w2\nw2 w1\nw1 zebra w2\n")
    latin.write_bytes("w1\ncaf\xe9\n".encode("latin-1"))
    empty.write_bytes(b"")
    for flags, names in (
        (["--save", no_eos, text], "<eos>"),
        (["--save", save, tmp_path / "none.txt"], "none.txt"),
        (["--save", save, tmp_path], str(tmp_path)),
        (["--save", save, latin], "latin.txt: not UTF-8 in line 2"),
        (["--save", save, empty], "empty.txt"),
        (["--save", no_unk, text], "line 3"),
        (["--save", save], "FILE"),
    ):
        assert call(score, *flags) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1), flags
        assert names in err


def test_utf_8_is_written_whatever_the_terminal_says(tmp_path, monkeypatch):
    save, file = save_model(tmp_path / "toy.pt"), tmp_path / "sentences.txt"
    file.write_text("w1 na\u00efve w2\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    assert call(score, "--save", save, file, "--tokens") == 0
    assert "<unk> na\u00efve".encode() in sys.stdout.buffer.getvalue()
