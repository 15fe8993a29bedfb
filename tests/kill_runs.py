"""Runs that are killed at file operations, and their ends compared with those of runs that were never killed.

    python tests/kill_runs.py 200              # so many kills, for the night; status 1 on a fault
    python tests/kill_runs.py 200 --seed 7     # others

test_kills.py has a handful of them. A moment is `before replace:3` or `after replace:3`: the process sends itself
SIGKILL before or after its third os.replace. `before save:2` is in the middle of its second torch.save. `after
all_reduce:40@1` is on rank 1. `within 0.3` is after that share of the time that the whole run has taken.
"""

import argparse
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import load, read_log, write_corpus
from runner import PRELUDE, Result, Running, run_cli, start
from test_resume_cli import EPOCHS, RUNS, SHORT, WORSENING, differences, without_clock

# MOMENT is the moment; the names of all operations go to a file of that name, from rank 0.
SABOTAGE = """
import fcntl, io, itertools, os, signal, torch, torch.distributed

moment, _, rank = MOMENT.partition("@")
mine = os.environ.get("RANK", "0") == (rank or "0")
names = open("operations", "a", buffering=1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(contents, file):
    whole = io.BytesIO()
    save(contents, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()

def watch(module, name):
    operation, calls = getattr(module, name), itertools.count(1)
    def watched(*args, **how):
        call = f"{name}:{next(calls)}"
        if mine:
            print(call, file=names)
        if mine and moment == f"before {call}":
            write_half(*args) if name == "save" else die()
        try:
            return operation(*args, **how)
        finally:
            if mine and moment == f"after {call}":
                die()
    setattr(module, name, watched)
    return operation

for name in ("replace", "rename", "fsync", "unlink", "chmod"):
    watch(os, name)
watch(fcntl, "flock")
save = watch(torch, "save")
if os.environ.get("RANK"):
    watch(torch.distributed, "all_reduce")
"""


class Case(NamedTuple):
    """A command that is killed and given again. What it writes begins with "m.pt"; what it must not change, with "a".

    prepare: makes a folder ready, out of the corpus and the folder of a trained model.
    ends_on: the last lines of stdout, which have to be the same.
    """

    flags: list[object]
    script: str = "main.py"
    prepare: Callable[[Path, Path], None] = lambda folder, base: None
    size: int = 1
    ends_on: int = 2


def copy_model(*names: str) -> Callable[[Path, Path], None]:
    """Copies the base model to these names; to "NAME.state" its state."""

    def prepare(folder: Path, base: Path) -> None:
        for name in names:
            shutil.copy(base / ("m.pt.state" if name.endswith(".state") else "m.pt"), folder / name)

    return prepare


AUTO = ["--resume", "auto"]
TUNE = [*AUTO, "--lr", 3, "--epochs", 3, "--nonmono", 2]
WORSE = ["--lr", 3000, "--epochs", 4]  # no epoch is better than the model that it starts from
ELSEWHERE = ["--resume", "a.pt", "--save", "m.pt"]
ADAM = ["--when", 1, "--checkpoint_every", 3]
TWO = ["--nonmono", 0, "--clip", 1, "--lr", 20, "--epochs", 3, "--bptt", 20]
CASES = {
    "averaging": Case([*SHORT, *RUNS["averaging LSTM"], *EPOCHS, *AUTO]),
    "two-tailed": Case([*SHORT, *RUNS["two-tailed LSTM"], *EPOCHS, *AUTO]),
    "Adam": Case([*SHORT, *RUNS["Adam QRNN"], *EPOCHS, "--epochs", 2, *ADAM, *AUTO]),
    "worsening": Case([*SHORT, *WORSENING, "--epochs", 2, *AUTO]),
    "warm start": Case([*SHORT, "--lr", 1, "--epochs", 2, *AUTO], prepare=copy_model("m.pt")),
    "elsewhere": Case([*ELSEWHERE, "--epochs", 4], prepare=copy_model("a.pt", "a.pt.state")),
    "elsewhere, no better": Case([*ELSEWHERE, *WORSE], prepare=copy_model("a.pt", "a.pt.state")),
    "finetune in place": Case(["--save", "m.pt", *TUNE], "finetune.py", copy_model("m.pt", "m.pt.state")),
    "finetune --output": Case(["--save", "a.pt", "--output", "m.pt", *TUNE], "finetune.py", copy_model("a.pt")),
    "finetune --output, no better": Case(
        ["--save", "a.pt", "--output", "m.pt", *AUTO, *WORSE], "finetune.py", copy_model("a.pt")
    ),
    "two ranks": Case([*SHORT, *TWO, "--checkpoint_every", 7, *AUTO], size=2),
    "statistics": Case(["--save", "m.pt"], "dynamiceval.py", copy_model("m.pt"), ends_on=6),
}


def make_base(folder: Path, corpus: Path) -> Path:
    """The folder of a model of two epochs."""
    folder.mkdir()
    result = run_cli("--data", corpus, *SHORT, "--lr", 1, "--epochs", 2, cwd=folder)
    assert result.status == 0, result
    return folder


def begin(case: Case, corpus: Path, folder: Path, moment: str) -> list[Running]:
    """Starts the command of a case, all ranks of it."""
    line = [f"MOMENT = {moment!r}\n{SABOTAGE}", case.script, "--data", corpus, *case.flags]
    how = {"cwd": folder, "script": PRELUDE}
    if case.size == 1:
        return [start(*line, **how)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": case.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(*line, **how, environment={name: str(x) for name, x in (shared | {"RANK": rank}).items()})
        for rank in range(case.size)
    ]


def run(case: Case, corpus: Path, folder: Path, moment: str = "", after_s: float | None = None) -> list[Result]:
    """Runs the command to its end, or to that of a kill; the results of all ranks."""
    running = begin(case, corpus, folder, moment)
    if after_s is not None:
        time.sleep(after_s)
        running[-1].kill(signal.SIGKILL)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(Running.result, running))


class Whole(NamedTuple):
    """A case that was never killed: how it ended, the time it took, and the names of its operations."""

    folder: Path
    result: Result
    seconds: float
    operations: list[str]


def run_whole(case: Case, corpus: Path, base: Path, folder: Path) -> Whole:
    """Runs a case in a new folder."""
    folder.mkdir()
    case.prepare(folder, base)
    begin_s = time.monotonic()
    first, *others = run(case, corpus, folder)
    assert {result.status for result in (first, *others)} == {0}, (first, others)
    seconds, operations = time.monotonic() - begin_s, (folder / "operations").read_text().splitlines()
    return Whole(folder, first, seconds, operations)


def contents(folder: Path) -> dict[str, Any]:
    """What the files of the model contain, without clocks, and without the note of what lay at --save at the start."""
    names = [path.name for path in folder.glob("m.pt*") if not path.name.endswith(".jsonl")]
    found = {name: without_clock(load(folder / name)) for name in sorted(names)}
    for part in found.values():
        part.get("at", {}).pop("initial_save_digest", None)
    return found


def differs(case: Case, found: Path, result: Result, whole: Whole) -> str:
    """How the end of a run that was killed differs from that of the whole run; "" if it does not."""
    if result.status or result.err:
        return f"it ends with status {result.status}: {result.err}"
    if "another run" in result.out:
        return "it waited for a process that had been killed"
    if odd := differences(contents(found), contents(whole.folder)):
        return f"other contents: {', '.join(odd[:5])}"
    lines, expected = (text.splitlines()[-case.ends_on :] for text in (result.out, whole.result.out))
    if [line for line in lines if "time:" not in line] != [line for line in expected if "time:" not in line]:
        return f"other lines: {lines} {expected}"
    if left := sorted(path.name for path in found.glob("*.tmp")):
        return f"temporary files are left: {left}"
    for path in whole.folder.glob("a.pt*"):
        if path.name != "a.pt.log.jsonl" and path.read_bytes() != (found / path.name).read_bytes():
            return f"{path.name} has changed"
    if case.script != "dynamiceval.py":
        logs = [read_log(folder / "m.pt.log.jsonl") for folder in (found, whole.folder)]
        valid = [{(e["step"], e["loss"]) for e in log if e["kind"] == "valid"} for log in logs]
        if valid[0] != valid[1]:
            return f"other losses in the log: {valid}"
    return ""


def kill(case: Case, corpus: Path, folder: Path, moment: str, whole_s: float) -> tuple[bool, str]:
    """Runs a case until it is killed; returns whether it was, and what is wrong with what is left."""
    after_s = whole_s * float(moment.split()[1]) if moment.startswith("within") else None
    results = run(case, corpus, folder, moment, after_s)
    killed = [result.status == -signal.SIGKILL for result in results]
    for result in results:
        expected = (-signal.SIGKILL, 1, 0) if any(killed) else (0,)  # 0: a rank whose training was over
        if result.status not in expected or "Traceback" in result.err or len(result.err.splitlines()) > 1:
            return any(killed), f"when killed: {result.status} {result.err}"
    left = [path.name for path in folder.glob("*.tmp")]
    if len(left) > len({name[: -len(".01234567.tmp")] for name in left}):
        return any(killed), f"several temporary files of a target are left: {left}"
    for path in folder.glob("*.pt*"):
        if not path.name.endswith((".tmp", ".jsonl")):
            load(path)
    return any(killed), ""


def try_kills(case: Case, corpus: Path, base: Path, folder: Path, whole: Whole, *moments: str) -> tuple[int, str]:
    """Kills a case at each of these moments, one after the other, and lets it end.

    Returns how often it was killed, and what is wrong.
    """
    folder.mkdir(exist_ok=True)
    case.prepare(folder, base)
    kills = 0
    for moment in moments:
        killed, fault = kill(case, corpus, folder, moment, whole.seconds)
        kills += killed
        if fault:
            return kills, fault
    first, *_ = run(case, corpus, folder)
    return kills, differs(case, folder, first, whole)


def moments_of(whole: Whole, size: int) -> list[str]:
    """All moments about the operations of a run. Of the many sums over ranks it takes some, on rank 1 too."""
    reduced = [name for name in whole.operations if name.startswith("all_reduce")]
    names = [name for name in whole.operations if name not in reduced] + reduced[::17]
    moments = [f"{when} {name}" for name in names for when in ("before", "after")]
    return moments + [f"before {name}@{rank}" for rank in range(1, size) for name in reduced[::13]]


def choose(wholes: dict[str, Whole], rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Case after case: its moments in random order until there are none left, every fourth time a random moment."""
    left = {name: moments_of(whole, CASES[name].size) for name, whole in wholes.items()}
    for moments in left.values():
        rng.shuffle(moments)
    for number in range(10**9):
        for name, moments in left.items():
            by_clock = number % 4 == 3 or not moments
            chosen = [f"within {rng.uniform(0.05, 1):.3f}" if by_clock else moments.pop()]
            if rng.random() < 0.3:  # again, early in the run that goes on
                chosen.append(rng.choice(moments_of(wholes[name], CASES[name].size)[:40]))
            yield name, chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    begin_s, faults, done, tried = time.monotonic(), [], Counter(), Counter()
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        corpus = write_corpus(place / "corpus")
        base = make_base(place / "base", corpus)
        wholes = {
            name: run_whole(CASES[name], corpus, base, place / f"whole{number}")
            for number, name in enumerate(args.cases)
        }
        total = {name: len(moments_of(whole, CASES[name].size)) for name, whole in wholes.items()}
        for number, (name, moments) in enumerate(choose(wholes, random.Random(args.seed))):
            if done.total() >= args.kills:
                break
            folder = place / f"run{number}"
            try:
                kills, fault = try_kills(CASES[name], corpus, base, folder, wholes[name], *moments)
            except Exception as error:  # a file that cannot be loaded, a run that hangs
                kills, fault = 0, f"{type(error).__name__}: {error}"
            done[name] += kills
            tried[name] += not moments[0].startswith("within")
            if fault:
                faults.append(f"{name}, {', then '.join(moments)}: {' '.join(fault.split())[:600]}")
                print(f"fault: {faults[-1]}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    for name in args.cases:
        print(f"{name:30} {done[name]:4} kills, {tried[name]:4} of {total[name]:4} moments")
    print(f"{done.total()} kills in {time.monotonic() - begin_s:.0f} s, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
