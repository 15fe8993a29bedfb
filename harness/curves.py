"""The logs of runs, read back as learning curves for plot.py.

A log can hold several runs, each of them stopped and resumed. A run becomes one curve, as if never interrupted.
"""

import json
import os
from dataclasses import dataclass, field
from typing import Any

from harness.log import ppl
from utils import UserError

SUFFIX = ".log.jsonl"
# The numbers that place a line in its run. They can be missing.
PLACES = ("step", "epoch", "batch", "batches", "ms_per_batch", "epoch_s")
LARGEST_LOSS = 300.0  # nats per token; the perplexity of a larger one leaves no room around it on an axis


@dataclass
class Point:
    """A perplexity and when it was measured: in epochs (2.5: after half of the third one) and in hours."""

    epoch: float
    hours: float
    ppl: float


@dataclass
class Curve:
    """The curve of one run."""

    name: str
    train: list[Point] = field(default_factory=list)
    valid: list[Point] = field(default_factory=list)
    switch: Point | None = None  # to averaging
    test: float | None = None  # perplexity

    @property
    def label(self) -> str:
        parts = [self.name]
        if self.valid:
            parts.append(f"valid {min(point.ppl for point in self.valid):.2f}")
        if self.test is not None:
            parts.append(f"test {self.test:.2f}")
        return parts[0] + (": " + ", ".join(parts[1:]) if parts[1:] else "")


def read_log(path: str) -> list[dict[str, Any]]:
    """The entries of a log, without lines that a full disk or a kill has cut.

    Raises:
        UserError: the log is missing or empty, has no figures, or was written by another program.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a model that main.py trained, or its log") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("kind"), str):
            for name in PLACES:
                if not is_number(entry.get(name, 0)):
                    raise UserError(f"{path}: {name!r} in line {number} is no number; give a log that main.py wrote")
            entries.append(entry)
    if not any(is_figure(entry) for entry in entries):
        problem = "has no figures yet" if lines else "is empty"
        raise UserError(f"{path}: {problem}; give the log of a run that has printed its first line")
    return entries


def is_number(value: object, most: float = 1e15) -> bool:
    """Whether the value is a number that an axis can show: finite, and at most `most` in size."""
    return isinstance(value, int | float) and -most <= value <= most


def is_figure(entry: dict[str, Any]) -> bool:
    """Whether an entry is a training or validation loss that can be drawn: finite, and with its place in the run.

    A validation in mid-epoch (--max_steps) is left out: an uninterrupted run does not have it.
    """
    needed = {"train": ("epoch", "step", "batch", "batches"), "valid": ("epoch", "step")}
    places = needed.get(entry["kind"], ("none",))
    placed = all(name in entry for name in places) and not entry.get("partial")
    return placed and is_number(entry.get("loss"), LARGEST_LOSS)


def split_runs(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs that wrote a log, one after the other, each as if it had never been interrupted.

    A "start" line begins a run (at step 0), or goes on with the last one from its step: what was logged past that
    step is logged again, and the later lines win.
    """
    runs: list[list[dict[str, Any]]] = [[]]
    for entry in entries:
        if entry["kind"] == "start":
            step = entry.get("step", 0)
            if step == 0:
                runs.append([])
            else:
                drop_past(step, runs[-1])
        runs[-1].append(entry)
    return [run for run in runs if any(is_figure(entry) for entry in run)]


def drop_past(last: int, run: list[dict[str, Any]]) -> None:
    """Removes the entries past step `last` from the end of `run`."""
    kept = []
    while run and not (is_figure(run[-1]) and run[-1]["step"] <= last):
        entry = run.pop()
        if entry.get("step", last) <= last:
            kept.append(entry)
    run.extend(reversed(kept))


def make_curve(name: str, entries: list[dict[str, Any]]) -> Curve:
    """The points of one run. Its time is the sum of its epochs' times, training and validation."""
    curve = Curve(name)
    before_s = 0.0  # of all epochs before this one
    whole_s = 0.0  # of this epoch, when it is over
    spent_s = 0.0  # of this epoch so far
    batch, epoch = 0, 0  # of the line before
    for entry in entries:
        kind = entry["kind"]
        if kind == "test" and is_number(entry.get("loss")):
            curve.test = ppl(entry["loss"])
        if kind == "averaging" and curve.valid:
            curve.switch = curve.valid[-1]
        if kind != "start" and not is_figure(entry):
            continue
        if entry.get("epoch", 0) != epoch:
            before_s, whole_s, spent_s = before_s + whole_s, 0.0, 0.0
            batch, epoch = 0, entry.get("epoch", 0)
        if kind == "start":
            batch = entry.get("batch", 0)
        elif kind == "train":
            spent_s += entry.get("ms_per_batch", 0.0) / 1000 * max(0, entry["batch"] - batch)
            batch = entry["batch"]
            at = epoch - 1 + min(1.0, batch / max(1, entry["batches"]))
            curve.train.append(Point(at, (before_s + spent_s) / 3600, ppl(entry["loss"])))
        else:
            whole_s = entry.get("epoch_s", spent_s)
            curve.valid.append(Point(epoch, (before_s + whole_s) / 3600, ppl(entry["loss"])))
    return curve


def read_curves(paths: list[str]) -> list[Curve]:
    """All runs in the logs of these models, each with another name."""
    curves = []
    logs = [path if path.endswith(SUFFIX) else path + SUFFIX for path in paths]
    short = [os.path.basename(log.removesuffix(SUFFIX)).removesuffix(".pt") for log in logs]
    for log, name in zip(logs, short, strict=True):
        name = log.removesuffix(SUFFIX).removesuffix(".pt") if short.count(name) > 1 else name
        for i, run in enumerate(split_runs(read_log(log))):
            tuned = any(entry.get("script") == "finetune.py" for entry in run)
            suffix = ", fine-tuned" if tuned else f", run {i + 1}" if i else ""
            curves.append(make_curve(name + suffix, run))
    return curves
