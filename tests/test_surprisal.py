"""Surprisal of text, against one word at a time in float64."""

import csv
import io
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from torch import Tensor
from toys import (
    LEVELS,
    MODELS,
    WORDS,
    SlowDynamics,
    call,
    double_model,
    error_line,
    mean_loss,
    one_by_one,
    prepare_levels,
    save_model,
)

import score
import surprisal
from corpus.codec import make_codec
from corpus.read import read_corpus

INDEX = {word: i for i, word in enumerate(WORDS)}
LINES = ["w1 w2 w3", "", "w4 nobody knows w5 <unk>", *[f"w{i} w{2 * i} " * i for i in range(1, 12)], "w3"]
HEADS = {
    "lines": ["line", "tokens", "unknown", "logprob", "ppl"],
    "tokens": ["line", "position", "token", "surprisal", "entropy", "rank"],
    "words": ["line", "position", "word", "pieces", "unknown", "surprisal", "whole", "entropy"],
}
BITS = math.log(2)
CLOSE = 2e-4  # beside what is rounded in the table
every_kind = pytest.mark.parametrize("kind", MODELS)


def table(capsys, *argv: object) -> tuple[list[str], list[list[str]], str]:
    """Header, rows, and stderr."""
    assert call(score, *argv) in (0, None)
    out, err = capsys.readouterr()
    head, *rows = csv.reader(io.StringIO(out), delimiter="\t")
    assert all(len(row) == len(head) for row in rows)
    return head, rows, err


def rows_of(capsys, mode: str, *argv: object) -> list[list[str]]:
    head, rows, _ = table(capsys, *argv, *([] if mode == "lines" else [f"--{mode}"]))
    assert head == HEADS[mode]
    return rows


def write(path: Path, lines: list[str]) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def encode(line: str, index: dict[str, int] = INDEX) -> list[int]:
    """The ids of a line in corpus form, with its `<eos>`."""
    return [*(index.get(word, index.get("<unk>")) for word in line.split()), index["<eos>"]]


def slow(kind: str, before: list[int], line: list[int], vocab: list[str] = WORDS) -> list[tuple[float, float, int]]:
    """Surprisal and entropy in bits, and rank, of the tokens of a line after `before`."""
    source = [*before, *line[:-1]]
    logprob = one_by_one(*double_model(vocab=vocab, **MODELS[kind]), source)[len(before) - 1 :]
    entropy = -(logprob.exp() * logprob).sum(1)
    own = logprob.gather(1, torch.tensor(line)[:, None])
    rank = (logprob > own).sum(1) + 1
    return list(zip((-own[:, 0] / BITS).tolist(), (entropy / BITS).tolist(), rank.tolist(), strict=True))


def logprob_of(kind: str, line: str, closing: bool = True) -> float:
    """In nats, with or without the closing `<eos>`."""
    return -sum(row[0] for row in slow(kind, [0], encode(line))[: None if closing else -1]) * BITS


def check(rows: list[list[str]], expected: list[list[tuple[float, float, int]]], unit: float = 1.0) -> None:
    """Rows of --tokens against figures line by line; blank lines, of `<eos>` alone, have none."""
    flat = [(i, j, *row) for i, line in enumerate(expected, 1) for j, row in enumerate(line, 1) if len(line) > 1]
    assert [row[:2] for row in rows] == [[str(i), str(j)] for i, j, *_ in flat]
    for row, (_, _, bits, entropy, rank) in zip(rows, flat, strict=True):
        assert float(row[3]) == pytest.approx(bits * unit, abs=CLOSE)
        assert float(row[4]) == pytest.approx(entropy * unit, abs=CLOSE)
        assert row[5] == str(rank)


def model(tmp_path: Path, kind: str, **how: object) -> Path:
    return save_model(tmp_path / f"{kind}.pt", **MODELS[kind], **how)


# A corpus's form


@every_kind
def test_tokens_are_those_of_one_word_at_a_time(tmp_path, capsys, kind):
    """Surprisal, entropy before the token and rank; they add up to the line's row."""
    save, text = model(tmp_path, kind), write(tmp_path / "text", LINES)
    rows = rows_of(capsys, "tokens", "--save", save, text)
    check(rows, [slow(kind, [0], encode(line)) for line in LINES])
    words = [[*line.split(), "<eos>"] for line in LINES if line]
    shown = [w if w in INDEX else f"<unk> {w}" for line in words for w in line]
    assert [row[2] for row in rows] == shown
    for row in rows_of(capsys, "lines", "--save", save, text):
        bits = sum(float(token[3]) for token in rows if token[0] == row[0])
        assert float(row[3]) == pytest.approx(-bits * BITS, abs=1e-3)


def test_carried_tokens_go_on_from_line_to_line(tmp_path, capsys):
    """As one text; --nats gives nats."""
    save, text = model(tmp_path, "LSTM"), write(tmp_path / "text", LINES)
    before, expected = [0], []
    for line in LINES:
        expected.append(slow("LSTM", before, encode(line)))
        before = [*before, *encode(line)] if line else before
    check(rows_of(capsys, "tokens", "--save", save, text, "--carry", "--nats"), expected, BITS)


def test_context_is_read_and_not_counted(tmp_path, capsys):
    """Each line after the line of that number in another file, and its `<eos>`."""
    save, text = model(tmp_path, "LSTM"), write(tmp_path / "text", LINES)
    contexts = LINES[::-1]
    flags = "--save", save, text, "--context", write(tmp_path / "context", contexts)
    pairs = list(zip(LINES, contexts, strict=True))
    expected = [slow("LSTM", [0, *encode(context)], encode(line)) for line, context in pairs]
    check(rows_of(capsys, "tokens", *flags), expected)
    lines = [line for line in expected if len(line) > 1]
    for row, line in zip(rows_of(capsys, "lines", *flags), lines, strict=True):
        assert int(row[1]) == len(line)
        assert float(row[3]) == pytest.approx(-sum(x[0] for x in line) * BITS, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "flags"), [("LSTM", []), ("LSTM", ["--carry"]), ("LSTM", ["--context", "context"]), ("mixture", [])]
)
def test_figures_do_not_depend_on_what_is_beside_them(tmp_path, capsys, monkeypatch, kind, flags):
    """Lines and tokens at once, positions and rows at once: any numbers give the same."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS[1:], k=k)) for k in (3, 70, 0, 1, 12, 0, 33, 5, 5, 5, 41)]
    save, text = model(tmp_path, kind), write(tmp_path / "text", lines)
    write(tmp_path / "context", lines[::-1])
    found = []
    for numbers in ((32, 256, 1024, 128), (1, 1000, 1, 1), (3, 7, 10, 3), (100, 2, 64, 7), (2, 64, 5000, 1000)):
        names = ("BATCH_LINES", "WINDOW", "BATCH_TOKENS", "BATCH_DISTRIBUTIONS")
        for name, number in zip(names, numbers, strict=True):
            monkeypatch.setattr(surprisal, name, number)
        found.append(rows_of(capsys, "tokens", "--save", save, text, *flags))
    for other in found[1:]:
        for row, first in zip(other, found[0], strict=True):
            assert row[:3] + row[5:] == first[:3] + first[5:]
            assert [float(x) for x in row[3:5]] == pytest.approx([float(x) for x in first[3:5]], abs=1e-4)


def test_marks_windows_line_ends_and_stdin(tmp_path, capsys, monkeypatch):
    """The same rows as of the plain file."""
    save, text = model(tmp_path, "LSTM"), write(tmp_path / "text", LINES)
    plain = table(capsys, "--save", save, text)
    other = tmp_path / "other"
    other.write_bytes(b"\xef\xbb\xbf" + text.read_bytes().replace(b"\n", b"\r\n"))
    assert table(capsys, "--save", save, other) == plain
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.read_bytes())))
    assert table(capsys, "--save", save, "-") == plain


# Plain text


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    lines = [
        "The cat, it's said, sat on “the mat” (or not).",
        "naïve café 🎉 — the  cats sat",
        "日本 cat, the mat",
    ]
    return prepare_levels(tmp_path_factory.mktemp("corpora"), lines * 20, 290)


def test_white_space_in_an_unknown_token_leaves_the_columns_alone(tmp_path, capsys, corpora):
    """A tab that is no piece of the vocabulary; `table` counts the cells of each row."""
    corpus = read_corpus(str(corpora["subword"]))
    vocab = ["<unk>" if piece == "ĉ" else piece for piece in corpus.vocab]
    save = model(tmp_path, "LSTM", vocab=vocab, tokenizer=corpus.tokenizer)
    rows = rows_of(capsys, "tokens", "--save", save, write(tmp_path / "text", ["the\tcat"]))
    assert "<unk> " in [row[2] for row in rows]


PLAIN = ["The cat, it's said, sat.", "“the mat” (or zebra!)", "  the  cats 🎉 naïve", "café Ωx on"]


def start_bits(line: list[int], vocab: list[str], level: str) -> list[float]:
    """-log2 of the probability that a word starts, before each token of a line and after it: its definition."""
    letters = {"word": "", "char": "\u2581", "subword": "\u0120\u0109\u010a\u010b\u010c\u010d"}[level]
    spaces = [word == "<eos>" or bool(letters and word[0] in letters) for word in vocab]
    logprob = one_by_one(*double_model(vocab=vocab, **MODELS["LSTM"]), [vocab.index("<eos>"), *line[:-1]])
    mass = [sum(p for p, space in zip(row, spaces, strict=True) if space) for row in logprob.exp().tolist()]
    nothing = level == "word"  # its tokens carry no spaces
    return [0.0, *(0.0 if nothing else -math.log2(x) for x in mass[1:]), 0.0]


@pytest.mark.parametrize("level", LEVELS)
def test_plain_text_is_scored_by_its_tokenizer(tmp_path, capsys, corpora, level):
    """Tokens, lines, words and the total, for text as it is; words are what white space sets apart."""
    corpus = read_corpus(str(corpora[level]))
    index = {word: i for i, word in enumerate(corpus.vocab)}
    save = model(tmp_path, "LSTM", vocab=corpus.vocab, tokenizer=corpus.tokenizer)
    flags = "--save", save, write(tmp_path / "text", PLAIN)
    reader = make_codec(corpus.tokenizer, corpus.vocab, "here")
    ids = [encode(reader.encode(line), index) for line in PLAIN]
    expected = [slow("LSTM", [index["<eos>"]], line, corpus.vocab) for line in ids]
    rows = rows_of(capsys, "tokens", *flags)
    check(rows, expected)
    unknown = [row[2] for row in rows if row[2].startswith("<unk>")]
    if level == "word":
        assert unknown == ["<unk> zebra", "<unk> !", "<unk> Ωx"]
    elif level == "char":
        assert unknown == ["<unk> z", "<unk> b", "<unk> !", "<unk> Ω", "<unk> x"]
    else:
        assert unknown == []

    bits = [sum(row[0] for row in line) for line in expected]
    words = rows_of(capsys, "words", *flags)
    for number, line in enumerate(PLAIN, 1):
        own = [row for row in words if row[0] == str(number)]
        assert [row[1] for row in own] == [str(i) for i in range(1, len(own) + 1)]
        assert [row[2].removeprefix("<unk> ") for row in own if row[2] != "<eos>"] == line.split()
        assert sum(int(row[3]) for row in own) == len(ids[number - 1])
        assert [sum(float(row[i]) for row in own) for i in (5, 6)] == pytest.approx([bits[number - 1]] * 2, abs=1e-2)
    assert sum(int(row[4]) for row in words) == len(unknown)
    first = [row for row in words if row[0] == "1"]
    starts, position = start_bits(ids[0], corpus.vocab, level), 0
    for row in first:
        end = position + int(row[3])
        surprisal = sum(x[0] for x in expected[0][position:end])
        whole = surprisal - starts[position] + starts[end]
        wanted = [surprisal, whole, expected[0][position][1]]
        assert [float(x) for x in row[5:]] == pytest.approx(wanted, abs=1e-3)
        position = end

    rows, err = table(capsys, *flags)[1:]
    assert [int(row[1]) for row in rows] == [len(line) for line in ids]
    loss, tokens = sum(bits) * BITS, sum(map(len, ids))
    found = re.search(r"\| total \| lines (\d+) \| tokens (\d+) \| unknown (\d+) \| logprob (\S+) \| ppl (\S+)", err)
    assert [int(x) for x in found.groups()[:3]] == [len(PLAIN), tokens, len(unknown)]
    assert [float(x) for x in found.groups()[3:]] == pytest.approx([-loss, math.exp(loss / tokens)], rel=1e-3)
    more = re.search(r"ppl per word (\S+) \| bits per character (\S+)", err)
    assert bool(more) == (level != "word")
    if more:
        count, characters = sum(len(x.split()) + 1 for x in PLAIN), sum(len(x) + 1 for x in PLAIN)
        wanted = [math.exp(loss / count), sum(bits) / characters]
        assert [float(x) for x in more.groups()] == pytest.approx(wanted, rel=2e-3)


# Learning from line to line


def slow_adaptive(kind: str, ids: Tensor, lines: list[list[int]], how: dict[str, float]) -> list[float]:
    """The log-probabilities of the lines by the formula of dynamiceval.py, in float64."""
    slow = SlowDynamics(*double_model(**MODELS[kind]), how["lr"], how["lamb"], how["epsilon"])
    slow.take_statistics(ids, how["batch_size"], how["bptt"])
    found = []
    for line in lines:
        words, hidden, total = [0, *line], slow.parts[0].init_hidden(1), 0.0
        for start in range(0, len(line), how["bptt"]):
            part = torch.tensor(words[start : start + how["bptt"] + 1])[:, None]
            loss, hidden = mean_loss(*slow.parts, part[:-1], part[1:], hidden)
            total -= loss.item() * (len(part) - 1)
            slow.move(loss * (len(part) - 1) / how["bptt"])  # a shorter segment moves them by less, in proportion
        found.append(total)
    return found


@every_kind
def test_adaptive_is_dynamic_evaluation_line_by_line(tmp_path, capsys, kind):
    """The first segment has its plain figure; then the weights move after each; the file stays as it was."""
    lines = [LINES[0], *LINES[2:8]]
    save, text = model(tmp_path, kind), write(tmp_path / "text", lines)
    data = write_corpus(tmp_path / "data")
    how = {"lr": 0.003, "lamb": 0.05, "epsilon": 1e-4, "bptt": 4, "batch_size": 8}
    flags = [str(x) for name, value in how.items() for x in (f"--{name}", value)]
    argv = ["--save", save, text, "--adaptive", "--data", data, *flags]
    before = save.read_bytes()
    rows = rows_of(capsys, "lines", *argv)
    train = read_corpus(str(data), WORDS).train.long()
    expected = slow_adaptive(kind, train, [encode(line) for line in lines], how)
    plain = [logprob_of(kind, line) for line in lines]
    assert float(rows[0][3]) == pytest.approx(plain[0], abs=1e-3)
    assert [float(row[3]) for row in rows] == pytest.approx(expected, abs=5e-3)
    assert max(abs(a - b) for a, b in zip(expected, plain, strict=True)) > 0.1
    assert save.read_bytes() == before
    assert Path(f"{save}.stats").exists()
    stats = Path(f"{save}.stats").read_bytes()
    tokens = rows_of(capsys, "tokens", *argv)
    for i, value in enumerate(expected, 1):
        bits = sum(float(row[3]) for row in tokens if row[0] == str(i))
        assert -bits * BITS == pytest.approx(value, abs=5e-3)
    assert Path(f"{save}.stats").read_bytes() == stats


@pytest.mark.parametrize("how", ["--carry", "--context"])
def test_adaptive_without_moving_is_the_plain_score(tmp_path, capsys, how):
    """State carried, and read after another text: at a rate and decay of 0 every row is the same."""
    save, text = model(tmp_path, "LSTM"), write(tmp_path / "text", LINES[2:8])
    data = write_corpus(tmp_path / "data")
    flags = [how, *([write(tmp_path / "before", LINES[8:14])] if how == "--context" else [])]
    still = ["--adaptive", "--data", data, "--lr", 0, "--lamb", 0, "--batch_size", 8]
    plain = rows_of(capsys, "tokens", "--save", save, text, *flags)
    for row, expected in zip(rows_of(capsys, "tokens", "--save", save, text, *flags, *still), plain, strict=True):
        assert row[:3] == expected[:3]
        assert [float(x) for x in row[3:5]] == pytest.approx([float(x) for x in expected[3:5]], abs=1e-4)


# Pairs and lists


@pytest.mark.parametrize("closing", [False, True])
def test_pairs_are_counted_by_paradigm(tmp_path, capsys, closing):
    """BLiMP's lines, and two columns; a sentence that is its own pair is a tie and never right; a row per pair."""
    save, rng = model(tmp_path, "LSTM"), random.Random(1)
    pairs = [[" ".join(rng.choices(WORDS[2:], k=rng.randint(1, 6))) for _ in "gb"] for _ in range(30)]
    pairs += [[pair[0]] * 2 for pair in pairs[:10]]
    figures = [[logprob_of("LSTM", text, closing) for text in pair] for pair in pairs]
    right = [figure[0] > figure[1] and good != bad for figure, (good, bad) in zip(figures, pairs, strict=True)]
    blimp = [
        json.dumps({"UID": f"p{i % 3}", "sentence_good": good, "sentence_bad": bad, "field": "syntax"})
        for i, (good, bad) in enumerate(pairs)
    ]
    columns = ["\t".join(pair) for pair in pairs]
    for lines, groups in (
        (blimp, {f"p{i}": right[i::3] for i in range(3)}),
        *[(columns, {}), (["good\tbad", "", *columns, ""], {}), (["sentence_good\tsentence_bad", *columns], {})],
    ):
        file, each = write(tmp_path / "pairs.tsv", lines), tmp_path / "each.tsv"
        eos = ["--eos", "count"] if closing else []
        head, rows, err = table(capsys, "--save", save, "--pairs", file, "--rows", each, *eos)
        assert "10 of 40 pairs have the same tokens twice" in err
        assert head == ["paradigm", "pairs", "accuracy", "low", "high", "ties"]
        assert [row[0] for row in rows] == [*(groups or ["pairs"]), "all"]
        for name, count, accuracy, low, high, ties in rows:
            own = groups.get(name, right)
            assert int(count) == len(own)
            assert float(accuracy) == pytest.approx(sum(own) / len(own), abs=1e-6)
            assert float(low) < float(accuracy) < float(high)
            for bound in (float(low), float(high)):  # Wilson's: 1.96 deviations of the bound's own binomial away
                away = abs(bound - float(accuracy)) / math.sqrt(bound * (1 - bound) / len(own))
                assert away == pytest.approx(1.96, rel=1e-3)
            assert int(ties) == (10 if name in ("all", "pairs") else len(range(30 + int(name[1:]), 40, 3)))
        with open(each, encoding="utf-8", newline="") as out:
            for row, pair, figure, better in zip(
                csv.DictReader(out, delimiter="\t"), pairs, figures, right, strict=True
            ):
                assert (row["path"], row["good"], row["bad"]) == (str(file), *pair)
                assert [float(row[f"logprob_{name}"]) for name in ("good", "bad")] == pytest.approx(figure, abs=1e-3)
                assert (row["right"], row["tie"]) == (str(int(better)), str(int(pair[0] == pair[1])))


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("weight", [None, 0, 2.5])
def test_the_best_of_a_list_has_the_highest_total(tmp_path, capsys, weight, closing):
    """Score + weight · ln p; lists may be mixed up."""
    save, rng, W = model(tmp_path, "GRU"), random.Random(2), 1 if weight is None else weight
    lists = [
        (f"u{rng.randint(0, 4)}", round(rng.uniform(-40, 0), 2), " ".join(rng.choices(WORDS[1:], k=2)))
        for _ in range(30)
    ]
    file = write(tmp_path / "lists", ["", *(f"{name}\t{own}\t{text}" for name, own, text in lists), ""])
    flags = [*([] if weight is None else ["--weight", weight]), *(["--eos", "count"] if closing else [])]
    head, rows, _ = table(capsys, "--save", save, "--nbest", file, *flags)
    assert head == ["id", "total", "score", "logprob", "text"]
    best: dict[str, tuple] = {}
    for name, own, text in lists:
        logprob = logprob_of("GRU", text, closing)
        best[name] = max(best.get(name, (-math.inf,)), (own + W * logprob, own, logprob, text))
    assert {row[0]: row[4] for row in rows} == {name: entry[3] for name, entry in best.items()}
    assert len(rows) == len(best)
    for row in rows:
        assert [float(x) for x in row[1:4]] == pytest.approx(list(best[row[0]][:3]), abs=2e-3)


# Bad input


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    """Flags that do not go together, files that are not what they should be; the line where there is one."""
    monkeypatch.chdir(tmp_path)
    save, text = model(tmp_path, "LSTM"), write(tmp_path / "text", ["w1", "w2", "w3"])
    garbage = save_model(tmp_path / "garbage.pt", tokenizer="garbage")
    good = '{"UID": "a", "sentence_good": "w1", "sentence_bad": "w2"}'
    for name, data in {
        "binary": b"w1\nw2\0\n", "empty": b"", "latin": b"w1\n\xe9\n", "short": b"w1\nw2\n",
        "fields.jsonl": f'{good}\n{{"UID": "a", "sentence_good": "w1"}}\n'.encode(),
        "broken.jsonl": f"{good}\n{good[:-5]}\n".encode(), "three.tsv": b"w1\tw2\nw1\tw2\tw3\n",
        "one.tsv": b"w1\tw2\nw1\n", "blank.tsv": b"good\tbad\n\n", "long": b"w1\nw2\nw3\nw4\n",
        "number.jsonl": f'{good}\n{good.replace(chr(34) + "w2" + chr(34), "3")}\n'.encode(),
        "list.tsv": b"a\t1\tw1\na\t2\n", "score.tsv": b"a\t1\tw1\na\tx\tw1\n",
        "nan.tsv": b"a\t1\tw1\na\tnan\tw1\n", "space.tsv": b" \n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
    for flags, names in (
        (["text", "--tokens", "--words"], "--tokens"),
        ([], "FILE"),
        (["--tokens"], "FILE"),
        (["--pairs", "fields.jsonl", "--carry"], "--carry"),
        (["text", "--context", "short"], "short"),
        (["text", "--context", "long"], "long"),
        (["text", "--context", "none"], "none"),
        (["--pairs", "fields.jsonl"], "line 2"),
        (["--pairs", "broken.jsonl"], "line 2"),
        (["--pairs", "number.jsonl"], "line 2"),
        (["--pairs", "three.tsv"], "line 2"),
        (["--pairs", "one.tsv"], "line 2"),
        (["--pairs", "blank.tsv"], "no pair"),
        (["--nbest", "list.tsv"], "line 2"),
        (["--nbest", "space.tsv"], "no text"),
        (["--nbest", "score.tsv"], "line 2"),
        (["--nbest", "nan.tsv"], "line 2"),
        (["binary"], "line 2"),
        (["latin"], "line 2"),
        *([[*flag, name], name] for flag in ([], ["--pairs"], ["--nbest"]) for name in ("empty", "none")),
        (["text", "--save", garbage], "garbage.pt"),
    ):
        assert call(score, "--save", save, *flags) == 2, flags
        assert names in error_line(capsys), flags
    assert text.read_text() == "w1\nw2\nw3\n"
