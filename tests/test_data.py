"""The corpus: reading against a slow reference, the vocabulary's order, and a cache that is never stale.

python -m pytest tests/test_data.py
"""

import random
import time
import tracemalloc
import urllib.error
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import data
import words
from data import EOS, UNK, read_corpus
from utils import UserError

SPLITS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees or leaves a cache in the user's own home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))


def write(folder: Path, **texts: str | bytes) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write(tmp_path / "c", train="b a <unk> a\nc b a\n", valid="a c d\n", test="b b\n")


def slow_words(text: str) -> list[str]:
    """What reading means: a line ends at a newline, its words are str.split's, then one <eos>."""
    lines = text.removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [word for line in lines for word in [*line.split(), EOS]]


def decoded(corpus: data.Corpus) -> dict[str, list[str]]:
    return {split: [corpus.vocab[i] for i in getattr(corpus, split).tolist()] for split in SPLITS}


def ids(corpus: data.Corpus) -> list[list[int]]:
    return [getattr(corpus, split).tolist() for split in SPLITS]


# ---- reading ----

NASTY = [
    "a b\nc\n",
    "a b\nc",  # no final newline
    "\ufeffa b\n",  # a byte order mark
    "\n\n a \n\n",  # blank lines
    "a\r\nb\r\n\r\n",
    "a\u00a0b\u2028c\x0bd\x1ce\u3000f\ng\u0085h\n",  # white space that is no newline
    "é ü ∀x 𝔘𝔫𝔦 \ufeff\n日本 語\n",  # two, three and four bytes a letter; a mark that is not at the start
    "a  \n  ",  # white space after the last newline is one more line
    "lone\rreturn\n",
    "<eos> a <eos>\n",
    "x" * 100,
    "",
    "\ufeff",
]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("text", NASTY)
def test_words_are_those_of_the_slow_reference_at_any_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, block: int
) -> None:
    """Where a block ends never shows: inside a letter, a word, a white space or a byte order mark."""
    monkeypatch.setattr(words, "BLOCK", max(block, 3))  # a byte order mark has three bytes
    (tmp_path / "t").write_bytes(text.encode())
    assert [word for some in words.read_words(tmp_path / "t") for word in some] == slow_words(text)


def test_random_texts_at_random_block_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 texts of letters, white space and newlines, against the slow reference."""
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choices(["a", "bé", "∀", " ", "\n", "\r\n", "\u00a0", "𝔘"], k=draw.randrange(60)))
        monkeypatch.setattr(words, "BLOCK", draw.randrange(3, 20))
        (tmp_path / "t").write_bytes(text.encode())
        assert [word for some in words.read_words(tmp_path / "t") for word in some] == slow_words(text), text


def test_one_line_of_any_length_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the text without one newline does not raise the peak."""
    monkeypatch.setattr(words, "BLOCK", 1 << 14)
    peaks = []
    for size in (1, 10):
        (tmp_path / "t").write_text("word and " * 10_000 * size)
        tracemalloc.start()
        assert sum(map(len, words.read_words(tmp_path / "t"))) == 20_000 * size + 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize(
    ("before", "line"), [(b"", 1), (b"ab\ncd\n", 3), ("é\n".encode() * 100_001, 100_002)]
)
@pytest.mark.parametrize("wrong", [b"\xff x\n", b"\xc3\n", b"\xe2\x88"])
def test_text_that_is_not_utf_8_is_placed(tmp_path: Path, before: bytes, line: int, wrong: bytes) -> None:
    """The error names the file, the byte's offset and the line, beyond the first block and at the end too."""
    folder = write(tmp_path, train=before + wrong, valid="a b", test="a b")
    with pytest.raises(UserError, match=rf"train\.txt: not UTF-8 at byte {len(before)}, line {line};"):
        read_corpus(folder)


def test_offset_of_a_wrong_byte_counts_the_byte_order_mark(tmp_path: Path) -> None:
    """The offset is that in the file, mark included."""
    (tmp_path / "t").write_bytes("\ufeffab".encode() + b"\xff")
    with pytest.raises(UserError, match="at byte 5, line 1"):
        list(words.read_words(tmp_path / "t"))


# ---- what is missing ----


def test_missing_folder_names_the_command() -> None:
    """data/penn that is not there: ./getdata.sh penn."""
    with pytest.raises(
        UserError, match=r"--data nowhere/penn: there is no such folder; run ./getdata.sh penn"
    ):
        read_corpus("nowhere/penn")


@pytest.mark.parametrize("split", SPLITS)
def test_missing_empty_and_too_short_splits_are_named(corpus: str, split: str) -> None:
    """Each of the three, with the file's name."""
    path = Path(corpus, f"{split}.txt")
    for text, problem in (("", "is empty"), ("\n", "has a single token")):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{split}\.txt: {problem}"):
            read_corpus(corpus)
    path.unlink()
    with pytest.raises(UserError, match=rf"{split}\.txt: is missing; give a folder"):
        read_corpus(corpus)


# ---- the vocabulary ----


def slow_corpus(texts: dict[str, str], vocab_size: int = 0, min_count: int = 0) -> tuple[list[str], dict]:
    """Vocabulary and splits, the obvious way: count the training words, sort, cap, replace."""
    split_words = {split: slow_words(text) for split, text in texts.items()}
    counts = Counter(split_words["train"])
    if vocab_size or min_count:
        ranked = sorted(counts, key=lambda word: -counts[word])
        kept = [w for w in ranked if w not in (EOS, UNK) and counts[w] >= min_count]
        kept = kept[: vocab_size - 2] if vocab_size else kept
        capped = Counter(w if w in kept or w == EOS else UNK for w in split_words["train"])
        first = [w for w in counts if w in kept or w in (EOS, UNK)]
        counts = {w: capped[w] for w in dict.fromkeys([*first, UNK])}
    vocab = sorted(counts, key=lambda word: -counts[word])
    if UNK not in vocab:
        vocab += list(dict.fromkeys(w for s in ("valid", "test") for w in split_words[s] if w not in vocab))
    splits = {s: [w if w in vocab else UNK for w in split_words[s]] for s in SPLITS}
    return vocab, splits


@pytest.mark.parametrize(
    "limits", [{}, {"vocab_size": 2}, {"vocab_size": 9}, {"min_count": 4}, {"vocab_size": 12, "min_count": 3}]
)
@pytest.mark.parametrize("unk", [True, False])
def test_vocabulary_and_ids_are_those_of_the_slow_reference(
    tmp_path: Path, limits: dict[str, int], unk: bool
) -> None:
    """Frequency order of the training text, ties by first appearance; the rest <unk> or appended; caps."""
    draw = random.Random(2)
    for number in range(10):
        alphabet = [*"abcdefghijklmnopqrst", *([UNK] if unk else [])]

        def line(letters: list[str]) -> str:
            return " ".join(draw.choices(letters, [1 / (i + 1) for i in range(len(letters))], k=9)) + "\n"

        draw.shuffle(alphabet)
        texts = {"train": "".join(line(alphabet) for _ in range(6)) + (f"{UNK}\n" if unk else "")}
        texts |= {s: "".join(line([*"uvwxyz", *alphabet]) for _ in range(3)) for s in ("valid", "test")}
        folder = write(tmp_path / str(number), **texts)
        vocab, splits = slow_corpus(texts, **limits)
        for _ in range(2):  # from the text, then from the cache
            corpus = read_corpus(folder, **limits)
            assert corpus.vocab == vocab
            assert decoded(corpus) == splits
            assert corpus.encoder.vocab == vocab
            assert corpus.encoder.token_to_index == {word: i for i, word in enumerate(vocab)}
            assert corpus.encoder.unknown_index == (vocab.index(UNK) if UNK in vocab else None)


def test_a_cap_holds_whatever_the_other_splits_have(corpus: str) -> None:
    """--vocab_size N: at most N types, <eos> and <unk> among them; 1 is an error."""
    assert len(read_corpus(corpus, vocab_size=3).vocab) == 3
    assert {EOS, UNK} <= set(read_corpus(corpus, vocab_size=2).vocab)
    with pytest.raises(UserError, match="--vocab_size 1"):
        read_corpus(corpus, vocab_size=1)


def test_ids_are_16_bits_where_they_fit(tmp_path: Path) -> None:
    """32,768 types are int16; one more is int32."""
    for extra, dtype in ((0, torch.int16), (1, torch.int32)):
        train = " ".join(f"w{i}" for i in range(32_767 + extra)) + "\n"
        corpus = read_corpus(write(tmp_path / str(extra), train=train, valid="w1\n", test="w2\n"))
        assert len(corpus.vocab) == 32_768 + extra
        assert corpus.train.dtype == dtype
        assert corpus.train.tolist() == list(range(32_768 + extra))


def test_a_given_vocabulary_is_used_as_it_is(corpus: str) -> None:
    """A saved model's vocabulary fixes the ids, in its own order; what it lacks is its <unk>."""
    vocab = ["c", UNK, EOS, "b"]
    read = read_corpus(corpus, vocab=vocab)
    assert read.vocab == vocab
    assert decoded(read)["train"] == ["b", UNK, UNK, UNK, EOS, "c", "b", UNK, EOS]
    assert ids(read_corpus(corpus, vocab=vocab)) == ids(read)


def test_a_given_vocabulary_without_unk_names_the_first_stranger(tmp_path: Path) -> None:
    """The word and the file, when there is no <unk> to stand for it."""
    folder = write(tmp_path, train="a b\n", valid="a c d\n", test="e a\n")
    with pytest.raises(UserError, match=r"valid\.txt: the word 'c' is not in the model's vocabulary"):
        read_corpus(folder, vocab=["a", "b", EOS])


def test_encode_line_and_file_follow_the_same_rule(tmp_path: Path, corpus: str) -> None:
    """No <eos> for a line, one a line for a file; unknown words are <unk>, or an error that names one."""
    encoder = read_corpus(corpus).encoder
    (tmp_path / "t").write_text("a zebra\n\nb")
    file = data.encode_file(tmp_path / "t", encoder)
    assert [encoder.vocab[i] for i in file.tolist()] == ["a", UNK, EOS, EOS, "b", EOS]
    assert data.encode_line(" a zebra \n", encoder) == file[:2].tolist()
    plain = read_corpus(write(tmp_path / "p", train="a b\n", valid="a b\n", test="a b\n")).encoder
    with pytest.raises(UserError, match="the word 'zebra'"):
        data.encode_line("a zebra", plain)
    with pytest.raises(UserError, match=r"t: the word 'zebra'"):
        data.encode_file(tmp_path / "t", plain)
    (tmp_path / "t").write_text("")
    with pytest.raises(UserError, match="is empty"):
        data.encode_file(tmp_path / "t", encoder)
    with pytest.raises(UserError, match="cannot be read"):
        data.encode_file(tmp_path / "missing", encoder)


# ---- progress ----


def test_a_bar_after_two_seconds_and_none_before(
    corpus: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading that takes long shows how far it is, on stderr; a short one shows nothing."""
    read_corpus(corpus)
    assert capsys.readouterr().err == ""

    def slowly(path: Path, seen: Callable[[bytes], None]) -> Iterator[list[str]]:
        time.sleep(0.8)
        yield from words.read_words(path, seen)

    monkeypatch.setattr(data, "read_words", slowly)
    read_corpus(corpus, min_count=1)
    out, err = capsys.readouterr()
    assert f"reading {corpus}" in err
    assert out == ""


# ---- torchnlp's datasets ----

TEXTS = {"train": "a <unk> b a\nb a\n", "valid": "b c\n", "test": "a a\n"}


def served(url: str, filename: str, reporthook: object = None) -> None:
    """Stands in for urllib's download: what the two addresses of torchnlp hold."""
    if url.endswith(".zip"):
        with zipfile.ZipFile(filename, "w") as archive:
            for split, text in TEXTS.items():
                archive.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    else:
        Path(filename).write_text(TEXTS[Path(url).name.split(".")[1]])


@pytest.mark.parametrize("name", ["penn_treebank", "wikitext_2"])
def test_torchnlp_fetches_its_datasets_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The corpus is that of a folder with the same text; the second time nothing is fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlretrieve", served)
    fetched = read_corpus(name)
    same = read_corpus(write(tmp_path / "same", **TEXTS))
    assert (fetched.vocab, ids(fetched)) == (same.vocab, ids(same))
    monkeypatch.setattr("urllib.request.urlretrieve", None)
    assert ids(read_corpus(name)) == ids(same)
    assert not list(tmp_path.glob("data/.fetch*"))


@pytest.mark.parametrize(("name", "files"), [("penn_treebank", "penn"), ("wikitext_2", "wikitext-2")])
def test_torchnlp_reads_what_getdata_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: str
) -> None:
    """With data/penn or data/wikitext-2 there, the names work without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlretrieve", None)
    folder = write(tmp_path / "data" / files, **TEXTS)
    assert ids(read_corpus(name)) == ids(read_corpus(folder))


@pytest.mark.parametrize("name", ["penn_treebank", "wikitext_2"])
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No network, or a connection that breaks: an error, and the next try is not misled by the half."""
    monkeypatch.chdir(tmp_path)

    def broken(url: str, filename: str, reporthook: object = None) -> None:
        served(url, filename)
        Path(filename).write_bytes(Path(filename).read_bytes()[:5])
        raise urllib.error.ContentTooShortError("got only 5 bytes", b"")

    def absent(url: str, filename: str, reporthook: object = None) -> None:
        raise urllib.error.URLError("no network")

    for failing in (broken, absent):
        monkeypatch.setattr("urllib.request.urlretrieve", failing)
        with pytest.raises(UserError, match=rf"--data {name}: could not be fetched .*run ./getdata.sh"):
            read_corpus(name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.setattr("urllib.request.urlretrieve", served)
    assert len(read_corpus(name).train) == 8


def test_a_folder_of_a_datasets_name_is_meant_with_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`penn_treebank` is the dataset, `./penn_treebank` the folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "penn_treebank", train="mine mine\n", valid="mine\n", test="mine\n")
    monkeypatch.setattr("urllib.request.urlretrieve", served)
    assert "mine" in read_corpus("./penn_treebank").vocab
    assert "mine" not in read_corpus("penn_treebank").vocab
