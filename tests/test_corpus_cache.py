"""The corpus's cache: never stale, never half written, never needed.

python -m pytest tests/test_corpus_cache.py
"""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import corpus_cache
import data
from data import EOS, read_corpus

TEXTS = {"train": "b a <unk> a\nc b a\n" * 2000, "valid": "a c d\n", "test": "b b\n"}
FORK = multiprocessing.get_context("fork")  # children that have torch already


def write(folder: Path, texts: dict[str, str] = TEXTS) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    for split, text in texts.items():
        (folder / f"{split}.txt").write_text(text)
    return str(folder)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own $XDG_CACHE_HOME."""
    path = tmp_path_factory.mktemp("xdg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had been written a while ago: its stamp is trusted at once."""
    monkeypatch.setattr(corpus_cache, "RACY", 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose text is read, as they are."""
    names: list[str] = []
    read_words = data.read_words

    def recorded(path: Path, *seen: Callable[[bytes], None]) -> Iterator[list[str]]:
        names.append(Path(path).name)
        return read_words(path, *seen)

    monkeypatch.setattr(data, "read_words", recorded)
    return names


def content(corpus: data.Corpus) -> tuple[list[str], list[list[int]]]:
    return corpus.vocab, [split.tolist() for split in (corpus.train, corpus.valid, corpus.test)]


def files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).rglob(".cache-*"))


def in_child(function: Callable[[], Any]) -> tuple[Any, str]:
    """Calls `function` in a forked process; its result, and what it printed on stderr."""
    ours, theirs = FORK.Pipe()

    def child() -> None:
        sys.stderr = io.StringIO()
        try:
            result = function()
        except BaseException as error:
            result = repr(error)
        theirs.send((result, sys.stderr.getvalue()))

    process = FORK.Process(target=child)
    process.start()
    assert ours.poll(30), "the child does not answer"
    answer = ours.recv()
    process.join()
    return answer


def test_second_read_maps_the_cache_and_leaves_the_text_alone(
    tmp_path: Path, settled: None, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same corpus, no word read, no byte hashed, the ids on a memory map; plain files only."""
    folder = write(tmp_path)
    first = content(read_corpus(folder))
    assert reads == ["train.txt", "valid.txt", "test.txt"]
    monkeypatch.setattr(corpus_cache, "_digest", None)
    again = read_corpus(folder)
    assert content(again) == first
    assert len(reads) == 3
    ids, header = files(folder)
    assert str(ids) in Path("/proc/self/maps").read_text() or sys.platform != "linux"
    assert json.loads(header.read_bytes().partition(b"\n")[2])["vocab"] == first[0]
    assert np.fromfile(ids, np.int16).tolist() == [i for split in first[1] for i in split]


def test_a_copy_of_the_folder_takes_its_cache_along(tmp_path: Path, reads: list[str]) -> None:
    """Other inodes and times but the same bytes: hashed, not read again; the new stamps are then trusted."""
    folder = write(tmp_path / "a")
    first = content(read_corpus(folder))
    shutil.copytree(folder, tmp_path / "b")
    reads.clear()
    assert content(read_corpus(str(tmp_path / "b"))) == first
    assert reads == []


def test_new_stamps_are_kept_once_they_can_be_trusted(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file read at once after it was written is hashed the next time, and not the time after."""
    folder = write(tmp_path)
    read_corpus(folder)
    hashed: list[Path] = []
    digest = corpus_cache._digest
    monkeypatch.setattr(corpus_cache, "_digest", lambda path: hashed.append(path) or digest(path))
    read_corpus(folder)
    assert len(hashed) == 3
    monkeypatch.setattr(corpus_cache, "RACY", 0)
    read_corpus(folder)
    read_corpus(folder)
    assert len(hashed) == 6
    assert len(reads) == 3


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_changed_byte_is_seen_at_once(tmp_path: Path, split: str) -> None:
    """One letter, the size and the modification time as before, the moment after the cache was written."""
    folder = write(tmp_path)
    path = Path(folder, f"{split}.txt")
    before = content(read_corpus(folder))
    for _ in range(2):  # there, and back again
        times, text = path.stat(), path.read_text()
        path.write_text(("a" if text[0] == "b" else "b") + text[1:])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_size == times.st_size
        after = content(read_corpus(folder))
        fresh = {path.stem: path.read_text() for path in Path(folder).glob("*.txt")}
        assert after == content(read_corpus(write(tmp_path / "fresh", fresh)))
        assert after != before
        before = after
        shutil.rmtree(tmp_path / "fresh")


def test_a_changed_byte_is_seen_by_its_time_alone(tmp_path: Path, settled: None) -> None:
    """Where stamps are trusted, the change of status (ctime) betrays a file whose mtime was put back."""
    folder = write(tmp_path)
    path = Path(folder, "test.txt")
    before, times = content(read_corpus(folder)), path.stat()
    time.sleep(0.05)
    path.write_text("a b\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content(read_corpus(folder)) != before


def test_text_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache knows the bytes that were encoded, not those that lay there when it was written."""
    folder = write(tmp_path)
    read_words = data.read_words

    def changing(path: Path, *seen: Callable[[bytes], None]) -> Iterator[list[str]]:
        yield from read_words(path, *seen)
        Path(path).write_text("c c c\n")

    with monkeypatch.context() as patch:
        patch.setattr(data, "read_words", changing)
        read_corpus(folder)
    assert read_corpus(folder).vocab == ["c", EOS]


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:middle],
            "longer": content + b"\0\0\0\0",
            "bit": content[:middle] + flipped + content[middle + 1 :],
            "zeros": content[:middle] + bytes(len(content) - middle),
        }[kind]
    )


@pytest.mark.parametrize("kind", ["empty", "cut", "longer", "bit", "zeros", "gone"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, settled: None, reads: list[str], kind: str, which: int
) -> None:
    """Ids or header, cut short, one bit off or overwritten: the text is read again, and then no more."""
    folder = write(tmp_path)
    first = content(read_corpus(folder))
    path = files(folder)[which]
    if kind == "gone":
        path.unlink()
    else:
        damage(path, kind)
    reads.clear()
    assert content(read_corpus(folder)) == first
    assert len(reads) == 3
    assert content(read_corpus(folder)) == first
    assert len(reads) == 3


def test_header_and_ids_of_two_texts_do_not_pair(tmp_path: Path, settled: None) -> None:
    """What two processes can leave that write at once: the ids of one, the header of the other."""
    folder = write(tmp_path / "a")
    other = write(tmp_path / "b", TEXTS | {"train": TEXTS["train"].replace("c", "b")})
    first = content(read_corpus(folder))
    read_corpus(other)
    shutil.copy(files(other)[0], files(folder)[0])
    assert content(read_corpus(folder)) == first


def test_the_caps_have_caches_of_their_own(tmp_path: Path, settled: None, reads: list[str]) -> None:
    """Going back and forth between caps reads the text once for each."""
    folder = write(tmp_path)
    sizes = [len(read_corpus(folder, vocab_size=size).vocab) for size in (0, 3, 4, 0, 3, 4)]
    assert sizes == [5, 3, 4, 5, 3, 4]
    assert len(reads) == 9


def test_a_model_reads_the_cache_its_training_left(tmp_path: Path, settled: None, reads: list[str]) -> None:
    """A given vocabulary that some cap led to needs no second copy of the ids."""
    folder = write(tmp_path)
    trained = read_corpus(folder, vocab_size=3)
    assert content(read_corpus(folder, vocab=trained.vocab)) == content(trained)
    assert len(reads) == 3
    assert len(files(folder)) == 2


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A corpus in a folder that nobody but root may write to; `as_nobody` gives up root's right to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(write(Path(folder, "corpus")))
        path.chmod(0o555)
        yield path
        path.chmod(0o755)


def as_nobody(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return function()

    return call


def test_beside_a_read_only_corpus_the_cache_is_in_the_users_folder(
    read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$XDG_CACHE_HOME/awd-lm takes it, without a word; the second start reads it there."""
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        first, said = in_child(as_nobody(lambda: content(read_corpus(str(read_only)))))
        assert said == ""
        assert first == content(read_corpus(write(read_only.parent / "same")))
        assert files(read_only) == []
        assert [path.parent.parent for path in files(home)] == [Path(home, "awd-lm")] * 2
        monkeypatch.setattr(data, "read_words", None)
        assert in_child(as_nobody(lambda: content(read_corpus(str(read_only))))) == (first, "")


def test_with_nowhere_to_write_the_corpus_comes_all_the_same(
    read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both places read-only: the ids in memory, and one warning that says why."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(read_only / "home"))
    answer, said = in_child(as_nobody(lambda: content(read_corpus(str(read_only)))))
    assert answer == content(read_corpus(write(read_only.parent / "same")))
    assert said.count("\n") == 1
    assert f"warning: {read_only}: Permission denied" in said


@pytest.mark.parametrize(
    ("room", "train"), [(0, "a b\n"), (20_000, TEXTS["train"]), (1000, "long" * 999 + " a\n")]
)
def test_a_full_disk_costs_the_cache_alone(tmp_path: Path, room: int, train: str) -> None:
    """No file may pass `room` bytes, which stops ids or header: the corpus comes, no half file stays."""
    folder = write(tmp_path / "c", TEXTS | {"train": train})

    def limited() -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return content(read_corpus(folder))

    answer, said = in_child(limited)
    assert said.count("warning") == said.count("\n") == 1, said
    assert "File too large" in said
    assert [path.name for path in Path(folder).iterdir() if path.suffix == ".tmp"] == []
    assert answer == content(read_corpus(folder))


def test_processes_that_start_at_once_agree(tmp_path: Path, reads: list[str]) -> None:
    """Eight of them on a fresh folder: the same corpus in each, and a cache that holds."""
    folder = write(tmp_path)
    gate, answers = FORK.Event(), FORK.Queue()

    def child() -> None:
        gate.wait()
        answers.put(content(read_corpus(folder)))

    processes = [FORK.Process(target=child) for _ in range(8)]
    for process in processes:
        process.start()
    gate.set()
    found = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert all(answer == found[0] for answer in found)
    assert content(read_corpus(folder)) == found[0]
    assert reads == []
    assert len(files(folder)) == 2


def test_killed_at_any_moment_the_next_start_is_right(tmp_path: Path) -> None:
    """Thirty kills over the time that reading takes; each time the next process gets the whole corpus."""
    folder = write(tmp_path)
    start = time.monotonic()
    expected = in_child(lambda: content(read_corpus(folder)))[0]
    took = time.monotonic() - start
    draw = random.Random(3)
    for _ in range(30):
        for path in files(folder):
            path.unlink()
        process = FORK.Process(target=lambda: read_corpus(folder))
        process.start()
        time.sleep(draw.uniform(0, took))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert content(read_corpus(folder)) == expected
