"""The forms in which people have pairs, lists and tables of words, against one word at a time in float64."""

import csv
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from runner import ENVIRONMENT, ROOT, WALL_S
from test_surprisal import BITS, encode, logprob_of, rows_of, slow, start_bits, table, write
from toys import (
    LEVELS,
    WORDS,
    SlowDynamics,
    call,
    double_model,
    error_line,
    make_model,
    mean_loss,
    prepare_levels,
    save_model,
)

import score
from corpus.codec import make_codec
from corpus.read import read_corpus
from harness import files
from model import RNNModel

logprob = cache(logprob_of)  # (kind, line, closing)
NO_COUNT = {"closing": False}
FIGURES = ["pieces", "unknown", "surprisal", "whole", "entropy"]
LEVEL_LINES = [
    "The cat sat on the mat.",
    "the cats sat, the mats",
    "a dog sits on cats",
    "dogs sit on a mat",
    "on a cat",
]


@pytest.fixture(scope="module")
def save(tmp_path_factory) -> Path:
    """A model whose vocabulary is WORDS."""
    return save_model(tmp_path_factory.mktemp("save") / "m.pt")


class Plain:
    """A model with the tokenizer of one level: its file, and what text is to it."""

    def __init__(self, corpus_folder: Path, folder: Path) -> None:
        corpus = read_corpus(str(corpus_folder))
        self.vocab, self.index = corpus.vocab, {word: i for i, word in enumerate(corpus.vocab)}
        self.codec = make_codec(corpus.tokenizer, corpus.vocab, "here")
        self.save = save_model(folder / f"{corpus_folder.name}.pt", vocab=corpus.vocab, tokenizer=corpus.tokenizer)

    def ids(self, text: str) -> list[int]:
        """With the closing `<eos>`."""
        return encode(self.codec.encode(text), self.index)

    def bits(self, ids: list[int]) -> list[float]:
        return [row[0] for row in slow("LSTM", [self.index["<eos>"]], ids, self.vocab)]


@pytest.fixture(scope="module")
def levels(tmp_path_factory) -> dict[str, Plain]:
    folder = tmp_path_factory.mktemp("levels")
    return {name: Plain(path, folder) for name, path in prepare_levels(folder, LEVEL_LINES * 8, 290).items()}


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def put(folder: Path, name: str, data: str | bytes) -> Path:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


# Minimal pairs


def blimp(good: str, bad: str, **more: object) -> str:
    return json.dumps({"sentence_good": good, "sentence_bad": bad, "field": "syntax", "pair_id": "1"} | more) + "\n"


# Name of a file, its text, and its pairs: line, paradigm, good, bad.
AB, CD = ("w1 w2", "w3 w4 w5"), ("w6 w6", "w6 w7")
TWO = [(1, "p", *AB), (2, "p", *CD)]
BELOW = [(2, "p", *AB), (3, "p", *CD)]
COLUMNS = "w1 w2\tw3 w4 w5\nw6 w6\tw6 w7\n"
PAIRS = {
    "BLiMP": ("x.jsonl", blimp(*AB, UID="u") + blimp(*CD, UID="v"), [(1, "u", *AB), (2, "v", *CD)]),
    "no UID": ("p.jsonl", blimp(*AB) + "\n" + blimp(*CD), [(1, "p", *AB), (3, "p", *CD)]),
    "no header": ("p.tsv", COLUMNS, TWO),
    "header": ("p.tsv", "good\tbad\n" + COLUMNS, BELOW),
    "BLiMP's header": ("p.tsv", "sentence_good\tsentence_bad\n" + COLUMNS, BELOW),
    "any header": ("p.tsv", "right\twrong\n" + COLUMNS, BELOW),
    "the other way": ("p.tsv", "bad\tgood\nw3 w4 w5\tw1 w2\nw6 w7\tw6 w6\n", BELOW),
    "Windows": ("p.tsv", b"\xef\xbb\xbf" + ("good\tbad\n" + COLUMNS).replace("\n", "\r\n").encode(), BELOW),
    "among others": (
        "x.tsv",
        "n\tsentence_bad\tparadigm\tsentence_good\tw\n1\tw3 w4 w5\tu\tw1 w2\t\n2\tw6 w7\tv\tw6 w6\tx\n",
        [(2, "u", *AB), (3, "v", *CD)],
    ),
    "commas": (
        "p.csv",
        'good,bad\n"w1, w2","w3 ""w4"" w5"\nw6 w6,w6 w7\n',
        [(2, "p", "w1, w2", 'w3 "w4" w5'), BELOW[1]],
    ),
    "Marvin and Linzen": ("x.tsv", "u\tsing\tw1 w2\tw3 w4 w5\nv\tplur\tw6 w6\tw6 w7\n", [(1, "u", *AB), (2, "v", *CD)]),
    "prefix": ("p.tsv", "bad\tprefix\tgood\nw3\tw1 w9\tw2\nw7\tw6\tw6\n", [(2, "p", "w1 w9 w2", "w1 w9 w3"), BELOW[1]]),
}


@pytest.mark.parametrize("form", PAIRS)
def test_every_form_of_pairs_gives_its_pairs(tmp_path, capsys, save, form):
    """Paradigm, line, both log-probabilities and what is right, in the order of the file; `all` is last."""
    name, text, pairs = PAIRS[form]
    file, each = put(tmp_path, name, text), tmp_path / "each.tsv"
    head, rows, _ = table(capsys, "--save", save, "--pairs", file, "--rows", each)
    assert head == ["paradigm", "pairs", "accuracy", "low", "high", "ties"]
    paradigms = [paradigm for _, paradigm, *_ in pairs]
    assert [(row[0], int(row[1])) for row in rows] == [
        *((x, paradigms.count(x)) for x in dict.fromkeys(paradigms)),
        ("all", 2),
    ]
    for row, (line, paradigm, *texts) in zip(read_rows(each), pairs, strict=True):
        assert (row["path"], row["line"], row["paradigm"]) == (str(file), str(line), paradigm)
        good, bad = (logprob("LSTM", text, **NO_COUNT) for text in texts)
        assert float(row["logprob_good"]) - float(row["logprob_bad"]) == pytest.approx(good - bad, abs=1e-3)
        assert (row["right"], row["tie"]) == (str(int(good > bad)), "0")


def test_goldberg_s_verbs_are_compared_after_their_prefix(tmp_path, capsys, save):
    """By number of attractors; what stands behind the mask, or in the second column, is not read."""
    rows = [("2", "w1 w2", "w5", "w6"), ("0", "w3", "w7", "w8"), ("2", "w3 w4", "w9", "w2")]
    lines = [f"{n}\tw9 w9\t{prefix} ***mask*** w9 zebra .\t{verb}\t{other}" for n, prefix, verb, other in rows]
    file, each = write(tmp_path / "lgd_dataset.tsv", lines), tmp_path / "each.tsv"
    _, groups, _ = table(capsys, "--save", save, "--pairs", file, "--rows", each)
    assert [(row[0].split()[0], row[1]) for row in groups] == [("2", "2"), ("0", "1"), ("all", "3")]
    for row, (_, prefix, *verbs) in zip(read_rows(each), rows, strict=True):
        good, bad = (logprob("LSTM", f"{prefix} {verb}", **NO_COUNT) for verb in verbs)
        assert float(row["logprob_good"]) - float(row["logprob_bad"]) == pytest.approx(good - bad, abs=1e-3)
        assert row["right"] == str(int(good > bad))


@pytest.mark.parametrize("level", LEVELS)
def test_a_compared_word_ends(tmp_path, capsys, levels, level):
    """After a prefix, the word and its end: `cat` that goes on as `cats` is none; Pimentel and Meister's."""
    plain, each = levels[level], tmp_path / "each.tsv"
    rows = [("the", "cat", "cats"), ("on a", "mats", "mat"), ("The cats", "sit", "sits")]
    file = write(tmp_path / "p.tsv", ["prefix\tgood\tbad", *map("\t".join, rows)])
    table(capsys, "--save", plain.save, "--pairs", file, "--rows", each)
    for row, (prefix, *words) in zip(read_rows(each), rows, strict=True):
        scores = []
        for word in words:
            ids = plain.ids(f"{prefix} {word}")
            scores.append(-BITS * (sum(plain.bits(ids)[:-1]) + start_bits(ids, plain.vocab, level)[len(ids) - 1]))
        assert float(row["logprob_good"]) - float(row["logprob_bad"]) == pytest.approx(scores[0] - scores[1], abs=1e-3)
        assert row["right"] == str(int(scores[0] > scores[1]))


@pytest.mark.parametrize("level", LEVELS)
def test_pairs_are_those_of_lm_evaluation_harness(tmp_path, capsys, levels, level):
    """Its rule: the tokens of each sentence after `<eos>`, without a closing one; argmax of [good, bad].

    argmax takes the first of two that are equal, so it counts a tie as right, where a tie is never right here.
    """
    plain, each = levels[level], tmp_path / "each.tsv"
    texts = [*LEVEL_LINES, "the cat sat.", "The cats sit on a mat", "zebras sat", "Zebra sat", "a dog"]
    pairs = [(good, bad) for i, good in enumerate(texts) for bad in texts[i:]]
    totals = {text: -BITS * sum(plain.bits(plain.ids(text))[:-1]) for text in texts}
    harness = sum([totals[good], totals[bad]].index(max(totals[good], totals[bad])) == 0 for good, bad in pairs)
    ties = sum(plain.ids(good) == plain.ids(bad) for good, bad in pairs)
    assert (ties > len(texts)) == (level == "word")  # there, two unknown words are the same token

    file = put(tmp_path, "p.jsonl", "".join(blimp(*pair) for pair in pairs))
    _, rows, err = table(capsys, "--save", plain.save, "--pairs", file, "--rows", each)
    assert [row[5] for row in rows] == [str(ties)] * 2
    assert f"{ties} of {len(pairs)} pairs" in err
    ours = sum(int(row["right"]) for row in read_rows(each))
    assert [float(row[2]) for row in rows] == pytest.approx([ours / len(pairs)] * 2, abs=1e-6)
    assert (ours + ties) / len(pairs) == harness / len(pairs)
    for row, (good, bad) in zip(read_rows(each), pairs, strict=True):
        assert float(row["logprob_good"]) == pytest.approx(totals[good], abs=1e-3)
        assert float(row["logprob_bad"]) == pytest.approx(totals[bad], abs=1e-3)


def test_no_header_is_a_pair(tmp_path, capsys, save):
    """A header of four unknown names above Marvin and Linzen's rows: refused, or passed over."""
    file, each = write(tmp_path / "p.tsv", ["kind\tcase\tright\twrong", "u\tsing\tw1 w2\tw3"]), tmp_path / "each.tsv"
    if call(score, "--save", save, "--pairs", file, "--rows", each) != 2:
        assert [row["line"] for row in read_rows(each)] == ["2"]


def test_files_and_folders_of_pairs(tmp_path, capsys, save):
    """Several at once; in a folder, files that are no pairs are passed over; a UID in two files is one paradigm."""
    folder = tmp_path / "blimp"
    folder.mkdir()
    put(folder, "a.jsonl", blimp(*AB, UID="u"))
    put(folder, "b.jsonl", blimp(*CD, UID="v") + blimp(*AB, UID="u"))
    put(folder, "SOURCE.md", "# BLiMP, as it was downloaded\n")
    put(folder, "LICENSE", "as is\n")
    own = put(tmp_path, "own.tsv", COLUMNS)
    _, rows, _ = table(capsys, "--save", save, "--pairs", folder, own)
    assert [row[:2] for row in rows] == [["u", "2"], ["v", "1"], ["own", "2"], ["all", "5"]]


@pytest.mark.parametrize(("right", "count"), [(0, 3), (3, 3), (1, 7)])
def test_the_interval_is_wilson_s(tmp_path, capsys, save, right, count):
    """Within 0 and 1 where all or none are right, too."""
    better, worse = sorted(["w1 w2", "w3 w4"], key=lambda text: -logprob("LSTM", text, **NO_COUNT))
    lines = [f"{better}\t{worse}"] * right + [f"{worse}\t{better}"] * (count - right)
    _, rows, _ = table(capsys, "--save", save, "--pairs", write(tmp_path / "p.tsv", lines))
    p, z = right / count, 1.959964
    middle, half = p + z**2 / (2 * count), z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    expected = [p, *((middle + sign * half) / (1 + z**2 / count) for sign in (-1, 1))]
    for row in rows:
        assert [float(x) for x in row[2:5]] == pytest.approx(expected, abs=1e-5)


def test_rows_never_replace_what_is_read(tmp_path, capsys, save):
    """--rows that names the file of pairs, or the model: refused, and both stay as they are."""
    file, copy = put(tmp_path, "p.tsv", COLUMNS), tmp_path / "m.pt"
    copy.write_bytes(save.read_bytes())
    for target in (file, copy):
        before = target.read_bytes()
        status = call(score, "--save", copy, "--pairs", file, "--rows", target)
        assert target.read_bytes() == before
        assert status == 2
        assert "--rows" in error_line(capsys)


# N-best lists

# Text of a file, flags; then id, scores and text of each hypothesis, and the weights of the scores.
MOSES = (
    "0 ||| w1 w2 ||| LM0= -3 TM= 1 2 ||| -1.5\n0 ||| w3 ||| LM0= -3 TM= 0 2 ||| -2.5\n1 ||| w4 w5 ||| F0= -9 ||| -0.5\n"
)
MOSES_ROWS = [("0", [-1.5], "w1 w2"), ("0", [-2.5], "w3"), ("1", [-0.5], "w4 w5")]
ONE = "a\t-1\tw1 w2\na\t-0.5\tw3\nb\t2.5e-1\tw4 zebra w5\n"
ONE_ROWS = [("a", [-1], "w1 w2"), ("a", [-0.5], "w3"), ("b", [0.25], "w4 zebra w5")]
TWO_SCORES = "a\t-1\t3\tw1 w2\na\t-2\t9\tw3\n"
TWO_ROWS = [("a", [-1, 3], "w1 w2"), ("a", [-2, 9], "w3")]
KALDI = "utt-a-1 w1 w2\nutt-a-2 w3\nutt-b-10 w4 w5\n"
KALDI_ROWS = [("utt-a", [], "w1 w2"), ("utt-a", [], "w3"), ("utt-b", [], "w4 w5")]
LISTS = {
    "one score": (ONE, [], ONE_ROWS, [1]),
    "weighted": (ONE, ["--score_weights", 5, "--weight", 0.5], ONE_ROWS, [5]),
    "two scores": (TWO_SCORES, [], TWO_ROWS, [1, 1]),
    "two weights": (TWO_SCORES, ["--score_weights", 0.5, -2], TWO_ROWS, [0.5, -2]),
    "length bonus": (ONE, ["--length_bonus", 7], ONE_ROWS, [1]),
    "length malus, <eos> counted": (ONE, ["--length_bonus", -7, "--eos", "count"], ONE_ROWS, [1]),
    "Moses": (MOSES, [], MOSES_ROWS, [1]),
    "alignments": (MOSES.replace("5\n", "5 ||| 0-0 1-1\n"), [], MOSES_ROWS, [1]),
    "three fields": (re.sub(r"\|\|\| \w+= .*? (?=\|)", "", MOSES), [], MOSES_ROWS, [1]),
    "Kaldi": (KALDI, ["--weight", 2], KALDI_ROWS, []),
}  # fmt: skip


@pytest.mark.parametrize("form", LISTS)
def test_every_form_of_lists_gives_its_best(tmp_path, capsys, save, form):
    """weights · scores + weight · ln p + bonus · words: of every text by --all, and the best one alone."""
    text, flags, hypotheses, weights = LISTS[form]
    given = dict(itertools.pairwise(flags))
    weight, bonus = given.get("--weight", 1), given.get("--length_bonus", 0)
    expected = []
    for name, scores, words in hypotheses:
        value, own = (
            logprob("LSTM", words, "--eos" in given),
            sum(map(float.__mul__, map(float, weights), map(float, scores))),
        )
        expected.append((name, own + weight * value + bonus * len(words.split()), own, value, words))
    flags = ["--save", save, "--nbest", put(tmp_path, "lists", text), *flags]
    best = {name: max(x for x in expected if x[0] == name) for name, *_ in expected}
    for more, wanted in (["--all"], expected), ([], list(best.values())):
        head, rows, _ = table(capsys, *flags, *more)
        assert head[:5] == ["id", "total", "score", "logprob", "text"]
        assert len(rows) == len(wanted)
        for row, (name, total, own, value, words) in zip(rows, wanted, strict=True):
            cells = dict(zip(head, row, strict=True))
            assert row[0].startswith(name)  # for Kaldi, --all may say which one of the list it is
            assert cells["text"] == words
            assert [float(x) for x in row[1:4]] == pytest.approx([total, own, value], abs=2e-3)
    for row, (_, scores, _) in zip(table(capsys, *flags, "--all")[1], hypotheses, strict=True):
        assert [float(x) for x in row[5:]] == pytest.approx(scores if len(scores) > 1 else [])


def test_kaldi_s_empty_texts_and_ids(tmp_path, capsys, save):
    """A line of an id alone is a text of no words; the lists are told apart by what stands before the last hyphen."""
    for empty in ("utt-1-2", "utt-1-2 "):
        file = write(tmp_path / "lists", ["utt-1-1 w1 w2", empty, "utt-10-1 w3"])
        _, rows, _ = table(capsys, "--save", save, "--nbest", file, "--eos", "count", "--all")
        assert [row[4] for row in rows] == ["w1 w2", "", "w3"]
        assert float(rows[1][3]) == pytest.approx(logprob("LSTM", "", True), abs=1e-3)
        assert len(table(capsys, "--save", save, "--nbest", file)[1]) == 2


@pytest.mark.parametrize("flags", [[], ["--weight", 0], ["--score_weights", 0], ["--score_weights", -1]])
@pytest.mark.parametrize("form", ["{}\t{}\t{}", "{0} ||| {2} ||| F= 0 ||| {1}"])
def test_a_score_of_minus_infinity_is_never_the_best(tmp_path, capsys, save, flags, form):
    """Unless the list has no other; no weight brings it back, or makes a NaN of it."""
    lists = [("a", "-inf", "w1 w2 w3 w4"), ("a", "-900", "w9"), ("a", "-inf", "w2"), ("b", "-inf", "w3 w3")]
    file = write(tmp_path / "lists", [form.format(*row) for row in lists])
    for more, texts in ([], ["w9", "w3 w3"]), (["--all"], [row[2] for row in lists]):
        _, rows, _ = table(capsys, "--save", save, "--nbest", file, *flags, *more)
        assert [row[4] for row in rows] == texts
        assert not any("nan" in cell for row in rows for cell in row)


# Tables with a word per row

# Sentences and their words. Cells of two words, of none, with quotes and commas; sentences that are called the same.
STORIES = {
    "A": [("1", ["w1", "w2", '"']), ("2", ["w3"]), ("1b", ["w4", 'w4"', "NA"])],
    "NA": [("1", ["w5 w6", "w7,"]), ("2", ["w8", ""])],
    "C": [("2", ["w9"] * 40)],
}
EMPTY = {
    "first": [("1", ["", "w1", "w2"])],
    "amid": [("1", ["w1", "", "w2"])],
    "alone": [("1", ["w1"]), ("2", [""]), ("3", ["w2"])],
}


QUOTINGS = (csv.QUOTE_ALL, csv.QUOTE_MINIMAL)


def raw(rows: list[list[str]], delimiter: str, **how: int) -> str:
    """As csv writes it; or, without `how`, cell beside cell as they are."""
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n", **how).writerows(rows)
    return out.getvalue() if how else "".join(delimiter.join(row) + "\n" for row in rows)


def check_table(capsys, folder: Path, save: Path, stories: dict[str, list], name: str, **how: int) -> None:
    """Every row and cell as it was, and the columns of --words --carry of each story alone, its sentences as lines."""
    delimiter = "," if name.endswith(".csv") else "\t"
    rows = [["story", "RT", "sent", "word", "note"]]
    for story, sentences in stories.items():
        rows += [[story, "NA", name, word, '5" NA'] for name, words in sentences for word in words]
    flags = ["--table", put(folder, name, raw(rows, delimiter, **how)), "--word", "word", "--sentence", "sent"]
    assert call(score, "--save", save, *flags, "--story", "story") == 0
    head, *found = csv.reader(io.StringIO(capsys.readouterr().out), delimiter=delimiter)
    assert head == [*rows[0], *FIGURES]
    assert [row[:5] for row in found] == rows[1:]
    figures = iter([row[5:] for row in found])
    for sentences in stories.values():
        lines = [" ".join(word for word in words if word) for _, words in sentences]
        alone = rows_of(capsys, "words", "--save", save, write(folder / "story", lines), "--carry")
        alone = iter([row for row in alone if row[2] != "<eos>"])
        for cell in (cell for _, words in sentences for cell in words):
            row, parts = next(figures), [next(alone) for _ in cell.split()]
            if not parts:
                assert row == [""] * 5
                continue
            expected = [sum(float(part[i]) for part in parts) for i in (3, 4, 5, 6)] + [float(parts[0][7])]
            assert [float(x) for x in row] == pytest.approx(expected, abs=1e-3)
    assert next(figures, None) is None


@pytest.mark.parametrize("level", ["corpus", *LEVELS])
@pytest.mark.parametrize(
    ("name", "how"),
    [("t.tsv", {}), *((f"t.{end}", {"quoting": how}) for end in ("tsv", "csv") for how in QUOTINGS)],
)
def test_a_table_has_the_figures_of_words_carried(tmp_path, capsys, save, levels, level, name, how):
    """Cells as they are, or quoted as R, pandas and csv do."""
    check_table(capsys, tmp_path, save if level == "corpus" else levels[level].save, STORIES, name, **how)


@pytest.mark.parametrize("where", EMPTY)
@pytest.mark.parametrize("level", ["corpus", *LEVELS])
def test_an_empty_cell_is_not_read(tmp_path, capsys, save, levels, level, where):
    """It is no space and no line: the words beside it have the figures that they have without it."""
    save = save if level == "corpus" else levels[level].save
    check_table(capsys, tmp_path, save, {"A": EMPTY[where]}, "t.tsv")


def test_a_quoted_cell_may_have_tabs(tmp_path, capsys, save):
    """Where all cells are quoted, as by R's write.table."""
    rows = [["word", "note"], ["w1", "a\tb"], ['"', "c"]]
    file = put(tmp_path, "t.tsv", raw(rows, "\t", quoting=csv.QUOTE_ALL))
    head, found, _ = table(capsys, "--save", save, "--table", file, "--word", "word")
    assert [row[:2] for row in [head, *found]] == rows


@pytest.mark.parametrize("given", ["neither", "sentence", "story", "nats"])
def test_a_text_of_a_table(tmp_path, capsys, save, given):
    """Without --story each sentence begins from a fresh state; without --sentence the story is one line."""
    file = write(tmp_path / "t.tsv", ["s\tword", "1\tw1", "1\tw2", "2\tw3", "2\tw4"])
    lines = ["w1 w2 w3 w4"] if given in ("neither", "nats") else ["w1 w2", "w3 w4"]
    flags = {"sentence": ["--sentence", "s"], "story": ["--story", "s"], "nats": ["--nats"]}.get(given, [])
    _, rows, _ = table(capsys, "--save", save, "--table", file, "--word", "word", *flags)
    unit = BITS if given == "nats" else 1
    expected = [row for line in lines for row in slow("LSTM", [0], encode(line))[:-1]]
    for row, (bits, entropy, _) in zip(rows, expected, strict=True):
        assert row[2:4] == ["1", "0"]
        assert [float(x) for x in row[4:]] == pytest.approx([x * unit for x in (bits, bits, entropy)], abs=1e-3)


# Lines, `<eos>` and stdin


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("mode", ["lines", "tokens", "words"])
def test_eos_counts_unless_it_is_skipped(tmp_path, capsys, save, mode, carry):
    """auto is count; skip leaves out its rows and its share, and the line after it is still read after it."""
    text, lines = "w1 w2 w3\n\nw4 zebra\n \nw5\n", {1: "w1 w2 w3", 3: "w4 zebra", 5: "w5"}
    flags = ["--save", save, put(tmp_path, "text", text), *["--carry"] * carry]
    count = rows_of(capsys, mode, *flags, "--eos", "count")
    assert rows_of(capsys, mode, *flags) == rows_of(capsys, mode, *flags, "--eos", "auto") == count
    skip = rows_of(capsys, mode, *flags, "--eos", "skip")
    if mode != "lines":
        assert [row for row in count if row[2] != "<eos>"] == skip
        assert len(count) == len(skip) + 3
        return
    before = [0]
    for counted, skipped, (number, line) in zip(count, skip, lines.items(), strict=True):
        bits = [row[0] for row in slow("LSTM", before if carry else [0], encode(line))]
        before += encode(line)
        for row, part in (counted, bits), (skipped, bits[:-1]):
            assert row[:2] == [str(number), str(len(part))]
            assert float(row[3]) == pytest.approx(-BITS * sum(part), abs=1e-3)
            assert float(row[4]) == pytest.approx(2 ** (sum(part) / len(part)), rel=1e-3)


def test_context_stays_beside_its_line_where_lines_are_blank(tmp_path, capsys, save):
    """The context of a blank line is passed over with it."""
    lines, contexts = ["w1 w2", "", "w3", "w4 w5", ""], ["w6", "w7 w7", "w1", "w8 w9", "w1"]
    text, context = write(tmp_path / "text", lines), write(tmp_path / "context", contexts)
    rows = rows_of(capsys, "tokens", "--save", save, text, "--context", context, "--eos", "skip")
    assert [row[0] for row in rows] == ["1", "1", "3", "4", "4"]
    pairs = [(line, before) for line, before in zip(lines, contexts, strict=True) if line]
    expected = [row[0] for line, before in pairs for row in slow("LSTM", [0, *encode(before)], encode(line))[:-1]]
    assert [float(row[3]) for row in rows] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("bias", "flags"), [(-20.0, []), (-20.0, ["--eos", "skip"]), (0.0, [])])
def test_a_model_that_has_hardly_seen_eos_says_so(tmp_path, capsys, bias, flags):
    """One line on stderr; where `<eos>` is as good as any token, none."""
    args, model, criterion = make_model()
    with torch.no_grad():
        model.decoder.bias[0] += bias
    contents = files.model_contents(Namespace(**args), WORDS, model, criterion, {}, None)
    files.save(str(tmp_path / "m.pt"), contents)
    text = write(tmp_path / "text", ["w1 w2 w3", "w4 w5"])
    err = table(capsys, "--save", tmp_path / "m.pt", text, *flags)[2].splitlines()
    assert [line for line in err if "<eos>" in line] == err[: 1 if bias else 0]
    assert len(err) == (2 if bias else 1)


@pytest.mark.parametrize("mode", ["lines", "tokens", "words", "adaptive"])
def test_a_scorer_beside_a_decoder_answers_each_line(tmp_path, monkeypatch, capsys, save, mode):
    """Each line's rows are there before the next line is sent; the rows are those of a file."""
    lines, flags = ["w1 w2", "", "w3", "zebra w4 w5"], []
    if mode == "adaptive":
        flags = ["--adaptive", "--data", write_corpus(tmp_path / "data"), "--batch_size", "8", "--lr", "0.001"]
    flags += [] if mode in ("lines", "adaptive") else [f"--{mode}"]
    expected = table(capsys, "--save", save, *flags, write(tmp_path / "text", lines))[1]
    (source, sink), (answer, reply) = os.pipe(), os.pipe()
    found, sent = [], []

    def decode() -> None:
        with open(sink, "w") as to, open(answer) as rows:
            for number, line in enumerate(lines, 1):
                to.write(f"{line}\n")
                to.flush()
                wanted = [row for row in expected if row[0] == str(number)]
                sent.append(line)
                for _ in range(len(wanted) + (number == 1)):  # and the header
                    found.append(rows.readline().rstrip("\n").split("\t"))

    decoder = threading.Thread(target=decode, daemon=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    watch = threading.Timer(WALL_S, os.dup2, (nowhere, sink))  # then the text ends, and rows are missing
    with open(reply, "w") as out, open(source) as text:
        monkeypatch.setattr(sys, "stdin", text)
        monkeypatch.setattr(sys, "stdout", out)
        decoder.start()
        watch.start()
        status = call(score, "--save", save, *flags, "-")
    watch.cancel()
    decoder.join(WALL_S)
    os.close(nowhere)
    assert status in (0, None)
    assert sent == lines
    assert found[1:] == expected


def test_a_process_answers_while_its_stdin_stays_open(save):
    """The same through two pipes, as a decoder has it."""
    argv = [sys.executable, ROOT / "score.py", "--save", save, "-"]
    pipe = subprocess.PIPE
    environment = os.environ | ENVIRONMENT | {"PYTHONUNBUFFERED": ""}  # a pipe is buffered, as it is in a shell
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        watch = threading.Timer(WALL_S, child.kill)
        watch.start()
        rows = []
        for line in ("w1 w2\n", "\nw3\n"):
            child.stdin.write(line)
            child.stdin.flush()
            rows.append(child.stdout.readline() if rows else child.stdout.readline() and child.stdout.readline())
        assert child.poll() is None
        rest, err = child.communicate()
        watch.cancel()
    assert [row.split("\t")[0] for row in rows] == ["1", "3"]
    assert float(rows[1].split("\t")[3]) == pytest.approx(logprob("LSTM", "w3", True), abs=1e-3)
    assert (child.returncode, rest, len(err.splitlines())) == (0, "", 1)


@pytest.mark.parametrize("flags", [[], ["--tokens"], ["--pairs"], ["--table"]])
def test_a_long_line_costs_what_its_tokens_cost(tmp_path, capsys, monkeypatch, save, flags):
    """Beside 63 short ones, at most half as many tokens again go through the model."""
    lengths = [3] * 40 + [3000] + [3] * 23
    if flags == ["--pairs"]:
        argv = [*flags, write(tmp_path / "p.tsv", [f"{'w1 ' * n}\t{'w2 ' * n}" for n in lengths])]
    elif flags == ["--table"]:
        argv = [
            *flags,
            write(tmp_path / "t.tsv", ["s\tword", *(f"{i}\tw1" for i, n in enumerate(lengths) for _ in range(n))]),
        ]
        argv += ["--word", "word", "--story", "s"]
    else:
        argv = [*flags, write(tmp_path / "text", ["w1 " * n for n in lengths])]
    forward, seen = RNNModel.forward, []

    def counted(self, ids, *more, **names):
        seen.append(ids.numel())
        return forward(self, ids, *more, **names)

    monkeypatch.setattr(RNNModel, "forward", counted)
    assert call(score, "--save", save, *argv) == 0
    tokens = (sum(lengths) + len(lengths)) * (2 if flags == ["--pairs"] else 1)
    assert 0.9 * tokens <= sum(seen) <= 1.5 * tokens


# Learning


def test_adaptive_does_not_learn_from_a_context(tmp_path, capsys, save):
    """It is read by the weights of the time; each line's segments alone move them."""
    lines, contexts = (
        ["w1 w2 w3 w4 w5 w6", "w7 w8", "w9 w9 w2 w3"],
        ["w4 w4 w5 w6 w7 w8 w9", "w5", "w1 w2 w3 w4 w1 w2 w3 w4"],
    )
    data, how = (
        write_corpus(tmp_path / "data"),
        {"lr": 0.003, "lamb": 0.05, "epsilon": 1e-4, "bptt": 4, "batch_size": 8},
    )
    flags = [str(x) for name, value in how.items() for x in (f"--{name}", value)]
    text, context = write(tmp_path / "text", lines), write(tmp_path / "context", contexts)
    rows = rows_of(capsys, "lines", "--save", save, text, "--context", context, "--adaptive", "--data", data, *flags)
    dynamics = SlowDynamics(*double_model(), how["lr"], how["lamb"], how["epsilon"])
    dynamics.take_statistics(read_corpus(str(data), WORDS).train.long(), how["batch_size"], how["bptt"])
    for row, line, before in zip(rows, lines, contexts, strict=True):
        hidden, total, read = dynamics.parts[0].init_hidden(1), 0.0, [0, *encode(before)]
        with torch.no_grad():
            for word in read[:-1]:
                _, hidden = dynamics.parts[0](torch.tensor([[word]]), hidden)
        words = [read[-1], *encode(line)]
        for start in range(0, len(words) - 1, 4):
            part = torch.tensor(words[start : start + 5])[:, None]
            loss, hidden = mean_loss(*dynamics.parts, part[:-1], part[1:], hidden)
            total -= loss.item() * (len(part) - 1)
            dynamics.move(loss * (len(part) - 1) / 4)
        assert float(row[3]) == pytest.approx(total, abs=5e-3)


@pytest.mark.parametrize("mode", [[], ["--tokens"], ["--words"]])
def test_learning_that_diverges_is_said(tmp_path, capsys, save, mode):
    """One line, status 1; no NaN as if it were a figure."""
    data, text = write_corpus(tmp_path / "data"), write(tmp_path / "text", ["w1 w2 w3 w4 w5 w6 w7 w8 " * 4] * 6)
    flags = ["--adaptive", "--data", data, "--batch_size", 8, "--lr", 1000]
    assert call(score, "--save", save, text, *flags, *mode) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert "--lr" in err
    assert "nan" not in out.lower()


def test_adaptive_stands_long_lines_at_its_defaults(tmp_path, capsys, save):
    """Lines of 20, 500 and 1500 words, one after the other."""
    data = write_corpus(tmp_path / "data")
    text = write(tmp_path / "text", [" ".join(WORDS[1 + i * 7 % 49] for i in range(n)) for n in (20, 500, 1500)])
    plain = rows_of(capsys, "lines", "--save", save, text)
    rows = rows_of(capsys, "lines", "--save", save, text, "--adaptive", "--data", data)
    for row, before in zip(rows, plain, strict=True):
        assert math.isfinite(float(row[3]))
        assert float(row[3]) > float(before[3]) - 1  # it has learned, if anything: the lines repeat themselves


# Bad input, flags that do nothing, output


HALF = '{"sentence_good": "w1 \\ud800", "sentence_bad": "w2"}\n'
BAD_FILES = {
    "half a character, good": ("--pairs", "f.jsonl", blimp(*AB) + HALF, ["line 2"]),
    "half a character, bad": ("--pairs", "f.jsonl", blimp(*AB) + HALF.replace("2", "\\udfff"), ["line 2"]),
    "half a character, UID": ("--pairs", "f.jsonl", blimp(*AB) + blimp(*AB, UID="u\ud800"), ["line 2"]),
    "broken": ("--pairs", "f.jsonl", blimp(*AB) + blimp(*AB)[:-9] + "\n", ["line 2"]),
    "a list": ("--pairs", "f.jsonl", blimp(*AB) + '["w1", "w2"]\n', ["line 2"]),
    "no bad": ("--pairs", "f.jsonl", blimp(*AB) + '{"sentence_good": "w1"}\n', ["line 2", "sentence_bad"]),
    "UID is a number": ("--pairs", "f.jsonl", '{"sentence_good": 1, "sentence_bad": "w1"}\n', ["line 1"]),
    "one column": ("--pairs", "f.tsv", COLUMNS + "w1 w2\n", ["line 3"]),
    "three columns": ("--pairs", "f.tsv", COLUMNS + "w1 w2\tw3 w4\tw5 w6\n", ["line 3"]),
    "short row": ("--pairs", "f.tsv", "id\tgood\tbad\n1\tw1 w2\tw3\n2\tw1\n", ["line 3"]),
    "no good": ("--pairs", "f.tsv", "id\tbad\tparadigm\n1\tw1 w2\tw3\n", ["good"]),
    "Marvin and Linzen, short": ("--pairs", "f.tsv", "u\ts\tw1 w2\tw3 w4\nu\ts\tw1 w2\n", ["line 2"]),
    "Goldberg, no mask": ("--pairs", "f.tsv", "0\tw1 w2\tw1 w2\tw3\tw4\n", ["line 1"]),
    "CLAMS": ("--pairs", "f.txt", "True\tw1 w2\nFalse\tw1 w3\n", ["CLAMS"]),
    "CLAMS, False first": ("--pairs", "f.tsv", "False\tw1 w2\nTrue\tw1 w3\n", ["CLAMS"]),
    "nan": ("--nbest", "f", ONE + "c\tnan\tw1\n", ["line 4"]),
    "inf": ("--nbest", "f", ONE + "c\tinf\tw1\n", ["line 4"]),
    "inf in a second score": ("--nbest", "f", TWO_SCORES + "c\t1\tInfinity\tw1\n", ["line 3"]),
    "too large a number": ("--nbest", "f", ONE + "c\t1e999\tw1\n", ["line 4"]),
    "Moses, nan": ("--nbest", "f", MOSES + "2 ||| w1 ||| F= 1 ||| nan\n", ["line 4"]),
    "Moses, no score": ("--nbest", "f", MOSES + "2 ||| w1\n", ["line 4"]),
    "Moses, features alone": ("--nbest", "f", "0 ||| w1 ||| LM0= -1 TM= 0.5 3\n", ["line 1"]),
    "Moses, no number": ("--nbest", "f", MOSES + "2 ||| w1 ||| F= 1 ||| x\n", ["line 4"]),
    "another number of scores": ("--nbest", "f", TWO_SCORES + "c\t1\tw1\n", ["line 3"]),
    "no such column": ("--table", "f.tsv", "story\tform\nA\tw1\n", ["word", "story", "form"]),
    "column there": ("--table", "f.tsv", "word\tentropy\nw1\t1\n", ["entropy"]),
    "short table row": ("--table", "f.csv", "story,word\nA,w1\nA\n", ["line 3"]),
    "long table row": ("--table", "f.csv", "story,word\nA,w1\nA,w2,w3\n", ["line 3"]),
    "no row": ("--table", "f.tsv", "story\tword\n", []),
    "no table": ("--table", "f.tsv", "", []),
    "a column twice": ("--table", "f.tsv", "word\tword\nw1\tw2\n", ["word"]),
    "blank": ("", "f", "\n \n\t\n", ["blank"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, capsys, save, name):
    """Nothing on stdout, no file of rows, status 2."""
    flag, file, data, names = BAD_FILES[name]
    more = {"--pairs": ["--rows", tmp_path / "each.tsv"], "--table": ["--word", "word"]}.get(flag, [])
    argv = [*([flag] if flag else []), put(tmp_path, file, data), *more]
    assert call(score, "--save", save, *argv) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    for word in names if name == "no such column" else [file, *names]:
        assert word in err
    assert out == ""
    assert not (tmp_path / "each.tsv").exists()


@pytest.mark.parametrize(("column", "again"), [("--story", "story"), ("--sentence", "sent")])
def test_a_text_that_comes_back_is_refused(tmp_path, capsys, save, column, again):
    """Rows of a story, or of a sentence within its story, that do not stand together; the line is named."""
    lines = ["story\tsent\tword", "A\t1\tw1", *(["B\t1\tw2"] if again == "story" else ["A\t2\tw2"]), "A\t1\tw3"]
    file = write(tmp_path / "t.tsv", lines)
    assert call(score, "--save", save, "--table", file, "--word", "word", "--story", "story", "--sentence", "sent") == 2
    assert "line 4" in error_line(capsys)


IDLE = [  # flags, and the one that does nothing
    *(([*of, flag, *value], flag)
      for of in (["--pairs", "p.tsv"], ["--nbest", "lists"])
      for flag, *value in (["--tokens"], ["--words"], ["--nats"], ["--carry"], ["--context", "text"], ["--adaptive"])),
    *((["--table", "t.tsv", "--word", "word", flag, *value], flag)
      for flag, *value in (["--tokens"], ["--words"], ["--carry"], ["--context", "text"])),
    *((["text", flag, value], flag)
      for flag, value in (("--word", "x"), ("--sentence", "x"), ("--story", "x"), ("--rows", "each"), ("--weight", 2),
                          ("--score_weights", 2), ("--length_bonus", 1))),
    *((["text", flag, 3], flag) for flag in ("--lr", "--lamb", "--epsilon", "--bptt", "--batch_size", "--max_batches")),
    (["text", "--all"], "--all"), (["text", "--nats"], "--nats"), (["--pairs", "p.tsv", "--all"], "--all"),
    (["--pairs", "p.tsv", "--weight", 2], "--weight"), (["--nbest", "lists", "--rows", "each"], "--rows"),
    (["--nbest", "lists", "--story", "x"], "--story"), (["--table", "t.tsv"], "--word"),
    (["--table", "t.tsv", "--word", "word", "--rows", "each"], "--rows"), (["text", "--tokens", "--words"], "--tokens"),
    (["text", "--carry", "--context", "text"], "--carry"), (["text", "--table", "t.tsv", "--word", "word"], "--table"),
    (["--nbest", "lists", "--pairs", "p.tsv"], "--nbest"), (["--table", "t.tsv", "--nbest", "lists"], "--table"),
    (["--nbest", "kaldi", "--score_weights", 2], "--score_weights"),
    (["--nbest", "lists", "--score_weights", 2, 3], "--score_weights"),
]  # fmt: skip


def test_flags_that_do_nothing_are_refused(tmp_path, capsys, monkeypatch, save):
    """One line that names the flag, nothing on stdout, no file."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"p.tsv": COLUMNS, "lists": ONE, "kaldi": KALDI, "t.tsv": "word\nw1\n", "text": "w1\n"}.items():
        put(tmp_path, name, text)
    for flags, named in IDLE:
        assert call(score, "--save", save, *flags) == 2, flags
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == 1, flags
        assert named in err, flags
        assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kaldi", "lists", "p.tsv", "t.tsv", "text"]


@pytest.mark.parametrize("vocab", [WORDS, [*WORDS, '"', '"w1', "'", "#", "NA"]])
@pytest.mark.parametrize("mode", ["tokens", "words", "nbest", "pairs"])
def test_quotes_are_read_back(tmp_path, capsys, vocab, mode):
    """Lone quotes, known or not, in every table that shows text: csv's defaults give every row and cell."""
    save, text = save_model(tmp_path / "m.pt", vocab=vocab), '" w1 "w1 w2" \' # NA "'
    words = text.split()
    if mode == "nbest":
        file = write(tmp_path / "lists", [f"a\t1\t{text}", f'"b\t1\t{text}'])
        assert [(row[0], row[4]) for row in table(capsys, "--save", save, "--nbest", file)[1]] == [
            ("a", text),
            ('"b', text),
        ]
    elif mode == "pairs":
        file, each = (
            put(tmp_path, "p.jsonl", blimp(text, "w1", UID='"') + blimp("w2", text, UID="v")),
            tmp_path / "each",
        )
        assert [row[0] for row in table(capsys, "--save", save, "--pairs", file, "--rows", each)[1]] == [
            '"',
            "v",
            "all",
        ]
        assert [(row["good"], row["bad"]) for row in read_rows(each)] == [(text, "w1"), ("w2", text)]
    else:
        rows = rows_of(capsys, mode, "--save", save, write(tmp_path / "text", [text, text]))
        shown = [word if word in vocab or mode == "words" else f"<unk> {word}" for word in [*words, "<eos>"]]
        assert [row[2].removeprefix("<unk> ") for row in rows] == [x.removeprefix("<unk> ") for x in shown * 2]
        if mode == "tokens":
            assert [row[2] for row in rows] == shown * 2
