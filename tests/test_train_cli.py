"""main.py as from a shell: commands, printed lines, log, files, and that its figures are right in float64."""

import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import SMALL, Trained, load, read_log
from runner import run_cli, run_fresh
from toys import KINDS, call, flags_of

import finetune
import main
import pointer
from harness.flags import DEFAULTS
from model import build

COMMANDS = """
python -u main.py --epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 --dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 --batch_size 128 --optimizer adam --lr 1e-3 --data data/enwik8 --save ENWIK8.pt --when 25 35
python -u main.py --epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 --batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt --when 300 400
python -u main.py --epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 0 --bptt 140 --batch_size 60 --optimizer adam --lr 1e-3 --data data/wikitext-103 --save WT103.12hr.QRNN.pt --when 12
python -u main.py --epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 --dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 --batch_size 60 --optimizer adam --lr 1e-3 --data data/wikitext-103 --save WT103.12hr.QRNN.pt --when 12 --model QRNN
python main.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epoch 500 --save PTB.pt
python -u main.py --model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3 --seed 9001 --dropouti 0.4 --epochs 550 --save PTB.pt
python main.py --epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882
python -u main.py --epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550 --nlayers 4 --seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 --save WT2.pt
""".strip().splitlines()  # noqa: E501
FIGURES = r"loss +(?P<loss>\d+\.\d\d) \| {0}ppl +(?P<ppl>\d+\.\d\d) \| {0}bpc +(?P<bpc>\d+\.\d\d\d)$"
STEP_LINE = re.compile(
    r"^\| epoch +(?P<epoch>\d+) \| +(?P<batch>\d+)/ +(?P<batches>\d+) batches \| lr (?P<lr>\d+\.\d{5}) "
    r"\| ms/batch +\d+\.\d\d \| " + FIGURES.format(""),
    re.M,
)
TIMED = r" \| time: +(?P<time>\d+\.\d\d)s \| valid "
EPOCH_LINE = re.compile(r"^\| end of epoch +(?P<epoch>\d+)" + TIMED + FIGURES.format("valid "), re.M)
CUT_LINE = re.compile(r"^\| in epoch +(?P<epoch>\d+), step (?P<step>\d+)" + TIMED + FIGURES.format("valid "), re.M)
TEST_LINE = re.compile(r"^\| End of training \| test " + FIGURES.format("test "), re.M)
# Every kind of layer, and every other output layer.
MODELS = {
    **{kind: flags_of(kind) for kind in KINDS},
    "split softmax": ["--splits", 6, 15, 30],
    "untied, split softmax": ["--model", "QRNN", "--untied", "--splits", 9],
    "untied, without weight drop": ["--model", "GRU", "--untied", "--wdrop", 0],
    "mixture": ["--n_experts", 3, "--nhidlast", 9],
    "untied mixture": ["--model", "QRNN", "--n_experts", 2, "--untied"],
}


def given_by(command: str) -> dict[str, list[str]]:
    """What a command line says: name -> values."""
    found: dict[str, list[str]] = {}
    for word in shlex.split(command):
        if re.match(r"--?[a-z]", word):
            found[name := word.lstrip("-").replace("-", "_").replace("epoch", "epochs").replace("ss", "s")] = []
        elif found:
            found[name].append(word)
    return found


@pytest.mark.parametrize("number", range(8))
def test_the_commands_of_the_readme_run(corpus, tmp_path, number):
    """Each runs as it stands (sizes made small, one step), and its flags arrive in the saved model."""
    (tmp_path / "data").mkdir()
    for name in ("penn", "pennchar", "enwik8", "wikitext-2", "wikitext-103"):
        (tmp_path / "data" / name).symlink_to(corpus)
    command = COMMANDS[number]
    argv = shlex.split(command)[shlex.split(command).index("main.py") + 1 :]
    result = run_cli(*argv, "--emsize", 8, "--nhid", 10, "--nlayers", 2, "--max_steps", 1, cwd=tmp_path)
    assert result.status == 0, result
    assert not result.err
    assert TEST_LINE.search(result.out)
    given = given_by(command)
    saved = load(tmp_path / given["save"][0])
    for name in set(given) - {"emsize", "nhid", "nlayers", "u"}:
        stored = saved["args"][name]
        stored = stored if isinstance(stored, list) else [stored]
        assert [type(s)(v) for s, v in zip(stored, given[name], strict=True)] == stored, name
    assert saved["metrics"]["step"] == 1


def test_defaults(corpus, tmp_path):
    """What no flag says is stored as the table has it; an unnamed corpus is data/penn."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "penn").symlink_to(corpus)
    small = ["--emsize", 8, "--nhid", 10, "--nlayers", 2, "--max_steps", 1, "--save", "m.pt"]
    assert run_cli(*small, cwd=tmp_path).status == 0
    args = load(tmp_path / "m.pt")["args"]
    own = {"emsize": 8, "nhid": 10, "nlayers": 2, "max_steps": 1, "save": "m.pt", "lr": 30.0, "splits": []}
    assert args == DEFAULTS | own


def test_printed_lines(trained):
    """The lines that scripts parse, in their order; the batch count is of `bptt` sized batches."""
    run = trained("--epochs", 2)
    lines = run.result.out.splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    patterns = [STEP_LINE, EPOCH_LINE, TEST_LINE]
    kinds = [[bool(p.match(line)) for p in patterns].index(True) for line in tables]
    assert re.fullmatch("0+10+12", "".join(map(str, kinds)))
    words = len(reference.encode(corpus_of(run) / "train.txt", run.saved["vocab"]))
    for match in STEP_LINE.finditer(run.result.out):
        assert int(match["batches"]) == pytest.approx(words / 4 / 14, abs=1)
        assert int(match["batch"]) % 5 == 0
        assert float(match["lr"]) == 5
    assert [m["epoch"] for m in EPOCH_LINE.finditer(run.result.out)] == ["1", "2"]
    assert not run.result.err


def test_printed_layout_is_the_originals(trained):
    """Column widths are those of the lines in the contract, so that a parser by position works too."""
    out = trained("--epochs", 2).result.out
    lines = [re.sub(r"\d", "0", line) for line in out.splitlines() if line.startswith("| ")]
    lines = [re.sub(r"(time:|ms/batch) +0+\.00", r"\1  0.00", line) for line in lines]  # as fast as it may be
    head = "| epoch   0 |     0/   00 batches | lr 0.00000 | ms/batch  0.00"
    assert f"{head} | loss  0.00 | ppl    00.00 | bpc    0.000" in lines
    head = "| end of epoch   0 | time:  0.00s"
    assert f"{head} | valid loss  0.00 | valid ppl    00.00 | valid bpc    0.000" in lines
    assert "| End of training | test loss  0.00 | test ppl    00.00 | test bpc    0.000" in lines


def test_a_short_epoch_has_a_line_after_each_tenth(corpus, tmp_path):
    """Of its 25 or so batches: after every third, to its end, also when resumed. A flag that is given holds."""
    at = SMALL.index("--log-interval")
    flags = ["--data", corpus, *SMALL[:at], *SMALL[at + 2 :], "--save", "m.pt"]
    for more in ([*flags, "--epochs", 1], ["--resume", "m.pt", "--epochs", 2]):
        result = run_cli(*more, cwd=tmp_path)
        assert result.status == 0, result
        batches = [int(match["batch"]) for match in STEP_LINE.finditer(result.out)]
        assert batches == [*range(3, max(batches) + 1, 3)]
        assert len(batches) in (8, 9, 10)
    result = run_cli(*flags, "--epochs", 1, "--log-interval", 200, cwd=tmp_path)
    assert not STEP_LINE.search(result.out)


def corpus_of(run: Trained) -> Path:
    return Path(run.saved["args"]["data"])


def test_log_holds_the_printed_figures_unrounded(trained):
    """One JSON object for each printed line, the same figures with all their digits."""
    run = trained("--epochs", 2)
    for kind, pattern in (("train", STEP_LINE), ("valid", EPOCH_LINE), ("test", TEST_LINE)):
        printed, logged = [*pattern.finditer(run.result.out)], run.log(kind)
        assert len(printed) == len(logged) > 0
        for match, entry in zip(printed, logged, strict=True):
            assert f"{entry['loss']:.2f}" == match["loss"]
            assert f"{entry['ppl']:.2f}" == match["ppl"]
            assert f"{entry['bpc']:.3f}" == match["bpc"]
            assert entry["loss"] != round(entry["loss"], 6)
            assert entry["ppl"] == pytest.approx(math.exp(entry["loss"]), rel=1e-12)
            assert entry["bpc"] == pytest.approx(entry["loss"] / math.log(2), rel=1e-12)
            if kind != "test":
                assert entry["epoch"] == int(match["epoch"])
            if kind == "train":
                assert (entry["batch"], entry["batches"]) == (int(match["batch"]), int(match["batches"]))
                assert entry["lr"] == float(match["lr"])
    assert all(isinstance(entry, dict) for entry in read_log(run.folder / "m.pt.log.jsonl"))


@pytest.mark.parametrize("name", MODELS)
def test_perplexities_are_those_of_float64(trained, name):
    """Valid (batch size 10) and test (1) are those of NumPy over the saved file, to the printed digits."""
    run = trained("--epochs", 2, *MODELS[name])
    saved = reference.load(run.path)
    best = min(run.log("valid"), key=lambda entry: entry["loss"])
    for split, batch_size, entry in (("valid", 10, best), ("test", 1, run.log("test")[0])):
        ids = reference.encode(corpus_of(run) / f"{split}.txt", saved["vocab"])
        expected = reference.mean_loss(saved, ids, batch_size)
        assert entry["loss"] == pytest.approx(expected, rel=1e-6)
        pattern = EPOCH_LINE if split == "valid" else TEST_LINE
        printed = [(m["loss"], m["ppl"], m["bpc"]) for m in pattern.finditer(run.result.out)]
        figures = (f"{expected:.2f}", f"{math.exp(expected):.2f}", f"{expected / math.log(2):.3f}")
        assert figures in printed
    assert saved["metrics"]["valid_loss"] == best["loss"]


@pytest.mark.parametrize("name", MODELS)
def test_saved_file(trained, name):
    """Seven keys, plain data and tensors, loaded with weights_only: all that a model is built from, and no more."""
    saved = trained("--epochs", 2, *MODELS[name]).saved
    assert set(saved) == {"format", "args", "vocab", "tokenizer", "model", "criterion", "metrics"}
    assert isinstance(saved["format"], str)
    assert saved["tokenizer"] is None  # a corpus of words that prepare.py did not make
    json.dumps([saved["args"], saved["metrics"]])
    assert all(type(word) is str for word in saved["vocab"])
    for part, module in zip(("model", "criterion"), build(saved["args"], len(saved["vocab"])), strict=True):
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        assert {key: tensor.shape for key, tensor in saved[part].items()} == shapes
        assert all(tensor.dtype == torch.float32 for tensor in saved[part].values())
    storage = sum(t.untyped_storage().nbytes() for t in saved["model"].values())
    assert storage == sum(t.nbytes for t in saved["model"].values()), "views of larger storages bloat the file"


def test_the_best_model_is_the_one_saved(trained):
    """A later and worse epoch leaves the file alone; the test line is that of the file."""
    run = trained("--epochs", 4, "--lr", 400, "--clip", 5, "--nonmono", 9)
    losses = [entry["loss"] for entry in run.log("valid")]
    assert losses[-1] > min(losses), "this run has to get worse"
    assert run.saved["metrics"]["valid_loss"] == min(losses)
    assert run.saved["metrics"]["epoch"] == 1 + losses.index(min(losses))
    saved = reference.load(run.path)
    ids = reference.encode(corpus_of(run) / "test.txt", saved["vocab"])
    assert run.log("test")[0]["loss"] == pytest.approx(reference.mean_loss(saved, ids, 1), rel=1e-6)


@pytest.mark.parametrize("nonmono", [1, 2])
def test_averaging_starts_by_the_rule_and_stays(trained, nonmono):
    """From the epoch after the first stall on the weights are averaged, never before, and for good."""
    run = trained("--epochs", 8, "--lr", 60, "--clip", 1, "--nonmono", nonmono, "--splits", 6, 15)
    entries = run.log("valid")
    losses = [entry["loss"] for entry in entries]
    stalled = [t > nonmono and v > min(losses[: t - nonmono]) for t, v in enumerate(losses)]
    assert any(stalled[:-1]), "this run has to stall"
    first = stalled.index(True)
    assert [entry["averaged"] for entry in entries] == [t > first for t in range(len(entries))]
    assert all(entry["lr"] == 60 for entry in entries), "averaging does not change the rate"


def test_averaging_gains(trained):
    """At a rate too high for the raw weights the mean is better than any of them."""
    run = trained("--epochs", 8, "--lr", 60, "--clip", 1, "--nonmono", 1, "--splits", 6, 15)
    raw = [entry["loss"] for entry in run.log("valid") if not entry["averaged"]]
    mean = [entry["loss"] for entry in run.log("valid") if entry["averaged"]]
    assert min(mean) < min(raw)
    assert run.saved["metrics"]["averaged"] is True


def test_rate_is_divided_after_the_epochs_of_when(trained):
    """Adam with `--when 1 2`: a tenth each, and a copy of the best model so far before each division."""
    run = trained("--epochs", 3, "--optimizer", "adam", "--lr", 0.01, "--when", 1, 2)
    rates = {entry["epoch"]: entry["lr"] for entry in run.log("train")}
    assert [rates[epoch] for epoch in (1, 2, 3)] == pytest.approx([0.01, 0.001, 0.0001], rel=1e-12)
    assert {p.name for p in run.folder.glob("m.pt.e*")} == {"m.pt.e1", "m.pt.e2"}
    kept = load(run.folder / "m.pt.e1")
    assert kept["metrics"]["epoch"] == 1
    assert kept["metrics"]["valid_loss"] == run.log("valid")[0]["loss"]


def test_rate_falls_in_a_straight_line_after_the_epoch_of_anneal(trained):
    """The whole rate for an epoch, then from step to step less, by the share of the text that is left."""
    run = trained("--epochs", 3, "--optimizer", "adam", "--lr", 0.01, "--anneal", 1, "--log-interval", 1)
    rates = {(entry["epoch"], entry["batch"]): entry["lr"] for entry in run.log("train")}
    assert {rate for (epoch, _), rate in rates.items() if epoch == 1} == {0.01}
    falling = [rate for (epoch, _), rate in rates.items() if epoch > 1]
    assert falling == sorted(set(falling), reverse=True)
    assert [entry["lr"] for entry in run.log("valid")] == pytest.approx([0.01, 0.005, 0], rel=1e-12)


def test_an_annealed_run_is_not_cut_short_unawares(trained):
    """Fewer epochs than the stored --anneal would leave the rate as it is: that is said, and how to mean it."""
    run = trained("--epochs", 3, "--optimizer", "adam", "--lr", 0.01, "--anneal", 1, "--log-interval", 1)
    result = run_cli("--resume", "m.pt", "--epochs", 1, cwd=run.folder)
    assert (result.status, result.out) == (2, "")
    assert "--epochs 1: the rate would fall from the end of epoch 1 (--anneal)" in result.err


def test_adam_moves_by_its_rate(trained):
    """Adam's first step moves no weight further than the scaled rate, and most of them about that far."""
    start = trained("--optimizer", "adam", "--lr", 1e-20, "--max_steps", 1, "--wdecay", 0, "--clip", 0)
    step = trained("--optimizer", "adam", "--lr", 0.01, "--max_steps", 1, "--wdecay", 0, "--clip", 0)
    rate = 0.01 * step.state["at"]["row"] / 14
    moved = (step.saved["model"]["rnns.0.bias_ih_l0"] - start.saved["model"]["rnns.0.bias_ih_l0"]).abs()
    assert moved.median().item() == pytest.approx(rate, rel=1e-3)
    assert moved.max() <= rate * (1 + 1e-4)


def test_max_steps(trained):
    """`--max_steps 7` ends in the middle of the first epoch, and says so; model and test are there."""
    run = trained("--max_steps", 7)
    metrics = run.saved["metrics"]
    assert (metrics["step"], metrics["partial"]) == (7, True)
    (match,) = CUT_LINE.finditer(run.result.out)
    (entry,) = run.log("valid")
    assert (match["epoch"], match["step"]) == ("1", "7")
    assert (match["loss"], metrics["valid_loss"], True) == (
        f"{entry['loss']:.2f}",
        entry["loss"],
        entry["partial"],
    )
    assert not EPOCH_LINE.search(run.result.out)
    assert TEST_LINE.search(run.result.out)
    carried = [tensor for layer in run.state["hidden"] for tensor in layer]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in carried), "a view would drag a whole batch along"


def test_max_steps_leaves_the_model_that_there_is(trained):
    """Cut in the second epoch it validates what it has, and saves nothing: the file is the first epoch's."""
    run = trained("--max_steps", 40)
    whole = trained("--epochs", 2)
    assert [entry["partial"] for entry in run.log("valid")] == [False, True]
    assert (run.saved["metrics"]["epoch"], run.saved["metrics"]["partial"]) == (1, False)
    assert run.saved["metrics"]["valid_loss"] == whole.log("valid")[0]["loss"]
    assert EPOCH_LINE.search(run.result.out)["epoch"] == "1"
    assert CUT_LINE.search(run.result.out)["epoch"] == "2"
    assert len(EPOCH_LINE.findall(run.result.out)) == 1


def test_figures_that_are_infinite_are_null_in_the_log(corpus, tmp_path):
    """A loss of thousands is printed, though its perplexity is no number of JSON."""
    small = ["--data", corpus, *SMALL, "--save", "m.pt", "--epochs", 1, "--log-interval", 1]
    result = run_cli(*small, "--lr", 30_000, "--clip", 0, "--alpha", 0, "--beta", 0, cwd=tmp_path)
    assert result.status == 0, result
    assert "ppl      inf" in result.out
    log = read_log(tmp_path / "m.pt.log.jsonl")
    assert any(entry["loss"] > 709 and entry["ppl"] is None for entry in log if entry["kind"] == "train")


def test_the_seed_decides(trained, corpus, tmp_path):
    """A new interpreter gives the same tensors from the same seed, whatever lies around; another seed others."""
    (tmp_path / "torch.py").write_text("raise SystemExit('taken from the working folder')\n")
    first, other = trained("--max_steps", 7), trained("--max_steps", 7, "--seed", 5)
    result = run_fresh("--data", corpus, *SMALL, "--save", "m.pt", "--max_steps", 7, cwd=tmp_path)
    assert result.status == 0, result
    again = load(tmp_path / "m.pt")
    for name, tensor in first.saved["model"].items():
        assert torch.equal(tensor, again["model"][name]), name
    assert not torch.equal(first.saved["model"]["encoder.weight"], other.saved["model"]["encoder.weight"])


def test_save_is_a_fresh_name(corpus, tmp_path):
    """Without `--save` two runs write two files, and neither is that of the other."""
    flags = ["--data", corpus, *SMALL, "--max_steps", 1]
    names = []
    for _ in range(2):
        result = run_cli(*flags, cwd=tmp_path)
        assert result.status == 0, result
        names.append({p.name for p in tmp_path.glob("*.pt")})
    assert [len(n) for n in names] == [1, 2]


def test_cuda_flag_and_device_names_are_accepted(corpus, tmp_path):
    """`--cuda` and `--device auto` run on a machine without a GPU, on the CPU."""
    for flags in (["--cuda"], ["--device", "auto"]):
        small = [flag for flag in SMALL if flag not in ("--device", "cpu")]
        result = run_cli("--data", corpus, *small, "--max_steps", 1, "--save", "m.pt", *flags, cwd=tmp_path)
        assert result.status == 0, result


def test_training_multiplies_in_tf32_and_evaluation_does_not(corpus, tmp_path, monkeypatch):
    """A GPU would; what is set for it can be seen without one."""
    monkeypatch.chdir(tmp_path)
    found = []
    for script, *flags in (
        (main, "--data", corpus, *SMALL, "--max_steps", 1, "--save", "m.pt"),
        (finetune, "--save", "m.pt", "--max_steps", 1, "--device", "cpu"),
        (pointer, "--save", "m.pt", "--device", "cpu"),
    ):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=False))
        assert call(script, *flags) == 0
        found.append(torch.backends.cuda.matmul.allow_tf32)
    assert found == [True, True, False]


def test_max_seq_len_caps_the_batches(trained):
    """With a cap of 9 rows one step reads at most 9, and an epoch takes as many steps as that makes."""
    run = trained("--epochs", 1, "--max_seq_len", 9)
    rows = len(reference.encode(corpus_of(run) / "train.txt", run.saved["vocab"])) // 4 - 1
    assert run.saved["metrics"]["step"] >= math.ceil(rows / 9)


def test_learns(trained):
    """Training brings the validation perplexity well below the number of words and the first epoch's."""
    run = trained("--epochs", 6, "--optimizer", "adam", "--lr", 0.02, "--dropouti", 0.1, "--wdrop", 0.1)
    perplexities = [entry["ppl"] for entry in run.log("valid")]
    assert perplexities[-1] < 0.9 * perplexities[0] < 41
    assert np.isfinite(perplexities).all()
