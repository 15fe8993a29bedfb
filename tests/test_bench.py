"""The bench runs, and compares like with like: the plain step computes what ours does. No time is tested."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runner import run_cli
from torch.utils.flop_counter import FlopCounterMode
from toys import call, error_line

import bench
import bench_work
import checkpoint
import plain
from splitcross import default_splits
from utils import RunError

CPU = torch.device("cpu")
NO_DROPOUT = dict.fromkeys(checkpoint.DROPOUTS, 0.0)


@pytest.fixture
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def change_settings(monkeypatch: pytest.MonkeyPatch, changes: dict[str, float]) -> None:
    """Every setting gets these changes."""
    original = bench_work.setting

    def setting(name: str, tiny: bool) -> tuple[int, dict[str, Any]]:
        ntoken, args = original(name, tiny)
        return ntoken, args | changes

    monkeypatch.setattr(bench_work, "setting", setting)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", bench_work.SETTINGS)
def test_plain_step_is_ours_without_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps from the same weights, by each setting's optimizer, AR, TAR and clip: the same losses."""
    change_settings(monkeypatch, NO_DROPOUT | {"clip": 0.1})
    run, ids = bench_work.make_run(name, tiny=True, device=CPU)
    model = plain.PlainModel(run.args, len(run.vocab))
    weights = {**run.model.state_dict(), **run.criterion.state_dict()}
    weights["decoder.weight"] = weights["encoder.weight"]
    assert len(weights) == len(model.state_dict())
    model.load_state_dict({key: weights[key.replace(".lstm.", ".")] for key in model.state_dict()})
    ours, theirs = bench_work.our_training(run, ids), bench_work.plain_training(model, ids)
    losses = torch.stack([torch.stack([ours(), theirs()]) for _ in range(6)])  # (6, 2)
    assert losses[:, 0].unique().numel() == 6
    # In ours AR and TAR are float32 whatever the model is; without them 1e-12 would do.
    torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=1e-7 if run.args["alpha"] else 1e-12, atol=0)


@pytest.mark.parametrize(("name", "weight"), [("small", "weight_hh_l0_raw"), ("ptb-qrnn", "linear.weight")])
def test_plain_step_drops_weights(name: str, weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of each dropped matrix has no gradient, another half at the next step."""
    change_settings(monkeypatch, NO_DROPOUT | {"wdrop": 0.5})
    ntoken, args = bench_work.setting(name, tiny=True)
    model = plain.PlainModel(args, ntoken)
    step = bench_work.plain_training(model, bench_work.training_text(ntoken, args, CPU))
    parameters = dict(model.named_parameters())
    for layer in range(args["nlayers"]):
        raw, without = parameters[f"rnns.{layer}.{weight}"], []
        for _ in range(2):
            step()
            without.append(raw.grad == 0)
        assert 0.35 < without[0].double().mean() < 0.65
        assert not torch.equal(*without)


def test_plain_step_drops_word_types() -> None:
    """A dropped word type is zero in every place, and zeros differ from pass to pass."""
    ntoken, args = bench_work.setting("small", tiny=True)
    model = plain.PlainModel(args | {"dropoute": 0.5, "dropouti": 0.0, "wdrop": 0.0}, ntoken)
    seen = []
    model.rnns[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    words = torch.arange(ntoken).repeat(2, 1)  # (T, B), every word twice in a column
    for _ in range(2):
        model(words, model.init_hidden(ntoken))
    first, second = ((x == 0).all(-1) for x in seen)  # (T, B)
    assert torch.equal(first[0], first[1])
    assert 0.2 < first[0].double().mean() < 0.8
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", bench_work.SETTINGS)
def test_floor_multiplies_every_weight_once(name: str) -> None:
    """At full size the floor's matrices hold just as many numbers as the model's own."""
    ntoken, args = bench_work.setting(name, tiny=False)
    assert args["splits"] == default_splits(ntoken)
    targets = torch.arange(ntoken).view(1, -1)  # each word once: every cluster is hit
    shapes = plain.products(args, ntoken, targets)
    with torch.device("meta"):
        modules = checkpoint.build(args, [""] * ntoken, **{drop: args[drop] for drop in checkpoint.DROPOUTS})
    matrices = [p.numel() for module in modules for p in module.parameters() if p.dim() == 2]
    assert sum(inputs * outputs for _, inputs, outputs in shapes) == sum(matrices)
    clusters = shapes[len(shapes) - len(args["splits"]) :] if args["splits"] else []
    assert all(rows == ntoken for rows, _, _ in shapes[: len(shapes) - len(clusters)])
    assert [rows for rows, _, _ in clusters] == [outputs for _, _, outputs in clusters]


def test_floor_is_three_products_a_weight() -> None:
    """2 · rows · inputs · outputs operations forward, twice that backward."""
    shapes = [(5, 3, 7), (2, 4, 6)]
    floor = plain.make_floor(shapes, CPU)
    with FlopCounterMode(display=False) as counter:
        floor()
    assert counter.get_total_flops() == 3 * 2 * (5 * 3 * 7 + 2 * 4 * 6)


class InProcess:
    """A worker without a process of its own."""

    def __init__(self, kind: str, name: str, device: str, tiny: bool) -> None:
        self.device = torch.device(device)
        self.works = bench_work.WORKS[kind](name, tiny, self.device)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def ask(self, work: str) -> float:
        return bench_work.timed_ms(self.works[work], self.device)

    def finish(self) -> int:
        return bench_work.peak_bytes(self.device)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bench without its fresh processes, which take seconds each to import torch."""

    def script_ms(*flags: object, until: str) -> float:
        result = run_cli(*flags, cwd=tmp_path)
        assert result.status == 0, result
        assert re.search(f"^{re.escape(until)}", result.out, re.MULTILINE)
        return 1.0

    monkeypatch.setattr(bench, "Worker", InProcess)
    monkeypatch.setattr(bench, "script_ms", script_ms)
    monkeypatch.setattr(bench.corpus_cache, "RACY", 0)


def cells(text: str) -> list[list[str]]:
    """The rows of the Markdown tables in a text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.usefixtures("in_process")
def test_bench_prints_both_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row and column of both tables, and all raw times as JSON."""
    path = tmp_path / "bench.json"
    assert call(bench, "--tiny", "--rounds", 2, "--json", path) == 0
    out = capsys.readouterr().out
    assert out.count("torch: ") == out.count("threads: ") == 2  # the machine, before each table
    found = json.loads(path.read_text())
    table = cells(out)
    steps, others = table[: 2 + len(bench.SETTINGS)], table[2 + len(bench.SETTINGS) :]
    assert [row[0].split(":")[0] for row in steps[2:]] == list(bench.SETTINGS)
    assert all(len(row) == 9 and all(row) for row in steps)
    assert [row[0] for row in others[2:]] == [entry["what"] for entry in found["others"]]
    assert len(others) == 2 + 10
    for entry, row in zip(found["steps"], steps[2:], strict=True):
        assert [len(entry["ms"][kind]) for kind in bench.VARIANTS] == [2, 2, 2]
        ours, theirs, floor = (sum(entry["ms"][kind]) / 2 for kind in bench.VARIANTS)
        assert row[5:7] == [f"{ours / floor:.2f}", f"{theirs / ours:.2f}"]


@pytest.mark.usefixtures("in_process")
def test_tables_and_settings_choose(capsys: pytest.CaptureFixture[str]) -> None:
    """One row of one table; the rounds as the budget allows, at most 15."""
    assert call(bench, "--tiny", "--tables", 1, "--settings", "small") == 0
    captured = capsys.readouterr()
    assert len(cells(captured.out)) == 3
    assert "small: round 15 of 15: ours" in captured.err


def test_profile_names_operations(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of the operations that took longest."""
    assert call(bench, "--profile", "small", "--tiny") == 0
    out = capsys.readouterr().out
    assert "Self CPU" in out
    assert out.count("aten::") > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started."""
    assert call(bench, "--device", "cuda", "--tiny") == 2
    assert (
        error_line(capsys) == "bench.py: error: --device cuda: there is no such device here; use --device cpu"
    )


def test_works_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """Each twice to warm up, which is discarded, then all of them every round."""
    order = []

    def work(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or float(len(order))

    found = bench.alternate("title", {"a": work("a"), "b": work("b")}, rounds=2, budget_s=0)
    assert found == {"a": [5.0, 7.0], "b": [6.0, 8.0]}
    assert order == ["a", "b"] * 4


def test_worker_is_a_process_of_its_own() -> None:
    """It steps when told to, tells its memory, and its failure is an error here."""
    with bench.Worker("plain", "small", "cpu", tiny=True) as worker:
        assert worker.ask("step") > 0
        assert worker.finish() > 10**7
    with (
        bench.Worker("floor", "small", "cpu", tiny=True) as worker,
        pytest.raises(RunError, match="status 1"),
    ):
        worker.ask("nonsense")


@pytest.mark.parametrize(("kind", "keeps"), [("ours", True), ("plain", False), ("floor", True)])
def test_only_plain_runs_as_torch_comes(kind: str, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the floor keep freed memory as main.py does."""
    called = []
    monkeypatch.setattr(bench_work, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(bench_work.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["bench_work.py", kind, "small", "--tiny"])
    monkeypatch.setattr("sys.stdin", io.StringIO("step\n"))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    bench_work.main()
    assert bool(called) == keeps


def test_workers_inherit_no_memory_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench.py itself keeps freed memory; the plain worker must not come to that by its environment."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert "THP_MEM_ALLOC_ENABLE" not in bench_work.own_environment()


def test_a_loss_that_is_not_finite_ends_the_bench() -> None:
    """Steps on NaN are no measure of training."""
    with pytest.raises(RunError, match="nan"):
        bench_work.timed_ms(lambda: torch.tensor(float("nan")), CPU)
