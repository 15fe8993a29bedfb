"""What was measured: every figure in a table is that of a log, and every log's run can be run again."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import read_log
from runner import ENVIRONMENT, ROOT, WALL_S
from toys import call, error_line

from harness.flags import FLAGS, MODEL, OPTIMISATION, REGULARISATION, RUN, ArgumentParser, resolve_args

RESULTS = ROOT / "results"
ROWS = re.findall(r"^ +([a-z-]+)\) flags=", (RESULTS / "run.sh").read_text(), re.MULTILINE)
LOGS = {path.name.removesuffix(".log.jsonl"): path for path in sorted(RESULTS.glob("*.log.jsonl"))}
PAGES = [ROOT / "README.md", RESULTS / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVALUATIONS = {
    "plain": {"kind": "pointer", "lambdasm": 0.0},
    "pointer": {"kind": "pointer"},
    "dynamic evaluation": {"kind": "dynamic evaluation", "pointer": None},
    "both": {"kind": "dynamic evaluation"},
}


def last(log, figure="ppl", **wanted):
    """The figure of the last record that has all that is wanted."""
    return [record[figure] for record in log if wanted.items() <= record.items()][-1]


def logged(name, column):
    """The log's figures for a column of a table: [validation, test], or one alone; None: it has none."""
    if column.startswith("seed "):
        seed = column.removeprefix("seed ")
        name, column = name if seed == "141" else f"{name}-seed{seed}", "plain"
    log = read_log(LOGS[name])
    if column in EVALUATIONS:
        wanted = EVALUATIONS[column]
        if column == "pointer":
            log = [record for record in log if record.get("lambdasm")]
        if column == "both":
            log = [record for record in log if record.get("pointer")]
        return [last(log, split=split, **wanted) for split in ("val", "test")]
    if column == "bits per character":
        return [min(record["bpc"] for record in log if record["kind"] == "valid"), last(log, "bpc", kind="test")]
    if column.isdigit():
        return [last(log, kind="valid", epoch=int(column))]
    return [last(log, kind="test")] if column == "test" else None


def figures(path):
    """(row's name, column, text) of all cells that quote a log: rows that begin with a log's name in backticks."""
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        name = re.match(r"`([a-z0-9-]+)`", cells[0]) if cells else None
        if name and name[1] in LOGS:
            for column, text in zip(header, cells, strict=True):
                if text and logged(name[1], column.removeprefix("cache ")):
                    yield name[1], column.removeprefix("cache "), text
        elif cells and not set(line) <= set("|-: "):
            header = cells


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_figures_in_the_tables_of_a_page_are_the_logs(page):
    wrong = []
    for name, column, text in figures(page):
        digits = len(text.split(".")[-1])
        expected = [f"{value:.{digits}f}" for value in logged(name, column)]
        wrong += [(name, column, text, expected)] * (text.split(" / ") != expected)
    assert not wrong


@pytest.mark.parametrize(
    ("page", "names"),
    [(PAGES[0], {"hour-wide", "hour", "ten"}), (PAGES[1], {"sprint", "hour-wide", "hour", "ten", "base", "melis"})],
)
def test_the_tables_are_found(page, names):
    """Else the test above would pass by finding nothing."""
    found = list(figures(page))
    assert names <= {name for name, *_ in found}
    assert {"plain", "pointer", "dynamic evaluation", "both"} <= {column for _, column, _ in found}


def test_the_first_words_of_the_readme_quote_a_log():
    """Each perplexity there is one of `sprint` or `hour-wide` on the test text, or Zaremba's."""
    intro = PAGES[0].read_text(encoding="utf-8").partition("\n## ")[0]
    found = set(re.findall(r"\b\d+\.\d\b", intro))
    assert found
    columns = ("plain", "pointer", "dynamic evaluation")
    ours = [last(read_log(LOGS["sprint"]), kind="test"), *(logged("hour-wide", column)[1] for column in columns)]
    assert found <= {"78.4", *(f"{value:.1f}" for value in ours)}


def test_every_log_has_a_row_that_runs_again():
    """The name of a log may end in a rate, a seed, a processor or a precision."""
    assert {re.sub(r"-\d+(e-\d)?$|-seed\d+$|-(xeon|h100|bf16)$", "", name) for name in LOGS} <= set(ROWS)


def test_another_name_is_refused_with_all_there_are():
    end = subprocess.run(["bash", RESULTS / "run.sh", "none"], capture_output=True, text=True, timeout=WALL_S)
    assert end.returncode == 2
    assert set(ROWS) <= set(re.findall("[a-z-]+", end.stderr))


def run_row(folder, name, models, seed=""):
    """`run.sh name` with these models trained, by a `python` that only writes down what it is called with."""
    for corpus in ("penn", "pennchar"):
        (folder / "data" / corpus).mkdir(parents=True)
        (folder / "data" / corpus / "test.txt").touch()
    for part in ("results", "runs"):
        (folder / part).mkdir()
    for model in models:
        (folder / "runs" / f"{model}.pt").touch()
    script = folder / "results" / "run.sh"
    script.write_text((RESULTS / "run.sh").read_text())
    python = folder / "python"
    fastest = '[ "$1" != bench.py ] || { echo "--graphs"; exit; }'
    python.write_text(f'#!/bin/sh\necho "$@" >> calls\n{fastest}\necho "| best on val: --theta 1.4"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SEED": seed}
    return subprocess.run(["bash", script, name], env=environment, capture_output=True, text=True, timeout=WALL_S)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_gives_flags_that_the_scripts_take(name, tmp_path, capsys):
    assert run_row(tmp_path, name, models=ROWS).returncode == 0
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    choice = [call for call in calls if call[0] == "bench.py"]
    (training, *flags), *evaluations = [call for call in calls if call not in choice]
    assert ("--graphs" in flags) == bool(choice) == name.startswith("ptb-")
    if name == "ptb-qrnn":  # trains up to the last epoch that is known, compares, goes on
        assert flags[-4:] == ["--epochs", "31", "--resume", "auto"]
        known = ["runs/ptb-qrnn.pt.log.jsonl", "results/ptb-qrnn-h100.log.jsonl", "5", "10", "31"]
        assert evaluations.pop(0) == ["results/check.py", *known]
        training, *flags = evaluations.pop(0)
        assert flags[-5:] == ["--seed", "9001", "--graphs", "--resume", "auto"]
    if training == "finetune.py":
        parser = ArgumentParser("", RUN, MODEL, REGULARISATION, OPTIMISATION)
        parser.add_argument("--output")
        args = parser.parse_args(flags)
        assert (args.output, args.resume) == (f"runs/{name}.pt", "auto")
        assert args.save.removeprefix("runs/").removesuffix(".pt") in ROWS
        del args.output
    else:
        assert training == "main.py"
        args = ArgumentParser("", *FLAGS).parse_args(flags)
        seed = 9001 if name == "ptb-qrnn" else 141  # as published
        assert (args.save, args.resume, args.seed) == (f"runs/{name}.pt", "auto", seed)
    resolve_args({**vars(args), "resume": ""}, {})  # of a new run; refuses a flag that does nothing
    for script, *flags in evaluations:
        assert call(importlib.import_module(script.removesuffix(".py")), *flags) == 2
        assert f"runs/{name}.pt: No such file" in error_line(capsys)  # all flags were taken
        assert flags[:4] == ["--data", args.data, "--save", f"runs/{name}.pt"]


def test_a_fine_tuning_without_its_model_says_what_to_run_first(tmp_path):
    end = run_row(tmp_path, "split-tuned", models=())
    assert end.returncode == 2
    assert "'split'" in end.stderr


@pytest.mark.parametrize("name", ["base", "split-tuned"])
def test_another_seed_has_models_of_its_own(name, tmp_path):
    """What it goes on from is that seed's, too."""
    assert run_row(tmp_path, name, ["split-seed142"], seed="142").returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert set(re.findall(r"runs/(\S+)\.pt", calls)) <= {f"{name}-seed142", "split-seed142"}
    assert f"runs/{name}-seed142.pt" in calls
    assert "--seed 142" in calls or name == "split-tuned"  # which has the seed from its model


def test_a_published_run_from_end_to_end(corpus, tmp_path):
    """At toy sizes on the CPU: training, fine-tuning, and the cache pointer of both; started again, it goes on."""
    for name in ("bench.py", "main.py", "finetune.py", "pointer.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for folder in ("results", "data", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "penn").symlink_to(corpus)
    script = shutil.copy(RESULTS / "run.sh", tmp_path / "results")
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("ptb-qrnn", "ptb-qrnn-tuned"):
        command = ["bash", script, name, "--tiny"]
        end = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WALL_S)
        assert end.returncode == 0, end.stderr
        kinds = [record["kind"] for record in read_log(tmp_path / "runs" / f"tiny-{name}.pt.log.jsonl")]
        assert kinds.count("valid") == 3
        assert kinds.count("test") == 1
        assert kinds.count("pointer") == 4


@pytest.mark.parametrize(
    ("change", "status", "said"), [(1.09, 0, ""), (1.11, 1, "10% away"), (0.89, 1, "10% away"), (None, 1, "epoch 10")]
)
def test_a_run_is_compared_with_an_earlier_log(change, status, said, tmp_path):
    """Its last epoch is `change` times what is known; None: it is not there yet."""
    known, log = tmp_path / "known.jsonl", tmp_path / "log.jsonl"
    rows = [{"kind": "start"}, {"kind": "valid", "epoch": 5, "ppl": 100.0}, {"kind": "valid", "epoch": 10, "ppl": 80.0}]
    known.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rows = rows[:2] + ([{**rows[2], "ppl": 80.0 * change}] if change else [])
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [sys.executable, RESULTS / "check.py", log, known, "5", "10"]
    end = subprocess.run(command, capture_output=True, text=True, timeout=WALL_S)
    assert end.returncode == status
    assert said in end.stderr
    assert len(end.stdout.splitlines()) == (2 if change else 1)
