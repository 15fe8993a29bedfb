"""The part of getdata.sh that is not fetching: unpack, convert, check. Needs the standard library alone.

    python3 corpora.py pydocs data/pydocs           # English text out of Python's own documentation
    python3 corpora.py check penn data/penn         # counts and checksums against the known ones

getdata.sh calls `corpora.py NAME OUT [FOLDER OF WHAT WAS FETCHED]`: it writes OUT/{train,valid,test}.txt.
AWD_CHECKS names a JSON file that replaces the known counts and checksums below, for a mirror with other text.
"""

import ast
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "valid", "test")

# corpus: {split: [tokens, sha256 or None], "types": ...}; one <eos> a line counted (enwik8: bytes)
KNOWN = {
    "penn": {
        "train": [929_589, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"],
        "valid": [73_760, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"],
        "test": [82_430, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"],
        "types": 10_000,
    },
    "wikitext-2": {
        "train": [2_088_628, None],
        "valid": [217_646, "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"],
        "test": [245_569, "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"],
        "types": 33_278,
    },
    "wikitext-103": {
        "train": [103_227_021, None],
        "valid": [217_646, None],
        "test": [245_569, None],
        "types": 267_735,
    },
    # spelled out of penn's words; the published files of it have one token more each
    "pennchar": {
        "train": [5_017_482, "53747d839625e6b9dce9157acef77b20d81754f26ef708807f7892ce90599313"],
        "valid": [393_042, "de493d0c44eeebd91f68d7fb6e73e9305b8523e11c2563ebe91e121f87f3b349"],
        "test": [442_423, "720d2a61c516b69cc668643a52df66928e06c42774c6d87db5cc0cb39e87803f"],
        "types": 50,
    },
    "enwik8": {
        "train": [90_000_000, None],
        "valid": [5_000_000, None],
        "test": [5_000_000, None],
        "types": 205,
    },
    "pydocs": {},  # what a Python carries is not the same in any two releases
}


DAMAGED = (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error)


def main(argv: list[str]) -> int:
    """Runs `check NAME FOLDER` or `NAME OUT [FETCHED]`; returns 0, or 1 with one line on stderr."""
    try:
        if argv[0] == "check":
            return 0 if check(argv[1], Path(argv[2])) else 1
        name, out, *fetched = argv
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        make = {"penn": penn, "pennchar": pennchar, "enwik8": enwik8, "pydocs": pydocs}.get(name, wikitext)
        make(out, *map(Path, fetched))
        return 0 if check(name, out) else 1
    except DAMAGED as error:
        print(f"{argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def check(name: str, folder: Path) -> bool:
    """Prints a corpus's counts beside the known ones, and how its checksums compare; False if any is wrong.

    The first time it leaves SHA256SUMS in the folder, which later checks hold the files against.
    """
    known = KNOWN[name]
    if os.environ.get("AWD_CHECKS"):
        known = json.loads(Path(os.environ["AWD_CHECKS"]).read_text()).get(name, {})
    sums = folder / "SHA256SUMS"
    recorded = dict(reversed(line.split()) for line in sums.read_text().splitlines()) if sums.exists() else {}
    sound, types, found = True, {"<eos>"}, {}
    print(f"{name:12} {'tokens':>12} {'expected':>12}  sha256")
    for split in SPLITS:
        tokens, digest = count(folder / f"{split}.txt", types, name != "enwik8")
        found[f"{split}.txt"] = digest
        expected, known_digest = known.get(split, (None, None))
        known_digest = known_digest or recorded.get(f"{split}.txt")
        right = expected in (None, tokens) and known_digest in (None, digest)
        verdict = f"WRONG: {digest}" if not right else "ok" if known_digest else "not known"
        print(f"  {split:10} {tokens:12,} {_or_dash(expected)}  {verdict}")
        sound &= right
    expected = known.get("types")
    sound &= expected in (None, len(types))
    print(f"  {'types':10} {len(types):12,} {_or_dash(expected)}")
    if sound and not recorded:
        sums.write_text("".join(f"{digest}  {file}\n" for file, digest in found.items()))
    return sound


def _or_dash(count: int | None) -> str:
    return f"{'-' if count is None else f'{count:,}':>12}"


def count(path: Path, types: set[str], ends_last_line: bool = True) -> tuple[int, str]:
    """Tokens of a file, one a line for its end, and its sha256; adds its words to `types`."""
    tokens, digest, line = 0, hashlib.sha256(), b"\n"
    with open(path, "rb") as file:
        for line in file:
            words = line.decode().split()
            types.update(words)
            digest.update(line)
            tokens += len(words) + (ends_last_line or line.endswith(b"\n"))
    return tokens, digest.hexdigest()


def penn(out: Path, fetched: Path) -> None:
    """ptb.{train,valid,test}.txt as they are, or out of Mikolov's archive."""
    archive = fetched / "simple-examples.tgz"
    for split in SPLITS:
        name = f"ptb.{split}.txt"
        if not archive.exists():
            text = (fetched / name).read_bytes()
        else:
            with tarfile.open(archive) as tar:
                member = next((m for m in tar if m.isfile() and m.name.endswith(f"data/{name}")), None)
                if member is None:
                    raise ValueError(f"{archive.name}: has no data/{name}")
                text = tar.extractfile(member).read()
        (out / f"{split}.txt").write_bytes(text)


def wikitext(out: Path, fetched: Path) -> None:
    """wiki.{train,valid,test}.tokens out of the archive."""
    (archive,) = fetched.glob("*.zip")
    with zipfile.ZipFile(archive) as zip_file:
        for split in SPLITS:
            members = [name for name in zip_file.namelist() if name.endswith(f"/wiki.{split}.tokens")]
            if len(members) != 1:
                raise ValueError(f"{archive.name}: has no wiki.{split}.tokens")
            with zip_file.open(members[0]) as source, open(out / f"{split}.txt", "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def pennchar(out: Path, words: Path) -> None:
    """The Penn Treebank spelled out: a line's words joined by `_`, one character a token."""
    for split in SPLITS:
        with (
            open(words / f"{split}.txt", encoding="utf-8") as source,
            open(out / f"{split}.txt", "w", encoding="utf-8") as target,
        ):
            for line in source:
                target.write(" ".join("_".join(line.split())) + "\n")


def enwik8(out: Path, fetched: Path) -> None:
    """Each byte a token, written as its number; the newline byte is the end of a line, so that it is <eos>.

    90, 5 and 5 million bytes. Where a cut falls inside a line, the reader ends that line: one <eos> more.
    """
    with zipfile.ZipFile(fetched / "enwik8.zip") as zip_file:
        data = zip_file.read("enwik8")
    names = [str(byte) for byte in range(256)]
    end = len(data)
    cuts = (0, end * 90 // 100, end * 95 // 100, end)
    for split, start, stop in zip(SPLITS, cuts, cuts[1:], strict=False):
        with open(out / f"{split}.txt", "w", encoding="ascii") as target:
            lines = data[start:stop].split(b"\n")
            target.write(" ".join(map(names.__getitem__, lines[0])))
            for line in lines[1:]:
                target.write("\n" + " ".join(map(names.__getitem__, line)))


def pydocs(out: Path) -> None:
    """English out of Python's own documentation: its language reference and its modules' docstrings.

    Sentences in words, lower-cased, numbers to N, no sentence twice, code left out. A document (a topic or a
    module) goes to one split: of twenty in an order fixed by their names one to valid, one to test. The
    vocabulary is the training text's words seen twice or more, 10,000 types at most, the rest <unk>.
    """
    seen: set[tuple[str, ...]] = set()
    splits: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    order = sorted(documents(), key=lambda document: hashlib.sha256(document[0].encode()).digest())
    for i, (_, text) in enumerate(order):
        for sentence in sentences(text):
            if tuple(sentence) not in seen:
                seen.add(tuple(sentence))
                splits[{0: "valid", 1: "test"}.get(i % 20, "train")].append(sentence)
    counts = Counter(word for sentence in splits["train"] for word in sentence)
    vocab = {
        word for word, count in counts.most_common(10_000 - 2) if count > 1
    }  # <eos> and <unk> are two more
    for split, text in splits.items():
        lines = (" ".join(word if word in vocab else "<unk>" for word in sentence) for sentence in text)
        (out / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def documents() -> Iterator[tuple[str, str]]:
    """(name, text): the topics of `help()`, and each module of the standard library with a docstring."""
    with contextlib.suppress(ImportError):  # some distributions leave it out
        yield from importlib.import_module("pydoc_data.topics").topics.items()
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if apart.isdisjoint(name.parts):
            with contextlib.suppress(SyntaxError, ValueError):
                yield str(name), "\n\n".join(docstrings(ast.parse(path.read_bytes())))
    for name in sorted(sys.builtin_module_names):
        parts = vars(importlib.import_module(name)).values()
        parts = [part for part in parts if getattr(part, "__module__", name) == name]
        parts += [method for part in parts if isinstance(part, type) for method in vars(part).values()]
        texts = (
            inspect.cleandoc(part.__doc__)
            for part in parts
            if isinstance(getattr(part, "__doc__", None), str)
        )
        yield name, "\n\n".join(texts)


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions, from the outside in."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
        for child in node.body:
            yield from docstrings(child)


def sentences(text: str) -> Iterator[list[str]]:
    """The sentences of a text as words and punctuation; paragraphs that are code or tables left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.splitlines()]
        lines = [line for line in lines if line.strip("=-*~^#+| ")]  # underlines of headings
        prose = " ".join(lines)
        if any(line.startswith((">>>", "...")) for line in lines) or "::=" in prose:
            continue
        if len(re.sub(r"[^\W\d_]| ", "", prose)) > 0.15 * len(prose):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(*])", prose):
            words = re.findall(r"\d[\w.]*\b|\w+(?:'\w+)?|[^\w\s]", sentence)
            if len(words) >= 4:
                yield ["N" if word[0].isdigit() else word.lower() for word in words]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
