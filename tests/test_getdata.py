"""getdata.sh against a local mirror with the archives' real layouts, and against mirrors that misbehave."""

import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from runner import WALL_S

from corpus import fetch
from corpus.corpora import CORPORA

SCRIPT = Path(__file__).resolve().parent.parent / "getdata.sh"
SPLITS = ("train", "valid", "test")
WORDS = {
    "train": " the cat <unk> sat on N mats \n the dog sat \n" * 500,
    "valid": " the cat sat \n",
    "test": " the dog sat on a mat \n",
}


class Mirror:
    """A server of named bytes; `lie(name, data)` serves other bytes, `break_at[name]` hangs up there once."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_at: dict[str, int] = {}
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, wanted = self.path[1:], self.headers["Range"]
                mirror.requests.append((name, wanted))
                data = mirror.files.get(name)
                if data is None:
                    return self.send_error(404)
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and mirror.ranges else 0
                if wanted and start >= len(data):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start : mirror.break_at.pop(name, len(data))])

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def names(self) -> list[str]:
        return [name for name, _ in self.requests]


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    mirror.files = {f"ptb.{split}.txt": text.encode() for split, text in WORDS.items()}
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


def known(texts: dict[str, str] = WORDS) -> dict:
    """The counts and checksums of a small corpus, in the form of a row of CORPORA."""
    table: dict = {"types": len({"<eos>", *" ".join(texts.values()).split()})}
    for split, text in texts.items():
        tokens = len(text.split()) + text.count("\n")
        table[split] = [tokens, hashlib.sha256(text.encode()).hexdigest()]
    return table


def run(folder: Path, mirror: str, *names: str, checks: dict | None = None) -> subprocess.CompletedProcess[str]:
    table = {"penn": known(), "wikitext-2": known(), "wikitext-103": known()} if checks is None else checks
    (folder / "checks.json").write_text(json.dumps(table))
    env = os.environ | {"AWD_MIRROR": mirror, "AWD_CHECKS": "checks.json", "no_proxy": "*"}
    return subprocess.run([SCRIPT, *names], cwd=folder, env=env, capture_output=True, text=True, timeout=WALL_S)


def texts(folder: Path, name: str) -> dict[str, str]:
    return {split: (folder / "data" / name / f"{split}.txt").read_text() for split in SPLITS}


def zipped(files: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def wikitext(name: str) -> bytes:
    return zipped({f"{name}/": "", **{f"{name}/wiki.{split}.tokens": text for split, text in WORDS.items()}})


def tarred(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_default_brings_penn_and_wikitext_2(tmp_path: Path, mirror: Mirror) -> None:
    """Without names penn and wikitext-2 arrive, byte for byte, with a table of counts, and nothing else."""
    mirror.files["wikitext-2-v1.zip"] = wikitext("wikitext-2")
    done = run(tmp_path, mirror.url)
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path, "penn") == texts(tmp_path, "wikitext-2") == WORDS
    assert sorted(os.listdir(tmp_path / "data")) == ["penn", "wikitext-2"]
    assert f"{known()['train'][0]:,}" in done.stdout


def test_wikitext_103_comes_out_of_its_archive(tmp_path: Path, mirror: Mirror) -> None:
    """wikitext-103-v1.zip is unpacked by its own layout."""
    mirror.files["wikitext-103-v1.zip"] = wikitext("wikitext-103")
    assert run(tmp_path, mirror.url, "wikitext-103").returncode == 0
    assert texts(tmp_path, "wikitext-103") == WORDS


def test_second_run_does_nothing(tmp_path: Path, mirror: Mirror) -> None:
    """A corpus that is there is neither fetched nor touched."""
    assert run(tmp_path, mirror.url, "penn").returncode == 0
    before, times = mirror.names(), (tmp_path / "data/penn/train.txt").stat().st_mtime_ns
    done = run(tmp_path, mirror.url, "penn")
    assert done.returncode == 0
    assert "is there" in done.stdout
    assert mirror.names() == before
    assert (tmp_path / "data/penn/train.txt").stat().st_mtime_ns == times


def test_penn_falls_back_on_the_archive(tmp_path: Path, mirror: Mirror) -> None:
    """With the first source gone, the texts come out of simple-examples.tgz."""
    mirror.files = {
        "simple-examples.tgz": tarred({f"./simple-examples/data/ptb.{split}.txt": WORDS[split] for split in SPLITS})
    }
    done = run(tmp_path, mirror.url, "penn")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path, "penn") == WORDS


def test_pennchar_spells_the_words(tmp_path: Path, mirror: Mirror) -> None:
    """A line's words joined by `_`, one character a token; penn is fetched for it."""
    types = {"<eos>", "_", *"".join(WORDS.values())} - {" ", "\n"}
    table = {"penn": known(), "pennchar": {"types": len(types)}}
    done = run(tmp_path, mirror.url, "pennchar", checks=table)
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path, "pennchar")["valid"] == "t h e _ c a t _ s a t\n"
    assert texts(tmp_path, "pennchar")["train"].startswith("t h e _ c a t _ < u n k > _ s a t _ o n _ N _ m")


def test_pennchar_without_penn_is_not_made(tmp_path: Path) -> None:
    """Where penn cannot be fetched: status 1, and neither of the two appears."""
    done = run(tmp_path, "http://127.0.0.1:9", "pennchar")
    assert done.returncode == 1
    assert "penn: no source gave it" in done.stderr
    assert nothing_left(tmp_path, "penn")
    assert nothing_left(tmp_path, "pennchar")


def test_enwik8_is_bytes_and_newline_is_eos(tmp_path: Path, mirror: Mirror) -> None:
    """90, 5 and 5 per cent of the bytes as numbers; read back they are the bytes."""
    data = bytes(range(256)) * 50 + "é\r\n\n x".encode() * 100
    mirror.files["enwik8.zip"] = zipped({"enwik8": data})
    cut, stop = len(data) * 90 // 100, len(data) * 95 // 100
    table = {
        "train": [cut, None],
        "valid": [stop - cut, None],
        "test": [len(data) - stop, None],
        "types": 256,
    }
    done = run(tmp_path, mirror.url, "enwik8", checks={"enwik8": table})
    assert done.returncode == 0, done.stdout + done.stderr
    joined = " ".join(texts(tmp_path, "enwik8")[split] for split in SPLITS)
    assert b"\n".join(bytes(map(int, line.split())) for line in joined.split("\n")) == data


def nothing_left(folder: Path, name: str) -> bool:
    return not (folder / "data" / name).exists()


@pytest.mark.parametrize("name", ["wikitext-2", "enwik8"])
def test_truncated_archive_is_refused_and_fetched_anew(tmp_path: Path, mirror: Mirror, name: str) -> None:
    """Half an archive, served as if whole: status 1, no corpus; the next run starts from the beginning."""
    file = {"wikitext-2": "wikitext-2-v1.zip", "enwik8": "enwik8.zip"}[name]
    whole = wikitext("wikitext-2") if name == "wikitext-2" else zipped({"enwik8": b"some bytes\n" * 1000})
    mirror.files[file] = whole[: len(whole) // 2]
    checks = {"wikitext-2": known(), "enwik8": {}}
    done = run(tmp_path, mirror.url, name, checks=checks)
    assert done.returncode == 1
    assert "damaged or not the corpus" in done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_left(tmp_path, name)
    mirror.files[file] = whole
    assert run(tmp_path, mirror.url, name, checks=checks).returncode == 0


def test_wrong_checksum_is_refused(tmp_path: Path, mirror: Mirror) -> None:
    """One word changed for another of the vocabulary: the counts hold, the checksum does not."""
    mirror.files["ptb.test.txt"] = mirror.files["ptb.test.txt"].replace(b"dog", b"cat")
    done = run(tmp_path, mirror.url, "penn")
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert nothing_left(tmp_path, "penn")


def test_real_checksums_refuse_another_text(tmp_path: Path, mirror: Mirror) -> None:
    """Without AWD_CHECKS the table CORPORA counts: the small text is not the Penn Treebank."""
    env = os.environ | {"AWD_MIRROR": mirror.url, "no_proxy": "*"}
    done = subprocess.run([SCRIPT, "penn"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=WALL_S)
    assert done.returncode == 1
    assert "929,589" in done.stdout
    assert nothing_left(tmp_path, "penn")


@pytest.mark.parametrize("ranges", [True, False])
def test_server_that_hangs_up_half_way(tmp_path: Path, mirror: Mirror, ranges: bool) -> None:
    """The rest is asked for with a Range; a server that knows none of that gives the whole again."""
    half = len(mirror.files["ptb.train.txt"]) // 2
    mirror.break_at["ptb.train.txt"], mirror.ranges = half, ranges
    done = run(tmp_path, mirror.url, "penn")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path, "penn") == WORDS
    assert ("ptb.train.txt", f"bytes={half}-") in mirror.requests


def test_broken_download_survives_a_night_without_network(tmp_path: Path, mirror: Mirror) -> None:
    """What has come is kept while the server is away, and a later run asks for the rest alone."""
    work = tmp_path / "data/.fetch/penn/1"
    work.mkdir(parents=True)
    (work / "ptb.train.txt.part").write_bytes(mirror.files["ptb.train.txt"][:1000])
    assert run(tmp_path, "http://127.0.0.1:9", "penn").returncode == 1
    assert run(tmp_path, mirror.url, "penn").returncode == 0
    assert mirror.requests[0] == ("ptb.train.txt", "bytes=1000-")
    assert texts(tmp_path, "penn") == WORDS


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder and the outcome of `getdata.sh penn pydocs` without a network."""
    folder = tmp_path_factory.mktemp("offline")
    return folder, run(folder, "http://127.0.0.1:9", "penn", "pydocs", checks={})


def test_no_network_is_said_and_pydocs_still_comes(
    offline: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Status 1 and what to do; the corpus that needs no network arrives all the same."""
    folder, done = offline
    assert done.returncode == 1
    assert "penn: no source gave it" in done.stderr
    assert nothing_left(folder, "penn")
    assert set(SPLITS) <= {path.stem for path in (folder / "data/pydocs").iterdir()}


def test_a_part_that_is_longer_than_the_file_is_fetched_anew(tmp_path: Path, mirror: Mirror) -> None:
    """The server answers 416: nothing comes after that byte."""
    work = tmp_path / "data/.fetch/penn/1"
    work.mkdir(parents=True)
    (work / "ptb.train.txt.part").write_bytes(mirror.files["ptb.train.txt"] + b"more")
    done = run(tmp_path, mirror.url, "penn")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path, "penn") == WORDS


def test_needs_no_package_and_no_folder_of_that_name(tmp_path: Path) -> None:
    """Python's standard library is enough; a folder `corpus` where it is called is another thing."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/__init__.py").write_text("raise SystemExit('not this one')")
    env = {"PATH": os.environ["PATH"], "PYTHONNOUSERSITE": "1"}
    (tmp_path / "bin").mkdir()
    for name in ("sh", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    wrapper = tmp_path / "bin/python3"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: without site-packages
    wrapper.chmod(0o755)
    env["PATH"] = str(tmp_path / "bin")
    done = subprocess.run([SCRIPT, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=WALL_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_stopped_by_sigterm(tmp_path: Path, mirror: Mirror) -> None:
    """Status 143 and one line; what has come stays."""
    reached = threading.Event()

    class Slow(dict):
        def get(self, name: str) -> bytes | None:
            reached.set()
            time.sleep(3)
            return None

    mirror.files = Slow()
    env = os.environ | {"AWD_MIRROR": mirror.url, "no_proxy": "*"}
    process = subprocess.Popen([SCRIPT, "penn"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    assert reached.wait(WALL_S)
    process.terminate()
    _, err = process.communicate(timeout=WALL_S)
    assert process.returncode == 143
    assert err.splitlines()[-1] == "getdata.sh: stopped; the same command goes on from here"


def test_check_finds_a_changed_byte(tmp_path: Path, mirror: Mirror) -> None:
    """--check passes what getdata.sh left and fails on one other word, also where no checksum is known."""
    mirror.files["wikitext-2-v1.zip"] = wikitext("wikitext-2")
    table = {"penn": known(), "wikitext-2": {}}
    assert run(tmp_path, mirror.url, checks=table).returncode == 0
    assert run(tmp_path, mirror.url, "--check", checks=table).returncode == 0
    for name in ("penn", "wikitext-2"):
        path = tmp_path / "data" / name / "valid.txt"
        path.write_text(path.read_text().replace("cat", "dog"))
        done = run(tmp_path, mirror.url, "--check", name, checks=table)
        assert done.returncode == 1
        assert f"remove it and run ./getdata.sh {name}" in done.stderr


def test_check_of_a_missing_corpus(tmp_path: Path) -> None:
    """--check NAME of what is not there is status 1 and names the command."""
    done = run(tmp_path, "http://127.0.0.1:9", "--check", "enwik8")
    assert done.returncode == 1
    assert "run ./getdata.sh enwik8" in done.stderr


def test_help_names_every_corpus(tmp_path: Path) -> None:
    """--help names the corpora of the table, AWD_MIRROR and AWD_CHECKS, and fetches nothing."""
    done = run(tmp_path, "http://127.0.0.1:9", "--help")
    assert done.returncode == 0
    assert f"every corpus: {' '.join(CORPORA)}\n" in done.stdout
    assert "AWD_MIRROR=URL" in done.stdout
    assert "AWD_CHECKS=FILE" in done.stdout
    assert not (tmp_path / "data").exists()


def test_getdata_knows_exactly_the_rows_of_the_table(tmp_path: Path) -> None:
    """Each name of CORPORA is accepted, and the list of names is theirs."""
    done = run(tmp_path, "http://127.0.0.1:9", "--check", *CORPORA)
    assert done.returncode == 1
    assert done.stderr.count("not complete in data/") == len(CORPORA)
    done = run(tmp_path, "http://127.0.0.1:9", "nothing")
    assert done.returncode == 2
    assert done.stderr == f"getdata.sh: nothing: no such corpus; there are: {' '.join(CORPORA)}, all\n"


@pytest.mark.parametrize("name", CORPORA)
def test_row_is_complete(name: str) -> None:
    """A converter; addresses, or a base that is there, or neither; all counts and checksums or none."""
    row = CORPORA[name]
    assert callable(row.convert)
    assert not (row.sources and row.base)
    assert row.base is None or row.base in CORPORA
    for addresses in row.sources:
        files = [address.rpartition("/")[2] for address in addresses]
        assert all(files)
        assert len(set(files)) == len(files) > 0
        assert all(address.startswith(("http://", "https://", "hf:")) and " " not in address for address in addresses)
    assert set(row.checks) in (set(), {*SPLITS, "types"})
    for split in SPLITS if row.checks else ():
        tokens, digest = row.checks[split]
        assert tokens > 0
        kind, _, digits = (digest or "").rpartition(":")
        assert digest is None or (len(digits) == {"": 64, "git": 40}[kind] and int(digits, 16))


def test_files_of_torchnlp_in_the_folder_stay(tmp_path: Path, mirror: Mirror) -> None:
    """data/wikitext-2 may already hold torchnlp's own files; the three splits join them."""
    mirror.files["wikitext-2-v1.zip"] = wikitext("wikitext-2")
    (tmp_path / "data/wikitext-2").mkdir(parents=True)
    (tmp_path / "data/wikitext-2/wiki.train.tokens").write_text("kept")
    assert run(tmp_path, mirror.url, "wikitext-2").returncode == 0
    assert texts(tmp_path, "wikitext-2") == WORDS
    assert (tmp_path / "data/wikitext-2/wiki.train.tokens").read_text() == "kept"


def test_killed_while_fetching_leaves_no_corpus(tmp_path: Path, mirror: Mirror) -> None:
    """SIGKILL between two files: no data/penn; the next run goes on."""
    gate, reached = threading.Event(), threading.Event()
    original = mirror.files

    class Slow(dict):
        def get(self, name: str) -> bytes | None:
            if name == "ptb.test.txt" and not gate.is_set():
                reached.set()
                gate.wait(WALL_S)
            return original.get(name)

    mirror.files = Slow()
    (tmp_path / "checks.json").write_text(json.dumps({"penn": known()}))
    env = os.environ | {"AWD_MIRROR": mirror.url, "AWD_CHECKS": "checks.json", "no_proxy": "*"}
    process = subprocess.Popen(
        [SCRIPT, "penn"], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert reached.wait(WALL_S)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert nothing_left(tmp_path, "penn")
    gate.set()
    assert run(tmp_path, mirror.url, "penn").returncode == 0
    assert mirror.names().count("ptb.train.txt") == 1
    assert texts(tmp_path, "penn") == WORDS


def test_pydocs_is_the_same_text_twice_and_shares_no_sentence(
    offline: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Two builds agree; 10,000 types at most, lower case, no sentence in two splits, over 200,000 tokens."""
    built = texts(offline[0], "pydocs")
    done = run(tmp_path, "http://127.0.0.1:9", "pydocs", checks={})
    assert done.returncode == 0, done.stderr
    assert built == texts(tmp_path, "pydocs")
    words = {split: text.split() for split, text in built.items()}
    assert len(words["train"]) > 200_000
    assert min(len(words["valid"]), len(words["test"])) > 5_000
    assert len(set(words["train"])) < 10_000
    assert set(words["test"]) <= set(words["train"]) | {"<unk>"}
    assert all(word == word.lower() for word in set(words["train"]) - {"N"})
    whole = {split: {line for line in text.splitlines() if "<unk>" not in line} for split, text in built.items()}
    assert not whole["train"] & (whole["valid"] | whole["test"])


def test_wikitext_2_comes_as_plain_text_when_the_archive_is_gone(tmp_path: Path, mirror: Mirror) -> None:
    """The second source, {train,valid,test}.txt; git's id of the training text is checked."""
    mirror.files |= {f"{split}.txt": text.encode() for split, text in WORDS.items()}
    (tmp_path / "copy").write_text(WORDS["train"])
    command = ["git", "hash-object", "--no-filters", "copy"]
    blob = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    table = {"wikitext-2": known()}
    table["wikitext-2"]["train"][1] = f"git:{blob}"
    done = run(tmp_path, mirror.url, "wikitext-2", checks=table)
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path, "wikitext-2") == WORDS
    path = tmp_path / "data/wikitext-2/train.txt"
    path.write_text(path.read_text().replace("cat", "dog", 1))
    assert run(tmp_path, mirror.url, "--check", "wikitext-2", checks=table).returncode == 1


def test_text8_is_spelled_by_characters(tmp_path: Path, mirror: Mirror) -> None:
    """90, 5 and 5 of a hundred characters, a space written as `_`; one line without an end."""
    text = (" anarchism originated as a term of abuse" * 25)[:1000]
    mirror.files["text8.zip"] = zipped({"text8": text})
    done = run(tmp_path, mirror.url, "text8", checks={"text8": {"train": [900, None], "test": [50, None]}})
    assert done.returncode == 0, done.stderr
    made = texts(tmp_path, "text8")
    assert "".join(made[split].replace(" ", "") for split in SPLITS) == text.replace(" ", "_")
    assert [len(made[split].split()) for split in SPLITS] == [900, 50, 50]


class FakeHub:
    """In the place of huggingface_hub and pyarrow: a dataset of rows, an empty one for a blank line."""

    rows = ({"train": [" = A = \n", "", " the cat sat \n"], "validation": ["a b\n", ""], "test": ["", "c\n"]},)

    def snapshot_download(self, dataset: str, repo_type: str, allow_patterns: str, local_dir: str) -> None:
        assert (dataset, repo_type) == ("Salesforce/wikitext", "dataset")
        folder = Path(local_dir, allow_patterns.removesuffix("/*.parquet"))
        folder.mkdir(parents=True)
        for split in self.rows[0]:
            for part in range(2):
                (folder / f"{split}-0000{part}-of-00002.parquet").touch()

    def ParquetFile(self, path: Path) -> "FakeHub":  # noqa: N802
        split, part = path.name.split("-")[:2]
        rows = self.rows[0][split]
        self.part = rows[:1] if part == "00000" else rows[1:]
        return self

    def iter_batches(self, columns: list[str]) -> list["FakeHub"]:
        assert columns == ["text"]
        return [self]

    def column(self, name: str) -> "FakeHub":
        return self

    def to_pylist(self) -> list[str]:
        return self.part


def test_wikitext_comes_from_hugging_face_where_its_packages_are_installed(tmp_path, monkeypatch, capsys) -> None:
    """Rows become lines, an empty row the blank line ` \\n` of the original; without the packages one line says so."""
    row = CORPORA["wikitext-103"]
    monkeypatch.setitem(CORPORA, "wikitext-103", row._replace(sources=row.sources[1:], checks={}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AWD_MIRROR", raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        assert not fetch.get("wikitext-103")
    assert "python -m pip install huggingface_hub pyarrow" in capsys.readouterr().err
    hub = FakeHub()
    for name in ("huggingface_hub", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, hub)
    assert fetch.get("wikitext-103")
    expected = {"train": " = A = \n \n the cat sat \n", "valid": "a b\n \n", "test": " \nc\n"}
    assert texts(tmp_path, "wikitext-103") == expected
