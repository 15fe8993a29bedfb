"""Bytes to text: what every script reads alike, and what it refuses."""

import codecs
import gzip
import io
import itertools
import sys

import pytest
from toys import call, error_line

import corpus.text as text
import main
import prepare
import score
from corpus.read import EOS, read_corpus, read_words
from corpus.text import read_line_groups, read_lines, read_pieces
from utils import UserError

LINES = ["the old lamp .", "", "a café", "the end"]


def write(folder, contents):
    path = folder / "t.txt"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        ("a b\nc\n".encode("utf-16"), "is UTF-16"),
        (codecs.BOM_UTF16_BE + "a b\n".encode("utf-16-be"), "is UTF-16"),
        ("a b\nc\n".encode("utf-32"), "is UTF-32"),
        ("a b\nc\n".encode("utf-16-le"), "NUL byte in line 1"),
        (b"a b\nc\0d\n", "NUL byte in line 2"),
        ("a\ncafé\n".encode("latin-1"), "not UTF-8 in line 2; the byte 0xe9"),
        (b"a\n\xed\xa0\xbd b\n", "not UTF-8 in line 2"),
        (b"a b\rc d\re f\r", "carriage return"),
        (gzip.compress(b"a b\n", mtime=0), "compressed by gzip"),
        (b"%PDF-1.7\n", "a PDF"),
    ],
)
def test_what_is_no_text_is_named_by_every_script(contents, named, base, monkeypatch, capsys):
    """With status 2 and one line: main.py, prepare.py and score.py agree."""
    monkeypatch.chdir(base)
    path = write(base, contents)
    (base / "d").mkdir()
    for split in ("train", "valid", "test"):
        (base / "d" / f"{split}.txt").write_bytes(contents)
    commands = [(main, "--data", "d", "--save", "n.pt"), (prepare, path, "--out", "o"), (score, "--save", "m.pt", path)]
    for script, *argv in commands:
        assert call(script, *argv) == 2
        assert named in error_line(capsys)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8, 1 << 18])
def test_lines_end_at_newlines_alone(tmp_path, monkeypatch, block):
    """Windows's too. A byte order mark at the start of a line is left out, other white space stays."""
    monkeypatch.setattr(text, "BLOCK", block)
    inside = "a\u2028b\x0bc\x0cd\x1ce\x85f\rg"
    path = write(tmp_path, "\ufeff" + "\r\n".join([*LINES, inside]) + "\n\ufefflast \ufeff")
    assert list(read_lines(path)) == [*LINES, inside, "last \ufeff"]
    assert [line for group in read_line_groups(path) for line in group] == [*LINES, inside, "last \ufeff"]


def test_a_pipe_gives_what_has_arrived(monkeypatch):
    """Each group of lines comes when it is there, not when the pipe is closed."""
    arrived = [b"a\nb\nc", b"d\n", b"e"]

    class Pipe(io.BytesIO):
        def read1(self, size=-1):
            return arrived.pop(0) if arrived else b""

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe()))
    groups = read_line_groups("-")
    assert next(groups) == ["a", "b"]
    assert len(arrived) == 2
    assert list(groups) == [["cd"], ["e"]]


def test_pieces_join_to_the_text(tmp_path, monkeypatch):
    """They are short, end at newlines, and are otherwise cut before a space if there is one."""
    monkeypatch.setattr(text, "PIECE", 10)
    monkeypatch.setattr(text, "BLOCK", 32)
    whole = "one two three\n\nfour " + "x" * 25 + " five six seven\n" + "eight nine ten eleven"
    pieces = list(read_pieces(write(tmp_path, whole)))
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) == 10
    assert all("\n" not in piece[:-1] for piece in pieces)
    for piece, after in itertools.pairwise(pieces):
        assert piece.endswith("\n") or after[0] == " " or "x" in piece


@pytest.mark.parametrize("block", [1, 4, 1 << 18])
def test_a_literal_eos_counts_once(tmp_path, monkeypatch, capsys, block):
    """At a line's end; inside a line it is a token like others. A line on stderr says so, once per text."""
    monkeypatch.setattr(text, "BLOCK", block)
    path = write(tmp_path, "a b <eos>\n<eos>\n c <eos> d <eos> \r\nx<eos>\n e <eos>")
    words = [word for words in read_words(path) for word in words]
    assert words == ["a", "b", EOS, EOS, "c", EOS, "d", EOS, "x<eos>", EOS, "e", EOS]
    assert "is counted once" in error_line(capsys)


def test_a_corpus_with_literal_eos_is_the_one_without(corpus, tmp_path):
    (tmp_path / "marked").mkdir()
    for split in ("train", "valid", "test"):
        lines = (corpus / f"{split}.txt").read_text().splitlines()
        (tmp_path / "marked" / f"{split}.txt").write_text("".join(f"{line} <eos>\n" for line in lines))
    marked, plain = read_corpus(str(tmp_path / "marked")), read_corpus(str(corpus))
    assert marked.vocab == plain.vocab
    assert marked.train.tolist() == plain.train.tolist()


def test_a_missing_text_and_an_empty_one(tmp_path):
    with pytest.raises(UserError, match=r"none.txt: cannot be read: No such file or directory"):
        list(read_lines(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="is empty"):
        list(read_lines(write(tmp_path, "\ufeff")))
