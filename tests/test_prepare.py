"""Any text to a corpus: against the text itself, its own counts, and a GPT-2 byte table written out here."""

import io
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from runner import run_fresh
from toys import LEVELS, call, error_line

import corpus.text
import dynamiceval
import finetune
import main
import pointer
import prepare
from corpus.corpora import SPLITS
from corpus.read import read_corpus
from utils import UserError

EVERY = "--min_count", 1  # no word is rare
CHAR = "--level", "char", *EVERY  # documents can be told apart in every text
ODD = """Don't panic, said “Zoë”: it's 3.5% (or $5)… e.g. at 10:30, well-known!
  two  spaces, two before
naïve café — 日本語、テスト。 👩‍🚀🎉 a\u0301
<unk> <eos> <eos>  and </s> [MASK] \\n &amp; #1 @x _y_ a_b ▲
don’t don't DON'T rock'n'roll 1,000,000.00 U.S.A. x=y+z; http://a.b/c?d=e"""


def byte_of() -> dict[str, int]:
    """GPT-2's table: printable bytes are themselves, the others, in order, 256 and on."""
    table = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    rest = [b for b in range(256) if b not in table.values()]
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF = byte_of()


def plain(tokens: list[str], level: str) -> str:
    """The text of a line of a character or subword corpus."""
    if level == "char":
        return "".join(" " if token == "▁" else token for token in tokens)
    return bytes(BYTE_OF[c] for c in "".join(tokens)).decode()


def lines_of(folder: Path, split: str = "train") -> list[str]:
    """A split's lines, without the empty one that may end its last document."""
    text = (folder / f"{split}.txt").read_bytes().decode()
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    assert all(line == " ".join(line.split(" ")) and "" not in line.split(" ") for line in lines if line)
    return lines if lines[-1] else lines[:-1]


def contents(folder: Path) -> dict[str, bytes]:
    names = {"train.txt", "valid.txt", "test.txt", "tokenizer.json", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == names
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def make(out: Path, *argv: object) -> Path:
    assert call(prepare, *argv, "--out", out) in (0, None)
    return out


def whole(tmp_path: Path, text: str, *argv: object, name: str = "whole") -> Path:
    """A corpus whose training text is all of `text`, in order; valid and test have the same."""
    source = write(tmp_path / f"{name}.source", text)
    return make(tmp_path / name, source, "--valid_file", source, "--test_file", source, *argv)


def article(number: int, seed: int = 0, lines: int = 3) -> str:
    """A document whose every line names it."""
    rng = random.Random(f"{seed} {number}")
    words = ["the", "cat,", "dog.", "sat", "don't", "on", "(mat)", "café", "日本", "¡go!"]
    words += ["0123456789"]  # all digits: each name's are known
    return "".join(f"doc{number} {' '.join(rng.choices(words, k=rng.randint(3, 9)))}\n" for _ in range(lines))


def blocks(count: int, seed: int = 0) -> str:
    return "\n".join(article(i, seed) for i in range(count))


def documents(folder: Path, split: str) -> set[str]:
    return set(re.findall(r"doc\d+", plain((folder / f"{split}.txt").read_text().split(), "char")))


# What the tokens are


def test_words_are_split_from_punctuation_and_nothing_is_lost(tmp_path):
    """No token has letters and a comma, bracket or quote; together they are the line without its spaces."""
    lines = lines_of(whole(tmp_path, ODD, *EVERY))
    for line, source in zip(lines, ODD.split("\n"), strict=True):
        assert line.replace(" ", "") == "".join(source.split())
        assert not re.search(r'\w[,!?;()"“”…]|[,!?;()"“”…$]\w', line.replace("1,000,000.00", ""))
    assert lines[0].startswith("Don't panic , said “ Zoë ” : it's ")


@pytest.mark.parametrize("level", ["char", "subword"])
def test_characters_and_subwords_keep_every_character(tmp_path, level):
    """Spaces at the ends and in a row, accents, emoji, `<eos>` written out; as the corpus is read, too."""
    folder = whole(tmp_path, ODD, "--level", level, *EVERY)
    lines = lines_of(folder)
    assert [plain(line.split(), level) for line in lines] == ODD.split("\n")
    if level == "char":
        assert lines[1].startswith("▁ ▁ t w o ▁ ▁ s")
    corpus = read_corpus(str(folder))
    tokens = [corpus.vocab[i] for i in corpus.train.tolist()]
    assert tokens == (folder / "train.txt").read_text().replace("\n", " <eos> ").split()


@pytest.mark.parametrize("min_count", [1, 2, 4])
def test_words_rarer_than_min_count_are_unknown(tmp_path, min_count):
    """Counted in the training text only; the other texts' words are unknown unless it knows them."""
    train = "a a a a b b b c c d\na a\n"
    other = write(tmp_path / "other", "a b c d e e e e e e\n")
    source = write(tmp_path / "source", train)
    folder = make(tmp_path / "out", source, "--valid_file", other, "--test_file", other, "--min_count", min_count)
    counts = Counter(train.split())
    for split, text in (("train", train), ("valid", other.read_text()), ("test", other.read_text())):
        expected = [word if counts[word] >= min_count else "<unk>" for word in text.split()]
        assert " ".join(lines_of(folder, split)).split() == expected


@pytest.mark.parametrize("level", LEVELS)
def test_vocab_size_is_the_number_of_types(tmp_path, level):
    """`<unk>` and `<eos>` included; the most frequent words stay."""
    size = {"word": 9, "char": 12, "subword": 290}[level]
    folder = whole(tmp_path, blocks(60), "--level", level, "--vocab_size", size)
    vocab = read_corpus(str(folder)).vocab
    assert len(vocab) == size
    if level == "char":
        common = Counter("".join(blocks(60).split("\n")).replace(" ", "▁")).most_common(size - 2)
        assert set(vocab) == {"<unk>", "<eos>", *(c for c, _ in common)}


def test_lower_is_a_lower_case_text(tmp_path):
    for level in LEVELS:
        text = ODD.upper().replace("<UNK>", "")
        first = whole(tmp_path, text, "--level", level, "--lower", *EVERY, name=f"lower {level}")
        second = whole(tmp_path, text.lower(), "--level", level, *EVERY, name=level)
        assert lines_of(first) == lines_of(second)


@pytest.mark.parametrize("level", LEVELS)
def test_blank_lines_vanish_or_become_one(tmp_path, level):
    """At word level there are none; else a run of them is one empty line."""
    folder = whole(tmp_path, "a b\n\n\n \nc d\ne f\n\ng h\n", "--level", level, *EVERY)
    expected = ["a b", "c d", "e f", "g h"] if level == "word" else ["a b", "", "c d", "e f", "", "g h"]
    lines = lines_of(folder)
    assert (lines if level == "word" else [plain(line.split(), level) for line in lines]) == expected


@pytest.mark.parametrize("level", LEVELS)
def test_unwrap_makes_a_line_of_a_paragraph(tmp_path, level):
    """Its lines joined by a space; no blank lines are left."""
    folder = whole(tmp_path, "a b\nc\n\n\nd e\nf\ng\n\nh\n", "--level", level, "--unwrap", *EVERY)
    lines = lines_of(folder)
    text = lines if level == "word" else [plain(line.split(), level) for line in lines]
    assert text == ["a b c", "d e f g", "h"]


# How documents are dealt out


def dealt(folder: Path, text: str) -> dict[str, set[str]]:
    """The documents of each split: every one in exactly one of them, and no line lost."""
    found = {split: documents(folder, split) for split in SPLITS}
    names = re.findall(r"doc\d+", text)
    assert sum(len(split) for split in found.values()) == len(set(names))
    assert set().union(*found.values()) == set(names)
    lines = [line for split in SPLITS for line in lines_of(folder, split) if line]
    assert len(lines) == len(names)
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_no_block_is_split_and_shares_are_kept(tmp_path, level):
    """Blocks of a single file; each split has about its share of the text."""
    text = blocks(200)
    source = write(tmp_path / "source", text)
    how = "--level", level, "--valid", 0.1, "--test", 0.2, *EVERY
    folder = make(tmp_path / "out", source, *how)
    if level == "char":  # names are known in all texts there
        dealt(folder, text)
    sizes = {split: (folder / f"{split}.txt").stat().st_size for split in SPLITS}
    for split, share in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        assert sizes[split] / sum(sizes.values()) == pytest.approx(share, abs=0.02)


def test_files_or_lines_can_be_the_documents(tmp_path):
    """Several files are dealt out as files; --documents says otherwise."""
    files = [write(tmp_path / f"{i}.txt", article(i) + "\n" + article(i, seed=1)) for i in range(30)]
    text = "".join(path.read_text() for path in files)
    found = dealt(make(tmp_path / "files", *files, *CHAR), text)
    assert all(found.values())
    folder = make(tmp_path / "lines", *files, "--documents", "lines", "--test", 0.3, *CHAR)
    assert len([line for split in SPLITS for line in lines_of(folder, split) if line]) == 30 * 6
    assert documents(folder, "train") & documents(folder, "test")  # other lines of the same file


def test_the_seed_deals(tmp_path):
    """Another seed, other documents; none given is 1111."""
    source = write(tmp_path / "source", blocks(60))
    found = {seed: make(tmp_path / f"{seed}", source, "--seed", seed, *CHAR) for seed in (1, 2, 1111)}
    texts = [documents(folder, "test") for folder in found.values()]
    assert texts[0] != texts[1] != texts[2]
    assert contents(make(tmp_path / "none", source, *CHAR)) == contents(found[1111])


def test_blank_documents_are_none(tmp_path):
    """Files of nothing but blank lines, first, between and last: as if they were not there."""
    texts = {f"{i}.txt": "\n \n" if i % 10 in (0, 4, 5, 9) else article(i) for i in range(60)}
    files = [write(tmp_path / name, text) for name, text in texts.items()]
    found = dealt(make(tmp_path / "out", *files, *CHAR), "".join(texts.values()))
    assert all(found.values())


def test_given_files_are_whole_splits(tmp_path):
    """--valid_file leaves the rest to be dealt out to train and test."""
    source, other = write(tmp_path / "source", blocks(50)), write(tmp_path / "other", "the cat\n\nsat on\n")
    folder = make(tmp_path / "out", source, "--valid_file", other, "--test", 0.2, *CHAR)
    assert [plain(line.split(), "char") for line in lines_of(folder, "valid")] == ["the cat", "", "sat on"]
    assert len(documents(folder, "train") | documents(folder, "test")) == 50
    assert 7 <= len(documents(folder, "test")) <= 13


# The same text, the same bytes


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_settings_write_the_same_bytes(tmp_path, level, monkeypatch):
    """Again in place, and by a new interpreter with another hash seed; the source stays as it was."""
    source = write(tmp_path / "source", blocks(50) + ODD)
    source.chmod(0o444)
    before = source.read_bytes(), source.stat().st_mtime_ns
    argv = source, "--level", level, *(["--vocab_size", 400] if level == "subword" else [])
    first = contents(make(tmp_path / "out", *argv))
    assert contents(make(tmp_path / "out", *argv)) == first
    if level == "subword":
        monkeypatch.setenv("PYTHONHASHSEED", "7")
        result = run_fresh(*argv, "--out", "fresh", cwd=tmp_path, script="prepare.py")
        assert result.status == 0, result
        assert contents(tmp_path / "fresh") == first
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before


@pytest.mark.parametrize("level", LEVELS)
def test_marks_and_line_ends_change_nothing(tmp_path, level):
    """A byte order mark, Windows's line ends, no newline at the end: as the plain text."""
    texts = [article(i) + "\n" + article(i, 1) for i in range(6)]
    forms = {
        "plain": lambda text: text,
        "marked": lambda text: "\ufeff" + text,
        "windows": lambda text: text.replace("\n", "\r\n"),
        "both": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        "open": lambda text: text.removesuffix("\n"),
    }
    found = []
    for name, form in forms.items():
        (tmp_path / name).mkdir()
        files = [write(tmp_path / name / f"{i}.txt", form(text)) for i, text in enumerate(texts)]
        how = "--valid", 0.2, "--test", 0.2, "--seed", 3
        found.append(contents(make(tmp_path / f"out {name}", *files, "--level", level, *how, *EVERY)))
    assert all(other == found[0] for other in found)


def test_folders_and_stdin_are_their_text(tmp_path, monkeypatch):
    """A folder is its files in order, without hidden ones; `-` is dealt out as a file of the same text is."""
    (tmp_path / "in").mkdir()
    files = [write(tmp_path / "in" / f"{i}.txt", article(i)) for i in (3, 1, 2, 0, 4)]
    for hidden in (".git", ".ipynb_checkpoints"):
        (tmp_path / "in" / hidden).mkdir()
        write(tmp_path / "in" / hidden / "0.txt", article(9))
    found = contents(make(tmp_path / "folder", tmp_path / "in", *EVERY))
    assert found == contents(make(tmp_path / "files", *sorted(files), *EVERY))

    source = write(tmp_path / "source", blocks(40))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    assert contents(make(tmp_path / "stdin", "-", *EVERY)) == contents(make(tmp_path / "file", source, *EVERY))


@pytest.mark.parametrize("text", ["", "one paragraph\n", "\0"])
def test_what_is_wrong_with_stdin_is_said_of_stdin(tmp_path, text, monkeypatch, capsys):
    """Not of the file that keeps it, which nobody knows, and which is gone by then."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert call(prepare, "-", "--out", tmp_path / "out") == 2
    assert error_line(capsys).startswith("prepare.py: error: stdin: ")


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """Eight times the lines, the same words and documents: hardly more on Python's heap."""
    monkeypatch.setattr(prepare, "BATCH_LINES", 100)  # at once
    monkeypatch.setattr(corpus.text, "BLOCK", 1 << 14)
    peaks = []
    for count in (1000, 8000):
        rng = random.Random(0)
        line = " ".join(rng.choices(["the", "cat", "sat", "on", "a", "mat"], k=10)) + "\n"
        text = "\n".join(line * (count // 20) for _ in range(20))
        source = write(tmp_path / f"{count}", text)
        tracemalloc.start()
        make(tmp_path / f"out {count}", source)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + len(text) / 3


# What it says


@pytest.mark.parametrize("level", LEVELS)
def test_the_figures_are_those_of_the_files(tmp_path, capsys, level):
    """Lines, words (one more for each line's end), tokens with `<eos>`, their ratio and the unknown."""
    text = blocks(80)
    folder = make(tmp_path / "out", write(tmp_path / "source", text), "--level", level, "--vocab_size", 290)
    out = capsys.readouterr().out
    for split in SPLITS:
        lines = (folder / f"{split}.txt").read_text().split("\n")[:-1]
        tokens = [token for line in lines for token in [*line.split(), "<eos>"]]
        row = re.search(rf"\| {split} +\| ([\d,]+) lines \| ([\d,]+) words \| ([\d,]+) tokens \| (.*)", out)
        counts = [int(value.replace(",", "")) for value in row.groups()[:3]]
        assert (counts[0], counts[2]) == (len(lines), len(tokens))
        if level == "subword":  # nothing is lost there
            assert counts[1] == sum(len(plain(line.split(), level).split()) + 1 for line in lines)
        ratio, unknown = re.fullmatch(r"([\d.]+) tokens per word \| unknown ([\d.]+)%", row[4]).groups()
        assert float(ratio) == pytest.approx(counts[2] / counts[1], abs=6e-4)
        assert float(unknown) == pytest.approx(100 * tokens.count("<unk>") / len(tokens), abs=6e-3)


# Bad input


def test_bad_texts_are_one_line_and_status_2(tmp_path, capsys):
    """Texts that cannot be read, alone or among good ones; the line of it where there is one."""
    good = write(tmp_path / "good.txt", blocks(30))
    for name, data, names in (
        ("empty.txt", b"", "empty.txt"),
        ("binary.txt", b"a b\n\nc d\x00e\n", "line 3"),
        ("latin.txt", b"a\nb\n\ncaf\xe9\n", "line 4"),
        ("late.txt", b"a b\n\n" * 5000 + b"\xff\n", "line 10001"),
    ):
        bad = tmp_path / name
        bad.write_bytes(data)
        for flags in ([bad], [good, bad], [good, "--valid_file", bad], [good, "--test_file", bad]):
            assert call(prepare, *flags, "--out", tmp_path / "out") == 2
            line = error_line(capsys)
            assert name in line
            assert names in line
    (tmp_path / "none").mkdir()
    for source in (tmp_path / "missing.txt", tmp_path / "none"):
        assert call(prepare, source, "--out", tmp_path / "out") == 2
        assert source.name in error_line(capsys)


@pytest.mark.parametrize("text", ["one line\n", "a\nb\n\nc\nd\n", "\n\n\n", " \n\t\n"])
def test_too_few_documents_is_one_line_and_status_2(tmp_path, capsys, text):
    """Three splits need three documents."""
    source = write(tmp_path / "few.txt", text)
    assert call(prepare, source, "--out", tmp_path / "out") == 2
    assert "few.txt" in error_line(capsys)


def test_bad_flags_are_one_line_and_status_2(tmp_path, capsys):
    source = write(tmp_path / "source.txt", blocks(30))
    for flags, names in (
        (["--valid", 0], "--valid"),
        (["--test", 0], "--test"),
        (["--valid", 1], "--valid"),
        (["--test", -0.1], "--test"),
        (["--test", "nan"], "--test"),
        (["--valid", 0.5, "--test", 0.5], "--valid"),
        (["--level", "subword", "--vocab_size", 100], "--vocab_size 100"),
        (["--level", "word", "--vocab_size", 2], "--vocab_size 2"),
        (["--level", "char", "--vocab_size", 2], "--vocab_size 2"),
        (["--level", "letter"], "letter"),
    ):
        assert call(prepare, source, "--out", tmp_path / "out", *flags) == 2, flags
        assert names in error_line(capsys)


def test_a_place_that_cannot_be_written_is_told_before_any_work(tmp_path, capsys):
    source = write(tmp_path / "source.txt", blocks(30))
    for out in (source, source / "below"):
        assert call(prepare, source, "--out", out) == 2
        assert f"--out {out}" in error_line(capsys)


def test_no_source_is_written_over(tmp_path, capsys):
    """By any name: a path with detours, a link, a folder, a text of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    source = write(folder / "train.txt", blocks(30))
    valid, good = write(folder / "valid.txt", blocks(3)), write(tmp_path / "good.txt", blocks(30))
    (tmp_path / "link").symlink_to(folder)
    os.link(source, tmp_path / "hard.txt")
    for out, flags in (
        (folder, [source]),
        (folder, [folder]),
        (tmp_path / "link", [source]),
        (folder / ".." / "data", [good, source]),
        (folder, [good, "--valid_file", valid]),
        (folder, [good, "--test_file", source]),
    ):
        before = source.read_bytes(), valid.read_bytes()
        assert call(prepare, *flags, "--out", out) == 2, flags
        assert re.search(r"(train|valid)\.txt|data", error_line(capsys))
        assert (source.read_bytes(), valid.read_bytes()) == before


# Texts as people have them


def stories(count: int) -> str:
    """Of several paragraphs each, with a mark between them."""
    return "<|endoftext|>\n".join(f"{article(i)}\n{article(i, 1)}" for i in range(count))


@pytest.mark.parametrize("level", LEVELS)
def test_a_mark_separates_documents(tmp_path, level):
    """It is left out, on a line of its own or within one."""
    for name, text in (("own", stories(60)), ("within", stories(60).replace("\n<|endoftext|>\n", "<|endoftext|>"))):
        source = write(tmp_path / f"{name}.txt", text)
        folder = make(tmp_path / name, source, "--document_mark", "<|endoftext|>", "--level", level, *EVERY)
        texts = [(folder / f"{split}.txt").read_text() for split in SPLITS]
        assert "endoftext" not in "".join(texts).replace(" ", "")
        if level == "char":
            found = [documents(folder, split) for split in SPLITS]
            assert sum(map(len, found)) == len(set().union(*found)) == 60
            assert all(found)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("newlines", [True, False])
def test_position_cuts_one_text_in_three(tmp_path, level, newlines):
    """In order, each about its share; a text of one line too, whose pieces are one line again."""
    text = blocks(300) if newlines else " ".join(blocks(300).split())
    source = write(tmp_path / "text8", text)
    how = "--documents", "position", "--valid", 0.1, "--test", 0.2
    folder = make(tmp_path / "out", source, "--level", level, *how, *EVERY)
    texts = []
    for split in SPLITS:
        lines = lines_of(folder, split)
        assert len(lines) == 1 or newlines
        texts.append([line if level == "word" else plain(line.split(), level) for line in lines])
        sizes = [sum(map(len, part)) for part in texts]
    whole = "".join("".join(line.split()) for part in texts for line in part)
    if level != "word":
        assert whole == "".join(text.split())
    for size, share in zip(sizes, (0.7, 0.1, 0.2), strict=True):
        assert size / sum(sizes) == pytest.approx(share, abs=0.03)


def test_position_is_the_same_text_whatever_the_pieces(tmp_path, monkeypatch):
    """A line cut into many pieces or into none has the same tokens."""
    source = write(tmp_path / "one", " ".join(blocks(100).split()))
    given = write(tmp_path / "given", "the cat\n")
    found = []
    for size in (50, 10**6):
        monkeypatch.setattr(corpus.text, "PIECE", size)
        how = "--valid_file", given, "--test_file", given, "--documents", "position", "--level", "subword"
        found.append((make(tmp_path / f"{size}", source, *how, "--vocab_size", 400) / "train.txt").read_bytes())
    assert found[0] == found[1]


def test_memory_does_not_grow_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_LINES", 10)
    monkeypatch.setattr(corpus.text, "BLOCK", 1 << 14)
    peaks = []
    for count in (200, 2000):
        source = write(tmp_path / f"{count}", " ".join(article(0).split()) + " the cat sat on the mat" * 25 * count)
        tracemalloc.start()
        make(tmp_path / f"out {count}", source, "--documents", "position", *EVERY)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + source.stat().st_size / 3


def test_an_empty_file_of_a_folder_is_passed_over_and_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(30):
        write(tmp_path / "in" / f"{i}.txt", {3: "", 4: "\n \n"}.get(i, article(i)))
    make(tmp_path / "out", tmp_path / "in", *EVERY)
    assert "| 2 of 30 files are empty and were passed over\n" in capsys.readouterr().out


def test_a_pipe_is_read_as_its_file_is(tmp_path):
    """A FIFO is read once; texts for valid and test can be pipes too."""
    source = write(tmp_path / "source", blocks(40))
    expected = contents(make(tmp_path / "file", source, "--valid_file", source, *EVERY))
    pipes = [tmp_path / "first", tmp_path / "second"]
    writers = []
    for pipe in pipes:
        os.mkfifo(pipe)
        writers.append(subprocess.Popen(["cp", source, pipe]))
    assert contents(make(tmp_path / "pipe", pipes[0], "--valid_file", pipes[1], *EVERY)) == expected
    assert [writer.wait() for writer in writers] == [0, 0]


def test_what_is_wrong_with_a_pipe_is_said_of_it(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen(["cp", write(tmp_path / "bad", "a\0b\n"), pipe])
    assert call(prepare, pipe, "--out", tmp_path / "out") == 2
    assert f"{pipe}: has a NUL byte" in error_line(capsys)
    writer.wait()


def test_documents_of_all_sizes_are_dealt_out_by_share(tmp_path, capsys):
    """Ten small ones are shared by valid and test, the large one is for training; large ones alone are refused."""
    files = [write(tmp_path / f"{i}.txt", article(i, lines=3)) for i in range(10)]
    large = write(tmp_path / "large.txt", article(99, lines=3000))
    folder = make(tmp_path / "out", *files, large, *CHAR)
    assert documents(folder, "train") == {"doc99"}
    assert [len(documents(folder, split)) for split in ("valid", "test")] == [5, 5]
    capsys.readouterr()
    assert call(prepare, *files[:1], large, large, large, "--out", tmp_path / "out") == 2
    assert "too large to deal out" in (line := error_line(capsys))
    assert "--documents lines or position" in line


@pytest.mark.parametrize(("form", "text"), [("nfc", "caf\u00e9 \ufb01n"), ("nfkc", "caf\u00e9 fin")])
def test_normalize_brings_a_text_into_one_form(tmp_path, form, text):
    """Decomposed accents, and with nfkc ligatures; without it the text stays as it is."""
    source = "cafe\u0301 \ufb01n\n"
    assert lines_of(whole(tmp_path, source, "--normalize", form, *EVERY)) == [text]
    assert lines_of(whole(tmp_path, source, "--level", "char", *EVERY, name="none"))[0].split()[3:5] == ["e", "\u0301"]


def test_unknown_words_written_out_stay_one_token(tmp_path):
    """And what WikiText writes for a hyphen, comma or point within a word."""
    lines = lines_of(whole(tmp_path, "the <unk> well @-@ known 1 @,@ 000 @.@ 5 <unk>.\n", *EVERY))
    assert lines == ["the <unk> well @-@ known 1 @,@ 000 @.@ 5 <unk> ."]


@pytest.mark.parametrize("level", LEVELS)
def test_a_literal_eos_ends_its_line_once(tmp_path, level, capsys):
    plain_text = blocks(40)
    marked = "\n".join(f"{line} <eos>" if line else line for line in plain_text.split("\n"))
    found = [
        contents(whole(tmp_path, text, "--level", level, *EVERY, name=f"{len(text)}")) for text in (plain_text, marked)
    ]
    assert found[0] == found[1]
    assert capsys.readouterr().err.count("a literal <eos>") == 1  # in three passes, for three texts


@pytest.mark.parametrize("level", LEVELS)
def test_like_uses_a_tokenizer_that_is_there(tmp_path, level, capsys):
    """Of a folder or a model; its words are known, other words are not; its tokenizer.json is the same."""
    first = whole(tmp_path, blocks(40), "--level", level, "--lower", *EVERY, name="first")
    second = write(tmp_path / "second", "THE CAT sat on qqq\n\nthe mat\n\n" + blocks(5))
    model = tmp_path / "m.pt"
    small = ["--emsize", 8, "--nhid", 8, "--nlayers", 1, "--batch_size", 4, "--epochs", 1, "--device", "cpu"]
    assert call(main, "--data", first, *small, "--save", model) == 0
    given = "--valid_file", second, "--test_file", second
    by_folder = make(tmp_path / "by folder", second, *given, "--like", first)
    assert contents(by_folder) == contents(make(tmp_path / "by model", second, *given, "--like", model))
    assert (by_folder / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    line = lines_of(by_folder)[0]
    assert (line if level == "word" else plain(line.split(), level)).startswith("the cat")
    own = make(tmp_path / "own", second, *given, "--level", level, *EVERY)
    for script, *argv in ((main, "--resume", model, "--epochs", 0), (finetune, "--save", model, "--output", "x.pt")):
        capsys.readouterr()
        assert call(script, *argv, "--data", own) == 2
        assert "its tokenizer.json is not the model's tokenizer" in error_line(capsys)
    for script in (pointer, dynamiceval):
        assert call(script, "--save", model, "--data", own) == 2
        assert "prepare.py --like MODEL" in error_line(capsys)
    assert call(main, "--resume", model, "--epochs", 0, "--data", by_folder) == 0


def test_like_and_its_settings_do_not_go_together(tmp_path, capsys):
    source = write(tmp_path / "source", blocks(30))
    folder = make(tmp_path / "first", source)
    (tmp_path / "none").mkdir()
    capsys.readouterr()
    for flags, named in (
        (["--like", folder, "--level", "word"], "--level: is settled by the tokenizer"),
        (["--like", folder, "--lower"], "--lower: is settled"),
        (["--like", tmp_path / "none"], "has no tokenizer.json"),
        (["--like", tmp_path / "missing.pt"], "--like"),
        (["--level", "subword", "--vocab_size", 0], "--vocab_size 0: is too small"),
        (["--documents", "position", "--unwrap"], "--unwrap: does not go together"),
        (["--documents", "files", "--document_mark", "x"], "--document_mark"),
    ):
        assert call(prepare, source, "--out", tmp_path / "out", *flags) == 2
        assert named in error_line(capsys)


def test_a_model_without_a_tokenizer_takes_no_corpus_that_has_one(base, tmp_path, capsys):
    folder = make(tmp_path / "first", write(tmp_path / "source", blocks(30)))
    capsys.readouterr()
    assert call(main, "--resume", base / "m.pt", "--epochs", 0, "--data", folder) == 2
    assert "the model has no tokenizer" in error_line(capsys)


@pytest.mark.parametrize("kills", range(1, 7))
def test_what_a_kill_leaves_of_two_corpora_is_refused(tmp_path, monkeypatch, kills):
    """Stopped after each rename over a corpus that is there: afterwards main.py reads one of the two, or refuses."""
    text = write(tmp_path / "text", "".join(f"line {i} of a text\n" for i in range(60)))
    flags = [text, "--level", "char", "--documents", "lines"]
    corpora = [contents(make(tmp_path / f"corpus{seed}", *flags, "--seed", seed)) for seed in (1, 2)]
    out, replace = make(tmp_path / "out", *flags, "--seed", 1), os.replace

    def stop(*paths: str) -> None:
        nonlocal kills
        replace(*paths)
        kills -= 1
        if not kills:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        call(prepare, *flags, "--out", out, "--seed", 2)
    if contents(out) in corpora:
        read_corpus(str(out))
    else:
        with pytest.raises(UserError, match="does not belong to the other files"):
            read_corpus(str(out))
        (out / "manifest.json").unlink()
        read_corpus(str(out))  # a folder without a list is taken as it is
