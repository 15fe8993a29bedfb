"""Draw the learning curves of one or several runs, or the surprisal of a sentence, into a picture.

    python plot.py PTB.pt                                       # -> PTB.pt.png
    python plot.py LSTM.pt QRNN.pt --out curves.png             # or .pdf, .svg
    python plot.py old/PTB.pt.log.jsonl PTB.pt --out curves.png
    python plot.py --surprisal tokens.tsv --line 3              # what score.py --tokens or --words wrote

Training and validation perplexity over epochs and over time, from the logs that lie beside the models
(SAVE.log.jsonl). Stars mark the best validation, dashed lines the switch to averaging.
"""

import csv
import io
import math
import os
import warnings
from typing import Any, NamedTuple

from corpus.codec import SPACE, byte_table
from corpus.text import read_lines
from harness.curves import SUFFIX, Curve, Point, read_curves
from harness.files import check_writable, write
from harness.flags import COUNT, SWITCH, ArgumentParser, Flag
from harness.script import run_script
from utils import UserError

# Okabe and Ito's palette, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BYTES = byte_table()


class Bar(NamedTuple):
    """A token or word: its surprisal, and the entropy before it if the file has it, in the file's unit."""

    name: str
    surprisal: float
    entropy: float | None


def as_text(token: str) -> str:
    """A token without its marks: a byte-level piece (GPT-2's) as the text of its bytes, `▁` as a space.

    A space at the edge is left out, a token that is nothing else becomes `␣`. Part of a character stays as it is.
    """
    if all(character in BYTES for character in token):
        text = bytes(map(BYTES.__getitem__, token)).decode("utf-8", "replace")
        token = text if text.isprintable() and "\ufffd" not in text else token
    return token.replace(SPACE, " ").strip() or "␣"


def read_surprisal(path: str, line: int) -> list[Bar]:
    """The rows of one line of text from a TSV that score.py wrote.

    Raises:
        UserError: it is another file, or has no such line.
    """
    rows = csv.DictReader(read_lines(path), delimiter="\t")
    bars, last = [], "0"
    try:
        columns = rows.fieldnames or ()
        name = "word" if "word" in columns else "token"
        if not {"line", name, "surprisal"} <= set(columns):
            raise UserError(f"{path}: is no output of score.py --tokens or --words: its first line is another header")
        for row in rows:
            last = row["line"]
            entropy = float(row["entropy"]) if "entropy" in columns else None
            bar = Bar(row[name] if name == "word" else as_text(row[name]), float(row["surprisal"]), entropy)
            if last == str(line):
                bars.append(bar)
    except (TypeError, ValueError, csv.Error):  # None stands for a column that is missing
        place = f"{path}, line {max(1, rows.line_num)}"
        raise UserError(f"{place}: has not the columns that the first line says; write it by score.py again") from None
    if not bars:
        raise UserError(f"--line {line}: {path} has only the lines up to {last}; give one of them")
    return bars


def ticks(low: float, high: float) -> list[float]:
    """Five to a dozen round numbers within the limits, evenly spread on a log scale if possible."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        values = [step * 10.0**power for power in powers for step in steps]
        inside = [value for value in values if low <= value <= high]
        if len(inside) >= 5:
            return inside[:: math.ceil(len(inside) / 14)]
    size = 10 ** math.floor(math.log10((high - low) / 5))
    step = max(size * factor for factor in (1, 2, 5) if size * factor <= (high - low) / 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def import_pyplot() -> Any:
    """Matplotlib, without a screen; imported only when it is needed.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("plot.py: Matplotlib is not installed; pip install matplotlib") from None
    pyplot.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def save_picture(pyplot: Any, figure: Any, format: str) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # about characters that the font lacks
        figure.savefig(picture, format=format, dpi=160)
    pyplot.close(figure)
    return picture.getvalue()


def draw_surprisal(bars: list[Bar], format: str, unit: str) -> bytes:
    """The bytes of the picture: a bar per word, a dot for the entropy before it."""
    pyplot = import_pyplot()
    figure, panel = pyplot.subplots(figsize=(max(6.0, 0.62 * len(bars) + 1.5), 5), layout="constrained")
    places = range(len(bars))
    panel.bar(places, [bar.surprisal for bar in bars], width=0.72, color=COLOURS[0], label="surprisal")
    if bars[0].entropy is not None:
        dots = {"marker": "D", "markersize": 6, "markeredgecolor": "white", "linestyle": "", "color": COLOURS[1]}
        panel.plot(places, [bar.entropy for bar in bars], label="entropy before it", **dots)
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    names = [bar.name for bar in bars]
    panel.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
    panel.set_xlim(-0.6, len(bars) - 0.4)
    panel.set_ylabel(unit)
    panel.grid(axis="y", color="#dddddd", linewidth=0.8)
    panel.set_axisbelow(True)
    return save_picture(pyplot, figure, format)


def draw(curves: list[Curve], format: str) -> bytes:
    """The bytes of the picture: perplexity over epochs on the left, over time on the right."""
    pyplot = import_pyplot()
    from matplotlib import patheffects
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

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
                if len(curves) <= 2:  # more labels would cover each other; the legend has all figures
                    above = 20 if i == 0 else -20  # points, so that two labels on one spot can be read
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
    return save_picture(pyplot, figure, format)


def limits(curves: list[Curve]) -> tuple[float, float]:
    """The limits of the perplexity axis: all validations, and all training losses but the highest 3 %."""
    valid = [point.ppl for curve in curves for point in curve.valid]
    train = sorted(point.ppl for curve in curves for point in curve.train)
    low = min(valid + train)
    high = max(valid + train[: math.ceil(0.97 * len(train))])
    room = (high / low) ** 0.08 if high > low else 1.1
    return low / room, high * room


PICTURE = [
    Flag("runs", {"nargs": "*", "metavar": "RUN"}, None, "a model, or its .log.jsonl"),
    Flag("--surprisal", {"metavar": "TSV"}, None, "draw the surprisal of a line instead, from the output of score.py "
         "--tokens or --words"),
    Flag("--line", COUNT, 1, "number of that line in the text"),
    Flag("--nats", SWITCH, False, "the figures of TSV are in nats (default: in bits)"),
    Flag("--out", {}, None, "the picture: .png, .pdf or .svg (default: the first RUN's or the TSV's name + .png)"),
]  # fmt: skip


def main() -> int:
    parser = ArgumentParser(__doc__)
    parser.add_flags("picture", PICTURE)
    args = parser.parse_all(PICTURE)
    if bool(args.runs) == bool(args.surprisal):
        raise UserError("RUN, --surprisal TSV: give one of them (see --help)")
    out = args.out or (args.surprisal or args.runs[0].removesuffix(SUFFIX)) + ".png"
    format = os.path.splitext(out)[1].lstrip(".").lower()
    if format not in ("png", "pdf", "svg"):
        raise UserError(f"--out {out}: is no name of a picture; let it end in .png, .pdf or .svg")
    check_writable(out, "--out")
    if args.surprisal:
        bars, subject = read_surprisal(args.surprisal, args.line), "surprisal"
        picture = draw_surprisal(bars, format, "nats" if args.nats else "bits")
    else:
        picture, subject = draw(read_curves(args.runs), format), "curves"
    write(out, lambda file: file.write(picture))
    print(f"| {subject} written to {out}")
    return 0


if __name__ == "__main__":
    run_script(main)
