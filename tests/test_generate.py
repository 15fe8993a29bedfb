"""Text and next words from a saved model, against one word at a time in float64."""

import io
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from runner import ROOT
from toys import WORDS, call, double_model, error_line, every_model, make_model, one_by_one, save_model, text_of

import generate
from corpus.codec import WordCodec
from generate import next_word_prob

LOGPROB = torch.randn(40, generator=torch.Generator().manual_seed(3)).mul(2).log_softmax(0)
CHARACTERS = ["_", "<eos>", "e", "t", "a", "N", "<unk>"]
BYTES = ["<eos>", *(str(i) for i in range(256) if i != 10)]


# The distribution that words are drawn from


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    """p^(1/t), normalised."""
    power = LOGPROB.double().exp() ** (1 / temperature)
    torch.testing.assert_close(next_word_prob(LOGPROB, temperature, 0, 1.0), power / power.sum())


@pytest.mark.parametrize("k", [1, 3, 39, 40, 1000])
def test_top_k_keeps_the_k_most_probable(k):
    """The others get nothing, the kept ones keep their ratios."""
    kept = sorted(range(40), key=lambda i: -LOGPROB[i])[:k]
    expected = torch.zeros(40, dtype=torch.float64)
    expected[kept] = LOGPROB.double().exp()[kept]
    torch.testing.assert_close(next_word_prob(LOGPROB, 1.0, k, 1.0), expected / expected.sum())


@pytest.mark.parametrize("top_p", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_words_that_hold_the_share(top_p):
    """Words from the most probable one on until they hold P; always at least one."""
    prob = LOGPROB.double().exp()
    expected, held = torch.zeros(40, dtype=torch.float64), 0.0
    for i in sorted(range(40), key=lambda i: -prob[i]):
        expected[i] = prob[i]
        held += prob[i].item()
        if held >= top_p:
            break
    torch.testing.assert_close(next_word_prob(LOGPROB, 1.0, 0, top_p), expected / expected.sum())


def test_top_p_counts_after_temperature_and_top_k():
    """The share is of what temperature and top_k leave."""
    left = next_word_prob(LOGPROB, 0.7, 5, 1.0)
    expected = next_word_prob(left.log(), 1.0, 0, 0.8)
    torch.testing.assert_close(next_word_prob(LOGPROB, 0.7, 5, 0.8), expected)
    assert (expected > 0).sum() < 5


def generated(n: int, seed: int = 1, **settings) -> list[int]:
    _, model, criterion = make_model()
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    generator = torch.Generator().manual_seed(seed)
    return list(generate.generate(model, criterion, [0, 5, 9], n, generator=generator, **how))


def test_the_seed_decides_the_text():
    """The same seed draws the same words, another one others."""
    assert generated(40, seed=7) == generated(40, seed=7)
    assert generated(40, seed=7) != generated(40, seed=8)


def test_first_words_are_drawn_in_proportion():
    """Over 3,000 seeds the first word's frequencies lie within 5 standard errors of its probabilities."""
    _, model, criterion = make_model()
    logprob, _ = generate.next_logprob(model, criterion, [0, 5, 9], model.init_hidden(1))
    prob = next_word_prob(logprob, 1.5, 8, 1.0)
    counts, generator, n = Counter(), torch.Generator().manual_seed(1), 3000
    for _ in range(n):
        (word,) = generate.generate(model, criterion, [0, 5, 9], 1, 1.5, 8, 1.0, generator)
        counts[word] += 1
    for word, p in enumerate(prob.tolist()):
        assert abs(counts[word] - n * p) <= 5 * math.sqrt(n * p * (1 - p))


@every_model
def test_top_1_is_the_argmax_of_everything_before(how):
    """Greedy text = at each step the argmax after the whole text so far, read again from the start."""
    model, criterion = double_model(**how)
    ids = [0, 5, 9]
    for _ in range(12):
        ids.append(int(one_by_one(model, criterion, ids)[-1].argmax()))
    assert list(generate.generate(model, criterion, [0, 5, 9], 12, 1.0, 1, 1.0, torch.Generator())) == ids[3:]


# Words to text


def test_words_are_apart_by_spaces_and_eos_is_a_newline():
    """No `<eos>` in the text, no space at a line's start, a newline at the end."""
    text = WordCodec(WORDS)
    pieces = [text.piece(word) for word in ("w1", "<unk>", "<eos>", "<eos>", "w3", "w4")]
    assert "".join(pieces) + text.end() == "w1 <unk>\n\nw3 w4\n"


def test_characters_are_joined():
    """Symbols joined, `_` a space; and plain text back to symbols."""
    text = WordCodec(CHARACTERS)
    pieces = [text.piece(symbol) for symbol in ("t", "e", "_", "a", "<eos>", "_", "N", "<eos>")]
    assert "".join(pieces) + text.end() == "te a\n N\n"
    assert text.encode("te  a") == "t e _ _ a"
    assert not WordCodec([*CHARACTERS, "the"]).characters


def test_bytes_are_utf_8():
    """A character appears once its last byte is there; what is no UTF-8, or cut short, is replaced."""
    text = WordCodec(BYTES)
    assert [text.piece(str(byte)) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert text.piece("<eos>") == "\n"
    assert text.piece("255") == "\ufffd"
    assert text.piece("195") + text.end() == "\ufffd\n"
    assert text.encode("aé") == "97 195 169"
    assert not WordCodec(["<eos>", *map(str, range(50))]).bytes  # figures in a small vocabulary are words


# Next words


def test_next_words_are_the_most_probable_with_their_probabilities(tmp_path, capsys):
    """K rows, the most probable first; more than there are words gives all, and they sum to 1."""
    save = save_model(tmp_path / "toy.pt", splits=(7, 20))
    logprob = one_by_one(*double_model(splits=(7, 20)), [0, WORDS.index("w3"), 1])[-1]
    best = sorted(range(len(WORDS)), key=lambda i: -logprob[i])
    for k in (1, 5, 1000):
        assert call(generate, "--save", save, "--prompt", "w3 nobody", "--next", k) == 0
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [word for _, word in rows] == [WORDS[i] for i in best[:k]]
        for (prob, _), i in zip(rows, best, strict=False):
            assert float(prob) == pytest.approx(logprob[i].exp().item(), abs=2e-6)
    assert sum(float(prob) for prob, _ in rows) == pytest.approx(1, abs=1e-4)


# The script


def test_the_script_writes_the_prompt_and_goes_on(tmp_path, capsys):
    """The prompt as the model reads it, then --words words; the same for a seed."""
    save = save_model(tmp_path / "toy.pt")
    argv = ["--checkpoint", save, "--prompt", "w1 nobody\nw2", "--words", 30, "--model", "LSTM", "--cuda"]
    text = text_of(capsys, generate, *argv, "--seed", 5)
    assert text.startswith("w1 <unk>\nw2")
    assert text.endswith("\n")
    assert "<eos>" not in text
    assert text_of(capsys, generate, *argv, "--seed", 5) == text
    assert text_of(capsys, generate, *argv, "--seed", 6) != text
    words = len(text.removeprefix("w1 <unk>\nw2").replace("\n", " \n ").split())
    newlines = text.count("\n") - 1
    assert words + newlines in (30, 31)  # 31 when the end of the text added the last newline


def test_character_and_byte_models_read_and_write_plain_text(tmp_path, capsys):
    """A prompt of plain text comes out as it went in, with no space between the symbols drawn after it."""
    save = save_model(tmp_path / "characters.pt", vocab=CHARACTERS)
    text = text_of(capsys, generate, "--save", save, "--prompt", "tea Nat", "--words", 50, "--top_k", 3)
    assert text.startswith("tea Nat")
    save = save_model(tmp_path / "bytes.pt", vocab=BYTES)
    text = text_of(capsys, generate, "--save", save, "--prompt", "né\nà", "--words", 50)
    assert text.startswith("né\nà")


def test_utf_8_is_written_whatever_the_screen_says(tmp_path, monkeypatch):
    save = save_model(tmp_path / "toy.pt", vocab=[*WORDS, "caf\N{LATIN SMALL LETTER E WITH ACUTE}"])
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert call(generate, "--save", save, "--prompt", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "--words", 1) == 0
    assert screen.buffer.getvalue().startswith("caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode())


def test_a_prompt_that_is_not_utf_8(tmp_path, capsys):
    """Python gives its bytes as lone surrogates. A model of bytes takes any."""
    assert call(generate, "--save", save_model(tmp_path / "toy.pt"), "--prompt", "caf\udce9", "--words", 1) == 2
    assert "--prompt 'caf\\udce9': is not UTF-8" in error_line(capsys)
    assert call(generate, "--save", save_model(tmp_path / "b.pt", vocab=BYTES), "--prompt", "\udce9", "--words", 1) == 0


def test_text_streams_and_a_reader_may_leave(tmp_path):
    """The first words are there long before the last; a closed pipe ends it without a word on stderr."""
    save = save_model(tmp_path / "toy.pt")
    command = [sys.executable, ROOT / "generate.py", "--save", save, "--words", 10**9]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.read(100)
        assert run.poll() is None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 1


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    """Prompts and flags that cannot be worked with; test_bad_input_cli.py has models that cannot be opened."""
    save = save_model(tmp_path / "toy.pt")
    no_unk = save_model(tmp_path / "no_unk.pt", vocab=["<eos>", "w1", "w2"])
    no_eos = save_model(tmp_path / "no_eos.pt", vocab=["w1", "w2"])
    for flags, names in (
        (["--save", no_eos], "<eos>"),
        (["--save", save, "--top_p", 2], "--top_p"),
        (["--save", save, "--temperature", 0], "--temperature"),
        (["--save", save, "--top_k", -1], "--top_k"),
        (["--save", save, "--words", 0], "--words"),
        (["--save", save, "--next", 0], "--next"),
        (["--save", no_unk, "--prompt", "w1 zebra lion"], "'zebra'"),
    ):
        assert call(generate, *flags) == 2
        assert names in error_line(capsys)
