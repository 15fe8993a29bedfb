"""Fetches the corpora: `./getdata.sh` runs this.

    ./getdata.sh                      Penn Treebank and WikiText-2
    ./getdata.sh pydocs               English from Python's documentation; needs no network
    ./getdata.sh all                  every corpus: CORPORA
    ./getdata.sh --check [NAME...]    compare what is there with the known counts and checksums

A corpus NAME comes to ./data/NAME/{train,valid,test}.txt, all of it or nothing. One that is there already is not
changed. When a download breaks off, the same command goes on where it stopped.

Environment:
    AWD_MIRROR=URL    fetch from this address only, with the same file names: URL/ptb.train.txt,
                      URL/wikitext-2-v1.zip, ... (all addresses are in corpus/corpora.py)
    AWD_CHECKS=FILE   JSON that replaces the known counts and checksums, for a mirror with other text
"""

import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tarfile
import time
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from corpus.corpora import CORPORA, SPLITS

DAMAGED = (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
TRIES = 9


def tell(text: str) -> None:
    print(f"getdata.sh: {text}", file=sys.stderr, flush=True)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def download(url: str, part: Path) -> None:
    """Brings the rest of a file, from where `part` ends.

    Raises:
        OSError, HTTPException: the connection broke, or there is no such file.
    """
    headers = {"User-Agent": "getdata.sh", **({"Range": f"bytes={size(part)}-"} if size(part) else {})}
    with urlopen(Request(url, headers=headers), timeout=60) as response:
        with open(part, "ab" if response.status == 206 else "wb") as file:  # 200: it sends the whole file again
            shutil.copyfileobj(response, file)
        if response.length:  # reading ends without an error when the server hangs up
            raise ConnectionError(f"{response.length} bytes are missing")


def fetch(url: str, folder: Path) -> bool:
    """Brings a file into `folder`, whole; goes on after a break, and starts again if the server refuses that."""
    name, mirror = url.rpartition("/")[2], os.environ.get("AWD_MIRROR")
    if url.startswith("hf:"):
        return not mirror and fetch_dataset(url.removeprefix("hf:"), folder)
    file, part = folder / name, folder / f"{name}.part"
    if file.exists():
        return True
    url = f"{mirror.rstrip('/')}/{name}" if mirror else url
    folder.mkdir(parents=True, exist_ok=True)
    tell(f"fetching {url}")
    for number in range(1, TRIES + 1):
        before = size(part)
        try:
            download(url, part)
            part.rename(file)
            return True
        except (OSError, HTTPException) as error:
            if isinstance(error, HTTPError) and error.code == 416 and before:  # nothing comes after this byte
                part.unlink()
            elif size(part) > before:
                tell(f"the connection broke after {size(part)} bytes; going on from there (try {number} of {TRIES})")
                time.sleep(1)
            else:
                tell(f"{url}: {getattr(error, 'reason', None) or error}")
                break
    return False


def fetch_dataset(place: str, folder: Path) -> bool:
    """Brings the parquet files of OWNER/NAME/FOLDER from Hugging Face, if the two packages for it are installed."""
    try:
        hub = importlib.import_module("huggingface_hub")
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        tell(f"{place} on Hugging Face: needs {error.name}; python -m pip install huggingface_hub pyarrow")
        return False
    dataset, _, part = place.rpartition("/")
    tell(f"fetching {place} from Hugging Face")
    try:
        hub.snapshot_download(dataset, repo_type="dataset", allow_patterns=f"{part}/*.parquet", local_dir=str(folder))
    except Exception as error:  # of many classes
        tell(f"{place} on Hugging Face: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return False
    return True


def make(name: str, out: Path, folder: Path) -> bool:
    """Makes a corpus from the download, or from its base; returns whether its counts and checksums are right."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        CORPORA[name].convert(out, folder)
        return check(name, out)
    except DAMAGED as error:
        tell(f"{name}: {error}")
        return False


def is_there(name: str) -> bool:
    return all(Path("data", name, f"{split}.txt").is_file() for split in SPLITS)


def get(name: str) -> bool:
    """Fetches, makes and checks a corpus in data/.fetch/NAME; only then it appears in data/NAME."""
    row, target, work = CORPORA[name], Path("data", name), Path("data", ".fetch", name)
    if is_there(name):
        print(f"{name}: {target} is there")
        return True
    if row.base and not get(row.base):
        return False
    for number, addresses in enumerate(row.sources or [[]], start=1):
        folder = Path("data", row.base) if row.base else work / str(number)
        if not all(fetch(url, folder) for url in addresses):
            continue
        if make(name, work / "out", folder):
            break
        if addresses:
            source = os.environ.get("AWD_MIRROR") or addresses[0].rpartition("/")[0]
            tell(f"{name}: the files from {source} are damaged or not the corpus; they were removed")
            shutil.rmtree(folder)
    else:
        tell(
            f"{name}: no source gave it; run ./getdata.sh {name} again later (it goes on where it stopped), "
            f"set AWD_MIRROR, or put train.txt, valid.txt, test.txt into data/{name}"
        )
        return False
    target.mkdir(parents=True, exist_ok=True)  # other files may lie there: they stay
    for file in ("SHA256SUMS", "test.txt", "valid.txt", "train.txt"):  # with the last one the corpus is complete
        os.replace(work / "out" / file, target / file)
    shutil.rmtree(work)
    if not any(work.parent.iterdir()):
        work.parent.rmdir()
    print(f"{name}: {target} is complete", flush=True)
    return True


def check(name: str, folder: Path) -> bool:
    """Prints a corpus's counts beside the known ones, and whether its checksums are right; False if any is wrong.

    The first time it writes SHA256SUMS to the folder. Later checks compare the files with it.
    """
    known = CORPORA[name].checks
    if os.environ.get("AWD_CHECKS"):
        known = json.loads(Path(os.environ["AWD_CHECKS"]).read_text()).get(name, {})
    sums = folder / "SHA256SUMS"
    recorded: dict[str, str] = {}
    if sums.exists():
        recorded = {line.split()[1]: line.split()[0] for line in sums.read_text().splitlines()}
    sound, types, digests = True, {"<eos>"}, {}
    print(f"{name:12} {'tokens':>12} {'expected':>12}  sha256")
    for split in SPLITS:
        tokens, digest = count(folder / f"{split}.txt", types, not CORPORA[name].bytewise)
        digests[f"{split}.txt"] = digest
        expected, known_digest = known.get(split, (None, None))
        known_digest = known_digest or recorded.get(f"{split}.txt")
        if known_digest and known_digest.startswith("git:"):
            digest = git_id(folder / f"{split}.txt")
        right = expected in (None, tokens) and known_digest in (None, digest)
        verdict = f"WRONG: {digest}" if not right else "ok" if known_digest else "not known"
        print(f"  {split:10} {tokens:12,} {f'{expected:,}' if expected else '-':>12}  {verdict}")
        sound &= right
    expected = known.get("types")
    sound &= expected in (None, len(types))
    print(f"  {'types':10} {len(types):12,} {f'{expected:,}' if expected else '-':>12}")
    if sound and not recorded:
        sums.write_text("".join(f"{digest}  {file}\n" for file, digest in digests.items()))
    return sound


def count(path: Path, types: set[str], ends_last_line: bool) -> tuple[int, str]:
    """Tokens of a file, one per line for its end, and its sha256; adds its words to `types`."""
    tokens, digest = 0, hashlib.sha256()
    with open(path, "rb") as file:
        for line in file:
            words = line.decode().split()
            types.update(words)
            digest.update(line)
            tokens += len(words) + (ends_last_line or line.endswith(b"\n"))
    return tokens, digest.hexdigest()


def git_id(path: Path) -> str:
    """The id that git gives a file of these contents."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"git:{digest.hexdigest()}"


def check_and_tell(name: str) -> bool:
    """Checks a corpus in ./data, and says how to mend it."""
    if not is_there(name):
        tell(f"{name}: not complete in data/{name}; run ./getdata.sh {name}")
        return False
    sound = check(name, Path("data", name))
    if not sound:
        tell(f"{name}: data/{name} is not right; remove it and run ./getdata.sh {name}")
    return sound


def stop(*_: object) -> None:
    """Ends the program at SIGTERM."""
    tell("stopped; the same command goes on from here")
    sys.exit(143)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print((__doc__ or "").partition("\n\n")[2].replace("CORPORA", " ".join(CORPORA)).strip("\n"))
        return 0
    names = [argument for argument in arguments if argument != "--check"]
    for name in names:
        if name not in (*CORPORA, "all"):
            tell(f"{name}: no such corpus; there are: {' '.join(CORPORA)}, all")
            return 2
    names = list(CORPORA) if "all" in names else names
    signal.signal(signal.SIGTERM, stop)
    try:
        if "--check" not in arguments:
            return 0 if all([get(name) for name in names or ["penn", "wikitext-2"]]) else 1
        names = names or [name for name in CORPORA if is_there(name)]
        if not names:
            tell("no corpus is in ./data; run ./getdata.sh")
        return 0 if names and all([check_and_tell(name) for name in names]) else 1
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on from here")
        return 130
    except OSError as error:
        tell(f"{error.filename or 'data'}: {error.strerror or error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
