"""Draw the learning curves of one or several runs into a picture.

    python plot.py PTB.pt                                       # -> PTB.pt.png
    python plot.py LSTM.pt QRNN.pt --out curves.png             # or .pdf, .svg
    python plot.py old/PTB.pt.log.jsonl PTB.pt --out curves.png

Training and validation perplexity over epochs and over time, from the logs that lie beside the models
(SAVE.log.jsonl). Stars mark the best validation, dashed lines the switch to averaging.
"""

import io
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from harness import ArgumentParser, check_writable, ppl, run_script, write
from utils import UserError

SUFFIX = ".log.jsonl"
# Numbers that say where in a run a line belongs. They may be missing.
PLACES = ("step", "epoch", "batch", "batches", "ms_per_batch", "epoch_s")
LARGEST_LOSS = 300.0  # nats per token; the perplexity of a larger one leaves no room around it on an axis
# Okabe and Ito's palette: told apart by colour-blind eyes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass
class Point:
    """A perplexity and where it was measured: in epochs (2.5: half of the third is done) and in hours."""

    epoch: float
    hours: float
    ppl: float


@dataclass
class Curve:
    """What is drawn of one run."""

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


def parse_args() -> dict[str, Any]:
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a model, or its .log.jsonl")
    parser.add_argument("--out", help="the picture: .png, .pdf or .svg (default: the first RUN's name + .png)")
    return vars(parser.parse_args())


def read_log(path: str) -> list[dict[str, Any]]:
    """The entries of a log; lines that a full disk or a kill cut short are passed over.

    Raises:
        UserError: it is missing or empty, has no figures, or is another program's.
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
                    raise UserError(
                        f"{path}: {name!r} in line {number} is no number; give a log that main.py wrote"
                    )
            entries.append(entry)
    if not any(is_figure(entry) for entry in entries):
        what = "has no figures yet" if lines else "is empty"
        raise UserError(f"{path}: {what}; give the log of a run that has printed its first line")
    return entries


def is_number(value: object, most: float = 1e15) -> bool:
    """Whether it is one that an axis can show: finite, of no more than `most` either way."""
    return isinstance(value, int | float) and -most <= value <= most


def is_figure(entry: dict[str, Any]) -> bool:
    """Whether it is a training or validation loss that can be drawn: finite, and with its place in the run.

    A validation in mid-epoch (--max_steps) is none: the whole run would not have had it.
    """
    needed = {"train": ("epoch", "step", "batch", "batches"), "valid": ("epoch", "step")}
    places = needed.get(entry["kind"], ("none",))
    placed = all(name in entry for name in places) and not entry.get("partial")
    return placed and is_number(entry.get("loss"), LARGEST_LOSS)


def split_runs(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs that wrote a log, one after the other, each as if it had never been interrupted.

    A run that goes on from an older state repeats a stretch: the later lines win. A "start" line says where
    an invocation goes on; a log from before there was one shows it by a step that is smaller than the last.
    """
    runs: list[list[dict[str, Any]]] = [[]]
    steps: list[int] = []  # of the figures of the last run: they only grow
    for entry in entries:
        is_start, step = entry["kind"] == "start", entry.get("step")
        if steps and step is not None and (is_start or step < steps[-1]):
            if step == 0 if is_start else step <= steps[0]:
                runs.append([])
                steps = []
            else:
                last = step if is_start else step - 1
                drop_past(last, runs[-1])
                while steps and steps[-1] > last:
                    steps.pop()
        runs[-1].append(entry)
        if is_figure(entry):
            steps.append(step)
    return [run for run in runs if any(is_figure(entry) for entry in run)]


def drop_past(last: int, run: list[dict[str, Any]]) -> None:
    """Takes what was logged past step `last` from the end of `run`."""
    kept = []
    while run and not (is_figure(run[-1]) and run[-1]["step"] <= last):
        entry = run.pop()
        if entry.get("step", last) <= last:
            kept.append(entry)
    run.extend(reversed(kept))


def make_curve(name: str, entries: list[dict[str, Any]]) -> Curve:
    """The points of one run; its clock is the sum of what the epochs took, in training and validation."""
    curve = Curve(name)
    before_s = 0.0  # all epochs before this one
    whole_s = 0.0  # this epoch, once it is over
    spent_s = 0.0  # in this epoch so far
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
    """All runs in the logs of these models, under names that differ."""
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


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within the limits, five to a dozen of them: evenly spread on a log scale if possible."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        values = [step * 10.0**power for power in powers for step in steps]
        found = [value for value in values if low <= value <= high]
        if len(found) >= 5:
            return found[:: math.ceil(len(found) / 14)]
    size = 10 ** math.floor(math.log10((high - low) / 5))
    step = max(size * factor for factor in (1, 2, 5) if size * factor <= (high - low) / 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw(curves: list[Curve], format: str) -> bytes:
    """The picture's bytes: perplexity over epochs on the left, over time on the right.

    Raises:
        UserError: Matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import patheffects, pyplot
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
    except ImportError:
        raise UserError("plot.py: Matplotlib is not installed; pip install matplotlib") from None

    pyplot.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6.2), sharey=True, layout="constrained")
    longest = max((point.hours for curve in curves for point in curve.train + curve.valid), default=0.0)
    unit, factor = ("hours", 1) if longest >= 1 else ("minutes", 60)
    outline = [patheffects.withStroke(linewidth=3, foreground="white")]

    for panel, by_epoch in zip(panels, (True, False), strict=True):
        for i, curve in enumerate(curves):
            colour = COLOURS[i % len(COLOURS)]

            def x(point: Point, by_epoch: bool = by_epoch) -> float:
                return point.epoch if by_epoch else point.hours * factor

            train, valid = ([(x(p), p.ppl) for p in points] for points in (curve.train, curve.valid))
            if train:
                panel.plot(*zip(*train, strict=True), color=colour, linewidth=1.1, alpha=0.45)
            if valid:
                dots = {"marker": "o", "markersize": 4} if len(valid) <= 40 else {}
                panel.plot(*zip(*valid, strict=True), color=colour, linewidth=2.6, **dots)
                best = min(curve.valid, key=lambda point: point.ppl)
                star = {"marker": "*", "markersize": 19, "markeredgecolor": "white", "zorder": 5}
                panel.plot(x(best), best.ppl, color=colour, **star)
                above = 20 if i % 2 == 0 else -20  # points: of two bests on one spot both are read
                panel.annotate(
                    f"{best.ppl:.2f}", (x(best), best.ppl), xytext=(0, above), textcoords="offset points",
                    color=colour, ha="center", va="center", weight="bold", path_effects=outline, zorder=6,
                )  # fmt: skip
            if curve.switch:
                panel.axvline(x(curve.switch), color=colour, linewidth=1.4, linestyle=(0, (5, 4)), alpha=0.8)
        panel.set_xlabel("epochs" if by_epoch else unit)
        panel.set_xlim(left=0)
        panel.margins(x=0.08)
        panel.grid(axis="y", color="#dddddd", linewidth=0.8)
        panel.set_axisbelow(True)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))

    low, high = limits(curves)
    panels[0].set_yscale("log")
    panels[0].set_ylim(low, high)
    panels[0].yaxis.set_major_locator(FixedLocator(ticks(low, high)))
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panels[0].set_ylabel("perplexity")

    grey = "#555555"
    kinds = [
        Line2D([], [], color=grey, linewidth=2.6, marker="o", markersize=4, label="validation"),
        Line2D([], [], color=grey, linewidth=1.1, alpha=0.6, label="training, with dropout"),
        Line2D([], [], color=grey, linestyle="", marker="*", markersize=15, label="best validation"),
    ]
    if any(curve.switch for curve in curves):
        dashed = Line2D([], [], color=grey, linewidth=1.4, linestyle=(0, (5, 4)), label="averaging starts")
        kinds.append(dashed)
    runs = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=5, label=curve.label)
        for i, curve in enumerate(curves)
    ]
    panels[1].legend(handles=runs, loc="upper right", framealpha=0.9, edgecolor="none")
    figure.legend(handles=kinds, loc="outside lower center", ncols=len(kinds), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format=format, dpi=160)
    pyplot.close(figure)
    return picture.getvalue()


def limits(curves: list[Curve]) -> tuple[float, float]:
    """Of the perplexity axis: all of the validations; of the first, steep training losses not the highest."""
    valid = [point.ppl for curve in curves for point in curve.valid]
    train = sorted(point.ppl for curve in curves for point in curve.train)
    low = min(valid + train)
    high = max(valid + train[: math.ceil(0.97 * len(train))])
    room = (high / low) ** 0.08 if high > low else 1.1
    return low / room, high * room


def main() -> int:
    args = parse_args()
    out = args.get("out") or args["runs"][0].removesuffix(SUFFIX) + ".png"
    format = os.path.splitext(out)[1].lstrip(".").lower()
    if format not in ("png", "pdf", "svg"):
        raise UserError(f"--out {out}: is no name of a picture; let it end in .png, .pdf or .svg")
    check_writable(out, "--out")
    picture = draw(read_curves(args["runs"]), format)
    write(out, lambda file: file.write(picture))
    print(f"| curves written to {out}")
    return 0


if __name__ == "__main__":
    run_script(main)
