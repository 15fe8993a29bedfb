"""The bench runs, and compares like with like: the plain step computes what ours does. No time is tested."""

import json
import math
import multiprocessing
import os
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from runner import run_cli
from toys import call, error_line

import bench
from benchmarks import fastest, floor, work
from benchmarks.peers import fits_fastai
from benchmarks.plain import PlainModel, make_plain_step
from harness.files import fit_names
from model import DROPOUTS, build
from products import has_bf16
from train import train_step
from utils import RunError, keep_freed_memory

CPU = torch.device("cpu")
FORK_SERVER = multiprocessing.get_context("forkserver")  # does not import torch every time


def tiny_setting(name: str, **changes: float) -> tuple[int, Namespace]:
    """A setting at toy size; nothing is dropped but by `changes`."""
    ntoken, args = work.setting(name, tiny=True)
    vars(args).update({**dict.fromkeys(DROPOUTS, 0.0), **changes})
    return ntoken, args


@pytest.fixture
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", work.SETTINGS)
def test_plain_step_is_ours_without_dropout(name: str) -> None:
    """Six steps from the same weights, by each setting's optimizer, AR, TAR and clip: the same losses."""
    ntoken, args = tiny_setting(name, clip=0.1)
    run, model = work.make_run(ntoken, args, CPU), PlainModel(args, ntoken)
    weights = fit_names({**run.model.state_dict(), **run.criterion.state_dict()}, model)
    assert model.load_state_dict(weights, strict=False) == (["decoder.weight"], [])  # tied
    step = make_plain_step(model)
    batches = islice(work.training_batches(ntoken, args, CPU), 6)
    losses = torch.stack([torch.stack([train_step(run, *batch), step(*batch)]) for batch in batches])  # (6, 2)
    assert losses[:, 0].unique().numel() == 6
    # In ours AR and TAR are float32 whatever the model is; without them 1e-12 would do.
    torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=1e-7 if args.alpha else 1e-12, atol=0)


@pytest.mark.parametrize(("name", "weight"), [("small", "weight_hh_l0_raw"), ("ptb-qrnn", "linear.weight")])
def test_plain_step_drops_weights(name: str, weight: str) -> None:
    """Half of each dropped matrix has no gradient, another half at the next step."""
    ntoken, args = tiny_setting(name, wdrop=0.5)
    model = PlainModel(args, ntoken)
    step, batches = make_plain_step(model), work.training_batches(ntoken, args, CPU)
    parameters = dict(model.named_parameters())
    for layer in range(args.nlayers):
        without = []
        for batch in islice(batches, 2):
            step(*batch)
            without.append(parameters[f"rnns.{layer}.{weight}"].grad == 0)
        assert 0.35 < without[0].double().mean() < 0.65
        assert not torch.equal(*without)


def test_plain_step_drops_word_types() -> None:
    """A dropped word type is zero in every place, and zeros differ from pass to pass."""
    ntoken, args = tiny_setting("small", dropoute=0.5)
    model, seen = PlainModel(args, ntoken), []
    model.rnns[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for _ in range(2):
        model(torch.arange(ntoken).repeat(2, 1), [None] * args.nlayers)  # every word twice in a column
    first, second = ((x == 0).all(-1) for x in seen)  # (T, B)
    assert torch.equal(first[0], first[1])
    assert 0.2 < first[0].double().mean() < 0.8
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", work.SETTINGS)
def test_floor_multiplies_every_weight_once(name: str) -> None:
    """At full size the floor's matrices hold just as many numbers as the model's own."""
    ntoken, args = work.setting(name, tiny=False)
    shapes = floor.shapes(args, ntoken, torch.arange(ntoken))  # each word once: every cluster is hit
    with torch.device("meta"):
        modules = build(vars(args), ntoken)
    matrices = [p.numel() for module in modules for p in module.parameters() if p.dim() == 2]
    assert sum(inputs * outputs for _, inputs, outputs in shapes) == sum(matrices)
    everywhere = len(shapes) - len(args.splits)
    assert all(rows in (ntoken, ntoken * args.n_experts) for rows, *_ in shapes[:everywhere])
    assert all(rows == outputs for rows, _, outputs in shapes[everywhere:])


@pytest.mark.parametrize("sizes", [(37, 21, 53), (1, 8, 3), (5, 1, 1)])
def test_every_way_gives_the_product(sizes: tuple[int, int, int]) -> None:
    """By each library; the weight's gradient as it is and transposed."""
    rows, inputs, outputs = sizes
    x, weight, dy = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    expected = [x @ weight.T, dy @ weight, dy.T @ x]
    for ways, product in zip(floor.products(x, weight, dy), expected, strict=True):
        assert {"torch.mm"} < {library for library, _ in ways} or not torch.backends.mkldnn.is_available()
        for i, (_, way) in enumerate(ways):
            transposed = len(ways) > 2 and i >= len(ways) // 2
            torch.testing.assert_close(way(), product.T if transposed else product)


def test_floor_is_the_fastest_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products per weight, each once per step."""
    done = []
    monkeypatch.setattr(floor, "ways", lambda *_: [(name, lambda n=name: done.append(n)) for name in ("a", "b")])
    monkeypatch.setattr(floor, "timed", lambda way, _: (way() or -ord(done[-1]), None))  # "b" is the faster one
    step, libraries = floor.make_floor([(5, 3, 7), (2, 4, 6)], CPU)
    done.clear()
    step()
    assert done == libraries == ["b"] * 6


def cells(text: str) -> list[list[str]]:
    """The rows of the Markdown tables in a text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


def test_bench_prints_both_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row and column of both tables, and all raw times as JSON; bfloat16 where the processor has it."""

    def start_up(*flags: object, until: str) -> None:
        result = run_cli(*flags, cwd=tmp_path)
        assert result.status == 0, result
        assert any(line.startswith(until) for line in result.out.splitlines())

    monkeypatch.setattr(work, "start_up", start_up)  # a fresh interpreter takes seconds to import torch
    monkeypatch.setattr(bench, "CONTEXT", FORK_SERVER)
    monkeypatch.setattr(bench, "WARM_UP_ROUNDS", 1)
    path, names = tmp_path / "bench.json", ["wt103-qrnn", "small"]
    assert call(bench, "--tiny", "--rounds", 1, "--json", path, "--settings", *names) == 0
    out = capsys.readouterr().out
    assert out.count("torch: ") == out.count("threads: ") == 2  # the machine, before each table
    found, table = json.loads(path.read_text()), cells(out)
    steps, others = table[:4], table[4:]
    assert [row[0].split(":")[0] for row in steps] == ["setting", "-" * len(steps[1][0]), *names]
    assert all(len(row) == (12 if has_bf16() else 9) and all(row) for row in steps)
    for entry, row in zip(found["steps"], steps[2:], strict=True):
        shown, ours = dict(zip(steps[0], row, strict=True)), entry["ms"]["ours"][0]
        assert ("ours bf16 / ours" in shown) is ("ours bf16" in entry["ms"]) is has_bf16()
        assert shown["ours / floor"] == f"{ours / entry['ms']['floor'][0]:.2f}"
        assert shown["plain / ours"] == f"{entry['ms']['plain'][0] / ours:.2f}"
        assert entry["peak_bytes"]["ours"] > 10**7
    assert [row[0] for row in others[2:]] == [entry["what"] for entry in found["others"]]
    assert len(others) == 2 + 10
    assert all(len(entry["ms"]) == 1 for entry in found["others"])


def test_peers_that_are_not_installed_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is started, and where to read how to install them."""
    monkeypatch.setitem(sys.modules, "fastai", None)
    assert call(bench, "--peers", "--tiny") == 2
    assert "--peers: needs fastai; the top of benchmarks/peers.py" in error_line(capsys)


def test_fastai_is_asked_for_what_it_has() -> None:
    """LSTMs with one softmax, under SGD."""
    fitting = [name for name in work.SETTINGS if fits_fastai(work.setting(name, tiny=True)[1])]
    assert fitting == ["ptb-lstm", "wt2-lstm", "small"]


def test_profile_names_operations(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of the operations that took longest."""
    assert call(bench, "--profile", "small", "--tiny") == 0
    out = capsys.readouterr().out
    assert "Self CPU" in out
    assert out.count("aten::") > 10


def test_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started."""
    assert call(bench, "--device", "cuda", "--tiny") == 2
    assert "there is no such device here; use --device cpu" in error_line(capsys)


@pytest.mark.parametrize(("rounds", "kept"), [(2, 2), (0, 15)])
def test_works_take_turns(rounds: int, kept: int) -> None:
    """Two rounds to warm up, which are discarded; then as many as are asked for, or as time allows."""
    order = []
    calls = {name: lambda n=name: order.append(n) or float(len(order)) for name in "ab"}
    found = bench.alternate("title", calls, rounds)
    assert order == ["a", "b"] * (2 + kept)
    assert found == {"a": [5.0 + 2 * i for i in range(kept)], "b": [6.0 + 2 * i for i in range(kept)]}


@pytest.mark.parametrize(("kind", "keeps"), [("ours", "1"), ("plain", None), ("floor", "1")])
def test_only_plain_runs_as_torch_comes(kind: str, keeps: str | None) -> None:
    """Ours and the floor keep freed memory as main.py does; plain does not, though it begins with the setting."""
    with ProcessPoolExecutor(1, FORK_SERVER) as pool:
        pool.submit(keep_freed_memory).result()  # stands in for what a process inherits from bench.py
        assert pool.submit(bench.step_ms, kind, "small", True, CPU).result() > 0
        assert pool.submit(os.getenv, "THP_MEM_ALLOC_ENABLE").result() == keeps


def test_killed_process_is_one_line() -> None:
    """As one is for whose memory the machine is too small."""
    with ProcessPoolExecutor(1, FORK_SERVER) as pool, pytest.raises(RunError, match="enough memory"):
        bench.call(pool, os._exit, 9)


def test_start_up_is_timed_to_a_line() -> None:
    """A process of its own, whose other lines are not waited for."""
    work.start_up("--help", until="usage")


def test_a_loss_that_is_not_finite_ends_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on NaN are no measure of training."""
    monkeypatch.setattr(bench, "make_work", lambda *_: lambda: torch.tensor(float("nan")))
    with pytest.raises(RunError, match="nan"):
        bench.step_ms("ours", "small", True, CPU)


@pytest.mark.parametrize(
    ("ms", "losses", "expected"),
    [
        ((4, 3, 2, 1), (5, 5, 5, 5), "--graphs --padded"),
        ((4, 3, 2, 1), (5, 5.01, 5.01, 5.2), "--graphs"),
        ((4, 1, 2, 1), (5, math.nan, 6, 4), ""),
        ((1, 2, 3, 4), (5, 5, 5, 5), ""),
    ],
)
def test_the_fastest_flags_are_among_those_that_give_the_same_losses(ms, losses, expected, monkeypatch, capsys):
    """On a GPU; here the times and losses are given."""
    monkeypatch.setattr(fastest, "timed", lambda work, device: (work.ms, None))
    steps = {}
    flags = fastest.choices("QRNN")
    for choice, step_ms, loss in zip(flags, ms, losses, strict=True):
        steps[choice] = lambda loss=loss: loss
        steps[choice].ms = step_ms
    assert fastest.fastest(steps.__getitem__, flags, CPU) == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    wrong = [abs(loss - 5) > 0.1 or loss != loss for loss in losses]
    assert ["not the same steps" in line for line in lines] == wrong


def test_each_choice_of_flags_is_a_step_with_them(monkeypatch):
    """--persistent is tried for an LSTM, and reaches the run."""
    assert fastest.choices("LSTM") == ("", "--persistent", "--graphs", "--graphs --persistent")
    given = []
    monkeypatch.setattr(bench, "ours", lambda *_, **flags: given.append([name for name in flags if flags[name]]))
    for choice in fastest.choices("LSTM"):
        bench.step_with("ptb-lstm", True, CPU, choice)
    assert given == [[], ["persistent"], ["graphs"], ["graphs", "persistent"]]


def test_without_a_gpu_no_flag_is_fastest(capsys):
    assert call(bench, "--fastest", "ptb-qrnn", "--tiny") == 0
    assert capsys.readouterr().out == "\n"
