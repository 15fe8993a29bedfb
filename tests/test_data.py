"""The corpus: reading against a slow reference, the vocabulary's order, and a cache that is never stale.

python -m pytest tests/test_data.py
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import tracemalloc
import urllib.error
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runner import WALL_S, run_cli
from toys import file_limit

import corpus.read as data
import corpus.text as text_files
from corpus.corpora import SPLITS
from corpus.read import EOS, UNK, read_corpus, read_words
from data import Corpus
from utils import UserError

TEXTS = {"train": "b a <unk> a\nc b a\n", "valid": "a c d\n", "test": "b b\n"}


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or leaves a cache in the user's own home."""
    path = tmp_path_factory.mktemp("xdg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the texts that are read word by word, as they are."""
    names: list[str] = []

    def recorded(path: str, *bar: object) -> Iterator[list[str]]:
        names.append(Path(path).name)
        return read_words(path, *bar)

    monkeypatch.setattr(data, "read_words", recorded)
    return names


def write(folder: Path, texts: dict[str, str | bytes] = TEXTS) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write(tmp_path / "c")


def words_of(path: Path) -> list[str]:
    return [word for block in read_words(path) for word in block]


def slow_words(text: str) -> list[str]:
    """What reading means: a line ends at a newline, its words are str.split's, then one <eos>, written out or not."""
    lines = [line.removeprefix("\ufeff") for line in text.split("\n")]
    if lines[-1] == "":
        lines.pop()
    split = [line.split() for line in lines]
    return [word for words in split for word in [*(words[:-1] if words[-1:] == [EOS] else words), EOS]]


def decoded(corpus: Corpus) -> dict[str, list[str]]:
    return {split: [corpus.vocab[i] for i in getattr(corpus, split).tolist()] for split in SPLITS}


def content(corpus: Corpus) -> tuple:
    """All that a corpus holds, beside the digest."""
    splits = [getattr(corpus, split) for split in SPLITS]
    return corpus.vocab, [split.tolist() for split in splits], [split.dtype for split in splits]


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


@pytest.mark.parametrize("text", NASTY)
def test_words_are_those_of_the_slow_reference_at_any_block_size(tmp_path, monkeypatch, text):
    """Where a block ends never shows: inside a letter, a word, a white space or a byte order mark."""
    (tmp_path / "t").write_bytes(text.encode())
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr(text_files, "BLOCK", block)
        assert words_of(tmp_path / "t") == slow_words(text), block


def test_random_texts_at_random_block_sizes(tmp_path, monkeypatch):
    """300 texts of letters, white space and newlines, against the slow reference."""
    draw = random.Random(1)
    for _ in range(300):
        parts = ["a", "bé", "∀", " ", "\n", "\r\n", "\u00a0", "𝔘", "\ufeff", " <eos>"]
        text = "".join(draw.choices(parts, k=draw.randrange(60)))
        monkeypatch.setattr(text_files, "BLOCK", draw.randrange(1, 20))
        (tmp_path / "t").write_bytes(text.encode())
        assert words_of(tmp_path / "t") == slow_words(text), text


def test_one_line_of_any_length_takes_bounded_memory(tmp_path, monkeypatch):
    """Ten times the text without one newline does not raise the peak."""
    monkeypatch.setattr(text_files, "BLOCK", 1 << 14)
    peaks = []
    for size in (1, 10):
        (tmp_path / "t").write_text("word and " * 10_000 * size)
        tracemalloc.start()
        assert sum(map(len, read_words(tmp_path / "t"))) == 20_000 * size + 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_encoding_takes_eight_bytes_per_token(tmp_path, monkeypatch):
    """However long the text is: the ids, four bytes each, and once more while they are joined."""
    monkeypatch.setattr(text_files, "BLOCK", 1 << 12)
    peaks, tokens = [], []
    for lines in (10_000, 40_000):
        folder = write(tmp_path / str(lines), TEXTS | {"train": "a b c d e f g\n" * lines})
        tracemalloc.start()
        tokens.append(len(read_corpus(folder).train))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]) < 8.5


@pytest.mark.parametrize("wrong", [b"\xff x\n", b"\xc3\n", b"\xe2\x88", b"\xed\xa0\x80 a\n"])
def test_text_that_is_not_utf_8_is_placed(tmp_path, wrong):
    """A foreign byte, a cut letter, a lone surrogate: the error names file and line, in any block."""
    for before, line in ((b"", 1), (b"ab\ncd\n", 3), ("é\n".encode() * 100_001, 100_002)):
        folder = write(tmp_path, TEXTS | {"train": before + wrong})
        with pytest.raises(UserError, match=rf"train\.txt: not UTF-8 in line {line};"):
            read_corpus(folder)


def test_the_line_is_right_where_a_block_ends(tmp_path, monkeypatch):
    """A wrong byte after a letter that two blocks share, and a last letter cut short, at any block size."""
    for wrong, line in (("a\nb\né\n".encode() + b"\xff\n", 4), ("a\nb\né\n".encode() + b"\xe2\x88", 4)):
        (tmp_path / "t").write_bytes(wrong)
        for block in range(1, 10):
            monkeypatch.setattr(text_files, "BLOCK", block)
            with pytest.raises(UserError, match=f"in line {line};"):
                words_of(tmp_path / "t")


# ---- what is missing ----


def test_missing_folder_names_the_command():
    """data/penn that is not there: ./getdata.sh penn."""
    with pytest.raises(UserError, match=r"--data nowhere/penn: there is no such folder; run ./getdata.sh penn"):
        read_corpus("nowhere/penn")


def test_a_file_instead_of_a_folder_is_told_how_to_become_one(tmp_path):
    (tmp_path / "book.txt").write_text("a text\n")
    with pytest.raises(UserError, match=r"book.txt: is a file, not a folder; make a corpus of it with prepare.py"):
        read_corpus(str(tmp_path / "book.txt"))


@pytest.mark.parametrize("split", SPLITS)
def test_missing_empty_and_too_short_splits_are_named(corpus, split):
    """Each of the three, with the file's name, from a cache too."""
    path = Path(corpus, f"{split}.txt")
    read_corpus(corpus)
    for text, problem in (("", "is empty"), ("\ufeff", "is empty"), ("\n", "has a single token")):
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
    return vocab, {s: [w if w in vocab else UNK for w in split_words[s]] for s in SPLITS}


@pytest.mark.parametrize(
    "limits", [{}, {"vocab_size": 2}, {"vocab_size": 9}, {"min_count": 4}, {"vocab_size": 12, "min_count": 3}]
)
@pytest.mark.parametrize("unk", [True, False])
def test_vocabulary_and_ids_are_those_of_the_slow_reference(tmp_path, monkeypatch, limits, unk):
    """Frequency order of the training text, ties by first appearance; the rest <unk> or appended; caps."""
    monkeypatch.setattr(text_files, "BLOCK", 50)  # several blocks per text
    draw = random.Random(2)
    for number in range(10):
        alphabet = [*"abcdefghijklmnopqrst", *([UNK] if unk else [])]

        def line(letters: list[str]) -> str:
            return " ".join(draw.choices(letters, [1 / (i + 1) for i in range(len(letters))], k=9)) + "\n"

        draw.shuffle(alphabet)
        texts = {"train": "".join(line(alphabet) for _ in range(6)) + (f"{UNK}\n" if unk else "")}
        texts |= {s: "".join(line([*"uvwxyz", *alphabet]) for _ in range(3)) for s in ("valid", "test")}
        folder = write(tmp_path / str(number), texts)
        vocab, splits = slow_corpus(texts, **limits)
        for _ in range(2):  # from the text, then from the cache
            corpus = read_corpus(folder, **limits)
            assert corpus.vocab == vocab
            assert decoded(corpus) == splits


def test_a_cap_holds_whatever_the_other_splits_have(corpus):
    """--vocab_size N: at most N types, <eos> and <unk> among them; 1 is an error."""
    assert len(read_corpus(corpus, vocab_size=3).vocab) == 3
    assert {EOS, UNK} == set(read_corpus(corpus, vocab_size=2).vocab)
    with pytest.raises(UserError, match="--vocab_size 1"):
        read_corpus(corpus, vocab_size=1)


def test_ids_are_16_bits_where_they_fit(tmp_path):
    """32,768 types are int16; one more is int32; from the text and from the cache."""
    for extra, dtype in ((0, torch.int16), (1, torch.int32)):
        train = " ".join(f"w{i}" for i in range(32_767 + extra)) + "\n"
        for _ in range(2):
            corpus = read_corpus(write(tmp_path / str(extra), {"train": train, "valid": "w1\n", "test": "w2\n"}))
            assert len(corpus.vocab) == 32_768 + extra
            assert {corpus.train.dtype, corpus.valid.dtype, corpus.test.dtype} == {dtype}
            assert corpus.train.tolist() == list(range(32_768 + extra))


def test_a_given_vocabulary_is_used_as_it_is(corpus):
    """A saved model's vocabulary fixes the ids, in its own order; what it lacks is its <unk>."""
    vocab = ["c", UNK, EOS, "b", "two\nlines"]
    for _ in range(2):  # from the text, then from the cache
        read = read_corpus(corpus, vocab=vocab)
        assert read.vocab == vocab
        assert decoded(read)["train"] == ["b", UNK, UNK, UNK, EOS, "c", "b", UNK, EOS]


def test_a_given_vocabulary_without_unk_names_the_first_stranger(tmp_path):
    """The word and the file, when there is no <unk> to stand for it."""
    folder = write(tmp_path, {"train": "a b\n", "valid": "a c d\n", "test": "e a\n"})
    with pytest.raises(UserError, match=r"valid\.txt: the word 'c' is not in the model's vocabulary"):
        read_corpus(folder, vocab=["a", "b", EOS])


def test_the_encoder_knows_exactly_the_vocabulary():
    """torchnlp's encoder in the vocabulary's order; a line is its words, strangers <unk> or an error."""
    with_unk, without = data.make_encoder(["b", UNK, EOS]), data.make_encoder([EOS, "a"])
    assert with_unk.vocab == ["b", UNK, EOS]
    assert with_unk.token_to_index == {"b": 0, UNK: 1, EOS: 2}
    assert (with_unk.unknown_index, without.unknown_index) == (1, None)
    assert data.encode_line(" b zebra b\n", with_unk, "t") == [0, 1, 0]
    with pytest.raises(UserError, match="line 3: the word 'zebra' is not in the model's vocabulary"):
        data.encode_line("a zebra", without, "line 3")


# ---- the cache ----


def caches(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).rglob(".cache-*"))


def test_the_second_read_maps_the_cache(corpus, reads):
    """The same corpus, no word read; one file, whose ids are memory-mapped."""
    first = content(read_corpus(corpus))
    assert reads == ["train.txt", "valid.txt", "test.txt"]
    again = read_corpus(corpus)
    assert content(again) == first
    assert len(reads) == 3
    (path,) = caches(corpus)
    assert str(path) in Path("/proc/self/maps").read_text() or sys.platform != "linux"


def test_a_copy_of_the_folder_takes_its_cache_along(tmp_path, corpus, reads):
    """Other inodes and times but the same bytes."""
    first = content(read_corpus(corpus))
    shutil.copytree(corpus, tmp_path / "copy")
    reads.clear()
    assert content(read_corpus(str(tmp_path / "copy"))) == first
    assert reads == []


@pytest.mark.parametrize("split", SPLITS)
def test_a_changed_byte_is_seen(corpus, split):
    """One letter, there and back, the size and the modification time as before."""
    path = Path(corpus, f"{split}.txt")
    before, times = content(read_corpus(corpus)), path.stat()
    for new in (TEXTS[split].replace("a", "c", 1).replace("b b", "a b"), TEXTS[split]):
        path.write_text(new)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        read = read_corpus(corpus)
        assert (read.vocab, decoded(read)) == slow_corpus(TEXTS | {split: new})
        assert (content(read) == before) == (new == TEXTS[split])


def test_another_order_of_the_same_lines_or_texts_is_seen(corpus):
    """The digest is of the bytes in their order, and knows which text is which."""
    folder = Path(corpus)
    first = read_corpus(corpus)
    lines = (folder / "train.txt").read_text().splitlines(keepends=True)
    (folder / "train.txt").write_text("".join(reversed(lines)))
    second = read_corpus(corpus)
    assert decoded(second)["train"] == slow_words("".join(reversed(lines)))
    for new, old in (("valid", "test"), ("test", "valid")):
        (folder / f"{new}.txt").write_text(TEXTS[old])
    third = read_corpus(corpus)
    assert decoded(third)["valid"] == slow_words(TEXTS["test"])
    assert len({first.digest, second.digest, third.digest}) == 3


def test_text_that_changes_while_it_is_read_is_read_again(corpus, monkeypatch):
    """The cache is named for the bytes that lay there before."""

    def changing(path: str, bar: object) -> Iterator[list[str]]:
        yield from read_words(path, bar)
        Path(path).write_text("c c c\n")

    with monkeypatch.context() as patch:
        patch.setattr(data, "read_words", changing)
        read_corpus(corpus)
    assert read_corpus(corpus).vocab == ["c", EOS]


def test_a_damaged_cache_is_none(tmp_path, corpus, reads):
    """Cut anywhere or one bit off: the true corpus or nothing, without a word; then it is made anew."""
    read = read_corpus(corpus)
    first, payload = content(read), (json.dumps(read.vocab).encode(), bytes(read.train.numpy()))
    (path,) = caches(corpus)
    whole, damaged = path.read_bytes(), tmp_path / "damaged"
    inside = [whole.index(part) + i for part in payload for i in range(len(part))]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in {*inside, whole.index(b"\x80\x02") + 1, *range(0, len(whole), 4)}:  # a protocol torch warns of
            damaged.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
            loaded = data.load_cache(damaged, read.digest)
            assert loaded is None or (i not in inside and content(Corpus(**loaded)) == first), i
        for size in range(0, len(whole), 4):
            damaged.write_bytes(whole[:size])
            assert data.load_cache(damaged, read.digest) is None
    assert said == []
    del read, loaded  # they are mapped from the files that are now overwritten
    for found in (b"", whole[: len(whole) // 2], b"\0" * len(whole)):
        path.write_bytes(found)
        reads.clear()
        assert content(read_corpus(corpus)) == first
        assert len(reads) == 3
        assert path.read_bytes() == whole


def test_each_rule_has_a_cache_of_its_own(corpus, reads):
    """Going back and forth between caps reads the text once for each."""
    sizes = [len(read_corpus(corpus, vocab_size=size).vocab) for size in (0, 3, 4, 0, 3, 4)]
    assert sizes == [5, 3, 4, 5, 3, 4]
    read_corpus(corpus, min_count=3)
    assert len(reads) == 12
    assert len(caches(corpus)) == 4


def test_a_model_reads_the_cache_its_training_left(corpus, reads):
    """A given vocabulary that some cap led to needs no second copy of the ids; another one does."""
    trained = read_corpus(corpus, vocab_size=3)
    assert content(read_corpus(corpus, vocab=trained.vocab)) == content(trained)
    assert len(reads) == 3
    assert len(caches(corpus)) == 1
    other = trained.vocab[::-1]
    assert decoded(read_corpus(corpus, vocab=other)) == decoded(trained)
    assert len(caches(corpus)) == 2


def obstruct(folder: str) -> None:
    """Puts a folder where the cache would be: nobody, root included, can write it there."""
    (path,) = caches(folder)
    path.unlink()
    path.mkdir()


def test_where_the_corpus_cannot_be_written_to_the_cache_is_in_the_users_folder(corpus, home, reads, capsys):
    """$XDG_CACHE_HOME/awd-lm takes it, without a word; the next start reads it there."""
    first = content(read_corpus(corpus))
    obstruct(corpus)
    reads.clear()
    for _ in range(2):
        assert content(read_corpus(corpus)) == first
    assert len(reads) == 3
    assert capsys.readouterr() == ("", "")
    (path,) = caches(home)
    assert path.parent.parent == home / "awd-lm"


def test_with_nowhere_to_write_the_corpus_comes_all_the_same(corpus, home, capsys, monkeypatch):
    """The ids in memory, and one warning that says why."""
    first = content(read_corpus(corpus))
    obstruct(corpus)
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert content(read_corpus(corpus)) == first
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {corpus}: Is a directory; no cache was kept, the text is read again next time"
    ]


@pytest.mark.parametrize("room", [0, 1000, 20_000, 100_000])
def test_a_full_disk_costs_the_cache_alone(tmp_path, home, capsys, room):
    """Wherever in the file the room ends: the corpus comes, one warning, no half file stays."""
    folder = write(tmp_path / "c", TEXTS | {"train": TEXTS["train"] * 6000})
    with file_limit(room):
        read = read_corpus(folder)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {folder}: File too large; no cache was kept")
    assert caches(folder) == caches(home) == []
    assert content(read_corpus(folder)) == content(read)


FORK = multiprocessing.get_context("fork")  # children that have torch already


def test_processes_that_write_at_once_agree(tmp_path, home, reads, monkeypatch):
    """Four of them, none beginning to write before all do: the same corpus in each, and one cache that holds."""
    folder = write(tmp_path / "c", TEXTS | {"train": TEXTS["train"] * 2000})
    gate, answers, save = FORK.Barrier(4), FORK.Queue(), torch.save

    def child() -> None:
        monkeypatch.setattr(torch, "save", lambda *args: (gate.wait(WALL_S), save(*args)))
        answers.put(content(read_corpus(folder)))

    processes = [FORK.Process(target=child) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=WALL_S) for _ in processes]
    for process in processes:
        process.join()
    assert all(answer == found[0] for answer in found)
    assert content(read_corpus(folder)) == found[0]
    assert reads == []
    assert [path.suffix for path in caches(folder)] == [".pt"]
    assert caches(home) == []


DIES = """
import os, signal, sys, torch
from corpus.read import read_corpus

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(contents, file):
    file.write(b"PK\\3\\4 and so on")
    file.flush()
    die()

moment, folder = sys.argv[1:]
setattr(*(torch, "save", write_half) if moment == "write" else (os, moment, die))
read_corpus(folder)
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_writer_that_is_killed_leaves_no_half_cache(tmp_path, moment):
    """Killed with half of the file written, before fsync, before the rename: the next start is right.

    The writer shares no lock with this process, so that what it holds when it is killed stops nobody.
    """
    folder = write(tmp_path / "corpus", TEXTS | {"train": TEXTS["train"] * 2000})
    (tmp_path / "dies.py").write_text(DIES)
    killed = run_cli(moment, folder, cwd=tmp_path, script=str(tmp_path / "dies.py"))
    assert killed.status == -signal.SIGKILL, killed
    assert [path.suffix for path in caches(folder)] == [".tmp"]
    assert decoded(read_corpus(folder))["train"] == slow_words(TEXTS["train"] * 2000)
    assert decoded(read_corpus(folder))["train"] == slow_words(TEXTS["train"] * 2000)


# ---- progress ----


def test_a_bar_after_two_seconds_and_none_before(corpus, monkeypatch, capsys):
    """Reading that takes long shows how far it is, on stderr; a short one shows nothing."""
    read_corpus(corpus)
    assert capsys.readouterr() == ("", "")

    def slowly(path: str, bar: object) -> Iterator[list[str]]:
        time.sleep(0.8)
        yield from read_words(path, bar)

    monkeypatch.setattr(data, "read_words", slowly)
    read_corpus(corpus, min_count=1)
    out, err = capsys.readouterr()
    assert f"reading {corpus}" in err
    assert out == ""


# ---- torchnlp's datasets ----


def served(url: str, filename: str, reporthook: object = None) -> None:
    """Stands in for urllib's download: what the two addresses of torchnlp hold."""
    if url.endswith(".zip"):
        with zipfile.ZipFile(filename, "w") as archive:
            for split, text in TEXTS.items():
                archive.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    else:
        Path(filename).write_text(TEXTS[Path(url).name.split(".")[1]])


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """`serve(function)`: from now on that is what downloads do; the working folder is a fresh one."""
    monkeypatch.chdir(tmp_path)
    return lambda function: monkeypatch.setattr("urllib.request.urlretrieve", function)


each_dataset = pytest.mark.parametrize(("name", "folder"), [("penn_treebank", "penn"), ("wikitext_2", "wikitext-2")])


@each_dataset
def test_torchnlp_fetches_its_datasets_once(tmp_path, serve, name, folder):
    """The corpus is that of a folder with the same text; the second time nothing is fetched."""
    same = content(read_corpus(write(tmp_path / "same")))
    for function in (served, None):
        serve(function)
        assert content(read_corpus(name)) == same
    assert not list(tmp_path.glob("data/.fetch*"))


@each_dataset
def test_torchnlp_reads_what_getdata_left(tmp_path, serve, name, folder):
    """With data/penn or data/wikitext-2 there, the names work without a network."""
    serve(None)
    assert content(read_corpus(write(tmp_path / "data" / folder))) == content(read_corpus(name))


@each_dataset
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(tmp_path, serve, name, folder):
    """No network, or a connection that breaks: an error, and the next try is not misled by the half."""

    def broken(url: str, filename: str, reporthook: object = None) -> None:
        served(url, filename)
        Path(filename).write_bytes(Path(filename).read_bytes()[:5])
        raise urllib.error.ContentTooShortError("got only 5 bytes", b"")

    def absent(url: str, filename: str, reporthook: object = None) -> None:
        raise urllib.error.URLError("no network")

    for failing in (broken, absent):
        serve(failing)
        with pytest.raises(UserError, match=rf"--data {name}: could not be fetched .*run ./getdata.sh {folder}"):
            read_corpus(name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    serve(served)
    assert len(read_corpus(name).train) == 9


def test_a_folder_of_a_datasets_name_is_meant_with_a_slash(tmp_path, serve):
    """`penn_treebank` is the dataset, `./penn_treebank` the folder."""
    write(tmp_path / "penn_treebank", dict.fromkeys(SPLITS, "mine mine\n"))
    serve(served)
    assert "mine" in read_corpus("./penn_treebank").vocab
    assert "mine" not in read_corpus("penn_treebank").vocab
