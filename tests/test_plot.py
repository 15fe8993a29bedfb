"""plot.py: what it reads out of logs, however the runs were cut up, and the picture that it leaves."""

import csv
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import SMALL
from runner import Result, assert_refused, run_cli
from toys import call, error_line

import plot
from harness.curves import make_curve, read_curves, read_log, split_runs
from plot import limits, ticks


def train(step: int, epoch: int = 1, loss: float = 5.0, ms: float = 1000.0, batches: int = 10) -> dict:
    batch = step - (epoch - 1) * batches
    return {"kind": "train", "epoch": epoch, "batch": batch, "batches": batches, "step": step,
            "ms_per_batch": ms, "loss": loss}  # fmt: skip


def valid(epoch: int, loss: float = 4.0, epoch_s: float = 12.0, **more: object) -> dict:
    return {"kind": "valid", "epoch": epoch, "step": 10 * epoch, "epoch_s": epoch_s, "loss": loss, **more}


def begin(step: int, epoch: int = 1, batch: int = 0) -> dict:
    return {"kind": "start", "script": "main.py", "epoch": epoch, "batch": batch, "step": step}


def steps(run: list[dict]) -> list[int]:
    return [entry["step"] for entry in run if entry["kind"] == "train"]


def test_later_lines_win_where_a_resumed_run_repeats_a_stretch():
    """A kill at step 20, the state of step 10: what was logged between is void."""
    void = [train(15, 2, 9.0), train(20, 2, 9.0)]
    log = [begin(0), train(5), train(10), *void, begin(10, 2), train(15, 2, 3.0)]
    (run,) = split_runs(log)
    assert steps(run) == [5, 10, 15]
    assert run[-1]["loss"] == 3.0


def test_a_new_run_in_the_same_log_is_another_curve():
    """A start at step 0 begins one; an invocation that logged nothing is none."""
    runs = split_runs([begin(0), train(5), begin(0), begin(0), train(5), train(10)])
    assert [steps(run) for run in runs] == [[5], [5, 10]]


def test_the_clock_adds_up():
    """Epochs cost what they say, validation in it; within one, the batches since the line before count."""
    log = [begin(0), train(5), train(10), valid(1, epoch_s=12), train(15, 2), valid(2, epoch_s=14)]
    curve = make_curve("a", split_runs(log)[0])
    assert [point.hours * 3600 for point in curve.train] == pytest.approx([5, 10, 17])
    assert [point.hours * 3600 for point in curve.valid] == pytest.approx([12, 26])
    assert [point.epoch for point in curve.train] == [0.5, 1.0, 1.5]
    assert [point.epoch for point in curve.valid] == [1, 2]


def test_the_clock_of_a_resumed_run():
    """The first line after a resume covers the batches since then alone; what is void costs nothing."""
    log = [begin(0), train(4), train(8), begin(6, 1, 6), train(8), train(10), valid(1), train(15, 2)]
    curve = make_curve("a", split_runs(log)[0])
    assert [point.hours * 3600 for point in curve.train] == pytest.approx([4, 6, 8, 17])


def test_the_clock_of_a_run_resumed_at_an_epochs_end():
    """What the epoch before took counts once."""
    log = [begin(0), train(5), train(10), valid(1, epoch_s=12), begin(10, 2), train(15, 2)]
    curve = make_curve("a", split_runs(log)[0])
    assert [point.hours * 3600 for point in curve.train] == pytest.approx([5, 10, 17])


def test_a_log_of_100_000_lines_is_read_in_seconds(tmp_path):
    """Reading is linear: epochs, steps and resumed stretches, each by the thousand; it takes a second."""

    def too_long(*_: object) -> None:
        raise AssertionError("20 s of processor time are over")

    log = [begin(0)]
    for epoch in range(1, 2001):
        log += [train(50 * (epoch - 1) + i, epoch, batches=50) for i in range(1, 51)]
        log.append({**valid(epoch), "step": 50 * epoch})
        if epoch % 2 == 0:
            log += [begin(50 * epoch - 5, epoch, 45), *log[-6:]]
    (tmp_path / "a.pt.log.jsonl").write_text("\n".join(map(json.dumps, log)))
    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)  # it counts processor time
    try:
        (curve,) = read_curves([str(tmp_path / "a.pt")])
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert len(log) > 100_000
    assert (len(curve.train), len(curve.valid)) == (100_000, 2000)
    assert curve.valid[-1].hours * 3600 == pytest.approx(2000 * 12)


def test_a_validation_in_mid_epoch_is_no_point_of_the_curve():
    """--max_steps validates where it stops; the whole run would not have."""
    log = [begin(0), train(5), valid(1, 3.0, partial=True), begin(5, 1, 5), train(10), valid(1, 4.0)]
    curve = make_curve("a", split_runs(log)[0])
    assert len(curve.valid) == 1
    assert "54.60" in curve.label


def test_the_switch_is_where_its_line_is():
    """At the validation that it followed."""
    log = [begin(0), valid(1), valid(2), {"kind": "averaging", "epoch": 2, "step": 20, "loss": 4.0}, valid(3)]
    assert make_curve("a", log).switch.epoch == 2


def test_cut_lines_are_passed_over(tmp_path):
    """A kill or a full disk may have left half a line, or bytes that are no text."""
    lines = [json.dumps(train(5)), '{"kind": "tra', "", "17", '{"kind": "train", "loss": NaN}', "\udcff"]
    (tmp_path / "a.log.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    (run,) = split_runs(read_log(str(tmp_path / "a.log.jsonl")))
    assert [point.epoch for point in make_curve("a", run).train] == [0.5]


def test_names_differ(tmp_path):
    """Models of one name in two folders are told apart; fine-tuning in the same log has its own name."""
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        tuning = {**begin(0), "script": "finetune.py"}
        log = [begin(0), train(5), tuning, train(5)] if folder == "y" else [train(5)]
        text = "\n".join(map(json.dumps, log))
        (tmp_path / folder / "m.pt.log.jsonl").write_text(text)
    curves = read_curves([f"{tmp_path}/x/m.pt", f"{tmp_path}/y/m.pt.log.jsonl"])
    names = [curve.name.removeprefix(f"{tmp_path}/") for curve in curves]
    assert names == ["x/m", "y/m", "y/m, fine-tuned"]


@pytest.mark.parametrize("low_high", [(50, 60), (55, 120), (80, 700), (3, 20), (20, 90000), (1.9, 2.1), (1e-99, 1e120)])
def test_ticks_are_round_and_neither_few_nor_many(low_high):
    """Five to a dozen, whatever the range."""
    found = ticks(*low_high)
    assert 5 <= len(found) <= 14, found
    assert all(low_high[0] <= tick <= low_high[1] for tick in found)
    assert found == [pytest.approx(float(f"{tick:.3g}")) for tick in found]


def test_all_validations_are_within_the_axis():
    """And the training losses too, but for the first ones."""
    log = [begin(0), *(train(i, loss=9.0 if i == 1 else 5.0) for i in range(1, 100)), valid(1, 6.0)]
    low, high = limits([make_curve("a", log)])
    assert low < 148 < 403 < high < 8000


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A folder with the log of a real run that switched to averaging."""
    whole = trained("--bptt", 20, "--nonmono", 0, "--lr", 20, "--clip", 1, "--epochs", 4)
    shutil.copy(f"{whole.path}.log.jsonl", tmp_path)
    return tmp_path


def run_plot(*argv: object, cwd: Path) -> Result:
    return run_cli(*argv, cwd=cwd, script="plot.py")


def test_a_picture_is_written(run):
    """A PNG beside the model, or what --out says, of one log or several."""
    result = run_plot("m.pt", cwd=run)
    assert (result.status, result.out) == (0, "| curves written to m.pt.png\n"), result
    assert (run / "m.pt.png").read_bytes().startswith(b"\x89PNG")
    shutil.copy(run / "m.pt.log.jsonl", run / "other.pt.log.jsonl")
    result = run_plot("m.pt.log.jsonl", "other.pt", "--out", "both.svg", cwd=run)
    assert result.status == 0, result
    svg = (run / "both.svg").read_text()
    assert svg.startswith("<?xml")
    for text in ("averaging starts", "other: valid", "perplexity"):
        assert f"<!-- {text}" in svg


def test_points_that_no_axis_can_hold_are_left_out(run):
    """A diverged epoch costs no picture: at 709 nats the perplexity is infinite, long before, no sight."""
    losses = (4.0, 709.0, 1e4, 299.0)
    log = [begin(0), train(5), *(valid(i, loss) for i, loss in enumerate(losses, 1)), train(45, 5, 710.0)]
    (run / "up.pt.log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (curve,) = read_curves([str(run / "up.pt")])
    assert [point.epoch for point in curve.valid] == [1, 4]
    assert len(curve.train) == 1
    result = run_plot("up.pt", cwd=run)
    assert (result.status, result.err) == (0, ""), result


TOKENS = "line\tposition\ttoken\tsurprisal\tentropy\trank\n"


def test_surprisal_is_a_bar_per_word_of_one_line(tmp_path):
    """Of score.py's tokens or words; names are never read as formulas."""
    rows = ["1\t1\tthe\t2.5\t6.0\t1", "1\t2\t<eos>\t1.0\t5.0\t2", "2\t1\t$x_1$\t9.5\t6.0\t40"]
    (tmp_path / "t.tsv").write_text(TOKENS + "\n".join(rows))
    assert plot.read_surprisal(str(tmp_path / "t.tsv"), 1) == [("the", 2.5, 6.0), ("<eos>", 1.0, 5.0)]
    result = run_plot("--surprisal", "t.tsv", "--line", 2, "--out", "t.svg", cwd=tmp_path)
    assert (result.status, result.out, result.err) == (0, "| surprisal written to t.svg\n", ""), result
    assert "<!-- $x_1$" in (tmp_path / "t.svg").read_text()
    assert "<!-- bits -->" in (tmp_path / "t.svg").read_text()
    assert run_plot("--surprisal", "t.tsv", "--nats", "--out", "t.svg", cwd=tmp_path).status == 0
    assert "<!-- nats -->" in (tmp_path / "t.svg").read_text()
    (tmp_path / "w.tsv").write_text("line\tposition\tword\tpieces\tsurprisal\n1\t1\tthe 日本\t2\t2.5\n")
    assert plot.read_surprisal(str(tmp_path / "w.tsv"), 1) == [("the 日本", 2.5, None)]
    result = run_plot("--surprisal", "w.tsv", cwd=tmp_path)
    assert (result.status, result.err) == (0, ""), result
    assert (tmp_path / "w.tsv.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_are_shown_as_text(tmp_path):
    """Byte-level pieces, spaces of either kind; what is no such piece stays, and so do parts of a character."""
    shown = {
        **{"Ġcan": "can", "ĠnaÃ¯ve": "naïve", "âĤ¬": "€", "Ã": "Ã", "Ġ": "␣", "▁": "␣", "▁can": "can"},
        **{"<unk> word": "<unk> word", "<eos>": "<eos>", "café": "café", "več": "več", "日本": "日本", "104": "104"},
    }
    rows = [f"1\t{i}\t{token}\t1.0\t2.0\t3" for i, token in enumerate(shown, 1)]
    (tmp_path / "t.tsv").write_text(TOKENS + "\n".join(rows))
    assert [bar.name for bar in plot.read_surprisal(str(tmp_path / "t.tsv"), 1)] == list(shown.values())
    (tmp_path / "w.tsv").write_text("line\tword\tsurprisal\n1\tĠcan\t1.0\n")  # a word is text already
    assert plot.read_surprisal(str(tmp_path / "w.tsv"), 1) == [("Ġcan", 1.0, None)]


def test_a_table_is_read_as_csv_quotes_it(tmp_path):
    """Quotes, and columns of others with tabs and newlines in them, at any place."""
    header = ["note", "line", "token", "more", "surprisal", "entropy"]
    rows = [["a\tb", 1, '"', 'x"y', 0.5, 3.0], ["a\nb", 1, 'say"', "", 1.5, 2.0], ["", 2, "'", "z", 2.5, 1.0]]
    with (tmp_path / "t.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    assert plot.read_surprisal(str(tmp_path / "t.tsv"), 1) == [('"', 0.5, 3.0), ('say"', 1.5, 2.0)]
    assert plot.read_surprisal(str(tmp_path / "t.tsv"), 2) == [("'", 2.5, 1.0)]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--surprisal", "t.tsv", "--line", 3], "--line 3"),
        (["--surprisal", "cut.tsv"], "cut.tsv, line 3"),
        (["--surprisal", "unquoted.tsv"], "unquoted.tsv, line 3"),
        (["--surprisal", "returns.tsv"], "returns.tsv, line 1"),
        (["--surprisal", "m.pt.log.jsonl"], "m.pt.log.jsonl"),
        (["--surprisal", "none.tsv"], "none.tsv"),
        (["m.pt", "--surprisal", "t.tsv"], "RUN"),
        (["none.pt"], "none.pt.log.jsonl"),
        (["empty.pt"], "is empty"),
        (["m.pt", "tests_only.log.jsonl"], "no figures"),
        (["partial.pt"], "no figures"),
        (["text.pt"], "'step' in line 2"),
        (["list.pt"], "'ms_per_batch' in line 1"),
        (["m.pt", "--out", "m.gif"], "--out m.gif"),
        (["m.pt", "--out", "nowhere/m.png"], "--out nowhere/m.png"),
        ([], "RUN"),
    ],
)
def test_bad_input_is_one_line(run, argv, named):
    """Status 2; the file or flag, and what to do; no picture."""
    (run / "t.tsv").write_text(TOKENS + "1\t1\tthe\t2.5\t6.0\t1\n")
    (run / "cut.tsv").write_text(TOKENS + "1\t1\tthe\t2.5\t6.0\t1\n1\t2\tca")
    (run / "unquoted.tsv").write_text(TOKENS + '1\t1\t"\t2.5\t6.0\t1\n1\t2\tcan\t2.5\t6.0\t1\n')
    (run / "returns.tsv").write_text(TOKENS.replace("position", "po\rsition"))
    (run / "empty.pt.log.jsonl").touch()
    (run / "tests_only.log.jsonl").write_text('{"kind": "test", "loss": 4.0}\n')
    for name, entries in {
        "partial": [begin(0), valid(1, partial=True)],
        "text": [begin(0), {**train(5), "step": "5"}],
        "list": [{**train(5), "ms_per_batch": [1]}],
    }.items():
        (run / f"{name}.pt.log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert_refused(run_plot(*argv, cwd=run), 2, named)
    assert not [*run.glob("*.png"), *run.glob("*.tmp")]


def test_without_matplotlib(run, monkeypatch, capsys):
    """One line with the command that installs it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(plot, run / "m.pt") == 2
    assert "pip install matplotlib" in error_line(capsys)


def test_a_run_killed_and_resumed_has_the_curve_of_the_whole_run(trained, corpus, tmp_path):
    """Perplexities and epochs are the same, each once."""
    flags = ["--epochs", 3]
    whole = trained(*flags)
    flags = ["--data", corpus, *SMALL, "--save", "m.pt", *flags, "--checkpoint_every", 7, "--resume", "auto"]
    for limit in (31, 33, 0):
        assert run_cli(*flags, "--max_steps", limit, cwd=tmp_path).status == 0
        if limit == 33:  # lines that the state knows nothing of, as after a kill
            log = tmp_path / "m.pt.log.jsonl"
            with log.open("a") as file:
                file.write(json.dumps(train(40, 2, 1.0, batches=25)) + "\n")
    (expected,), (found,) = (read_curves([str(path)]) for path in (whole.path, tmp_path / "m.pt"))
    assert [(p.epoch, p.ppl) for p in found.train] == [(p.epoch, p.ppl) for p in expected.train]
    assert [(p.epoch, p.ppl) for p in found.valid] == [(p.epoch, p.ppl) for p in expected.valid]
    assert found.test == expected.test
