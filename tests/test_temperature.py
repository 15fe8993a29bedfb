"""Evaluation at a temperature T: p^(1/T), renormalised over the vocabulary, against its definition in float64."""

import csv
import io
import json
import math
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_log, write_corpus
from test_surprisal import LINES, encode, write
from torch import Tensor, nn
from toys import (
    MODELS,
    NO_DROPOUT,
    WORDS,
    Largest,
    SlowDynamics,
    call,
    double_model,
    error_line,
    make_text,
    mean_loss,
    one_by_one,
    prepare_levels,
    save_model,
    settings_of,
    text_of,
)

import dynamiceval
import evaluate
import generate
import main
import pointer
import score
from corpus.read import read_corpus
from dynamiceval import MovingWeights, dynamic_loss, dynamic_losses, gradient_statistics, weights_of
from evaluate import Tempered, tempered, tempered_losses
from harness import files
from harness.files import load_model, to_evaluate
from model import build
from pointer import pointer_loss

T = 0.8
TEMPERATURES = [0.5, 1.0, 1.3]
every_kind = pytest.mark.parametrize("kind", MODELS)


def distributions(kind: str, ids: list[int], temperature: float) -> np.ndarray:
    """The definition: p^(1/T) over its sum, (len(ids), V), after each of `ids`."""
    power = one_by_one(*double_model(**MODELS[kind]), ids).exp().numpy() ** (1 / temperature)
    return power / power.sum(1, keepdims=True)


def mean_of(probabilities: np.ndarray, targets: Tensor) -> float:
    return -np.log(probabilities[np.arange(len(targets)), targets.numpy()]).mean()


def open_toy(folder: Path, kind: str) -> files.Opened:
    return to_evaluate(load_model(str(save_model(folder / "m.pt", **MODELS[kind])), "--save"), torch.device("cpu"))


# The losses


@every_kind
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_losses_are_the_definition_for_every_output_layer(kind, rows, monkeypatch):
    """At each of several temperatures, in blocks of any size; by themselves, summed, as a mean, as distributions."""
    monkeypatch.setattr(evaluate, "block_rows", lambda V: rows)
    model, criterion = double_model(**MODELS[kind])
    text = make_text(60)
    hiddens = model(text[:-1, None], model.init_hidden(1))[0].detach()
    decoder = model.decoder.weight, model.decoder.bias
    found = tempered_losses(criterion, *decoder, hiddens, text[1:], TEMPERATURES)
    for losses, temperature in zip(found, TEMPERATURES, strict=True):
        expected = torch.from_numpy(distributions(kind, text[:-1].tolist(), temperature))
        own = -expected.gather(1, text[1:, None])[:, 0].log()
        torch.testing.assert_close(losses, own, rtol=0, atol=1e-10)
        at = Tempered(criterion, temperature)
        torch.testing.assert_close(at(*decoder, hiddens, text[1:], reduction="none"), own, rtol=0, atol=1e-10)
        assert at(*decoder, hiddens, text[1:, None]).item() == pytest.approx(own.mean().item(), abs=1e-10)
        assert at(*decoder, hiddens, text[1:], reduction="sum").item() == pytest.approx(own.sum().item(), abs=1e-9)
        torch.testing.assert_close(at.logprob(*decoder, hiddens).detach().exp(), expected, rtol=0, atol=1e-10)


@every_kind
def test_a_temperature_of_1_changes_no_bit(kind, tmp_path):
    """In float32, beside others too; the model that is opened is the model itself."""
    saved, text = open_toy(tmp_path, kind), make_text(300)
    hiddens = saved.model(text[:-1, None], saved.model.init_hidden(1))[0].detach()
    decoder = saved.model.decoder.weight, saved.model.decoder.bias
    own = saved.criterion(*decoder, hiddens, text[1:], reduction="none")
    assert torch.equal(tempered_losses(saved.criterion, *decoder, hiddens, text[1:], [0.7, 1.0, 1.2])[1], own)
    assert tempered(saved, 1.0) is saved
    plain = pointer_loss(saved.model, saved.criterion, text, 70, [0.7], [0.1, 0.2], [50])
    beside = pointer_loss(saved.model, saved.criterion, text, 70, [0.7], [0.1, 0.2], [50], [0.7, 1.0])
    assert torch.equal(plain[..., 0], beside[..., 1])
    assert not torch.equal(plain[..., 0], beside[..., 0])


@pytest.mark.parametrize("kind", ["LSTM", "split softmax", "mixture"])
def test_no_large_tensor_is_made(kind, monkeypatch):
    """The largest one has the block's rows, whatever the number of positions and temperatures."""
    monkeypatch.setattr(evaluate, "block_rows", lambda V: 6)
    model, criterion = double_model(**MODELS[kind])
    hiddens, targets = torch.randn(3000, 12, dtype=torch.float64), make_text(3000)
    with Largest() as largest:
        tempered_losses(criterion, model.decoder.weight, model.decoder.bias, hiddens, targets, [0.5, 0.7, 0.9])
    assert largest.elements == 3 * 3000, "the losses that are given back"


# main.py --epochs 0


@every_kind
def test_main_evaluates_at_a_temperature(kind, tmp_path, capsys):
    """The test line is exp of the definition's mean; the model's file stays as it is; training takes no temperature."""
    save, data = save_model(tmp_path / "m.pt", **MODELS[kind]), write_corpus(tmp_path / "data")
    before = save.read_bytes()
    ids = read_corpus(str(data), WORDS).test.long()
    expected = mean_of(distributions(kind, ids[:-1].tolist(), T), ids[1:])
    out = text_of(capsys, main, "--resume", save, "--data", data, "--epochs", 0, "--temperature", T)
    assert float(re.search(r"test ppl +(\S+)", out)[1]) == pytest.approx(math.exp(expected), abs=0.006)
    plain = text_of(capsys, main, "--resume", save, "--data", data, "--epochs", 0)
    assert text_of(capsys, main, "--resume", save, "--data", data, "--epochs", 0, "--temperature", 1) == plain != out
    assert re.search(r"valid ppl +(\S+)", plain)[1] != re.search(r"valid ppl +(\S+)", out)[1]
    assert save.read_bytes() == before
    assert call(main, "--data", data, "--epochs", 1, "--temperature", T) == 2
    assert "--temperature 0.8: does nothing without --epochs 0" in error_line(capsys)


# The cache pointer


@every_kind
def test_the_pointers_vocabulary_is_tempered_and_its_cache_is_not(kind):
    """λ·p_cache + (1-λ)·q with q the tempered distribution, by brute force."""
    text, theta, share, window = make_text(400), 0.7, 0.2, 90
    model, criterion = double_model(**MODELS[kind])
    raw = model(text[:-1, None], model.init_hidden(1), return_h=True)[2]
    states, words, total = raw[-1][:, 0].detach().numpy(), text.numpy(), 0.0
    for i, prob in enumerate(distributions(kind, text[:-1].tolist(), T)):
        seen = slice(max(0, i - window), i)
        if i:
            attention = np.exp(theta * states[seen] @ states[i])
            cached = attention[words[1:][seen] == words[i + 1]].sum() / attention.sum()
            total -= math.log(share * cached + (1 - share) * prob[words[i + 1]])
        else:
            total -= math.log(prob[words[1]])
    loss = pointer_loss(model, criterion, text, 70, [theta], [share], [window], [T])
    assert loss.item() == pytest.approx(total / (len(text) - 1), abs=1e-10)


def test_a_grid_with_temperatures_is_its_settings_one_by_one():
    model, criterion = double_model()
    grid = [0.0, 1.1], [0.0, 0.15], [20, 100], [0.7, 1.0, 1.2]
    losses = pointer_loss(model, criterion, make_text(400), 70, *grid)
    assert losses.shape == (2, 2, 2, 3)
    for index in np.ndindex(*losses.shape):
        one = pointer_loss(
            model, criterion, make_text(400), 70, *([values[i]] for values, i in zip(grid, index, strict=True))
        )
        assert losses[index].item() == pytest.approx(one.item(), rel=1e-12)
    assert len({round(value, 9) for value in losses[1, 1, 1].tolist()}) == 3


POINTER_GRID = ["--search", "--search_thetas", 0.5, 2, "--search_lambdas", 0.1, 0.4, "--window", 50]


def log_of(save: Path) -> list[dict]:
    return read_log(Path(f"{save}.log.jsonl"))


def ends(out: str) -> list[str]:
    return re.findall(r"End of .*", out)


def test_pointer_searches_the_temperature_when_asked(tmp_path, capsys):
    """One table per temperature, the best cell of all is that of validation, and its flags give the same lines."""
    save, data = save_model(tmp_path / "m.pt"), write_corpus(tmp_path / "data")
    what = ["--data", data, "--save", save]
    out = text_of(capsys, pointer, *what, *POINTER_GRID, "--search_temperatures", 0.8, 1, 1.6)
    assert re.findall(r"window 50, temperature (\S+) ", out) == ["0.8", "1", "1.6"]
    cells = [
        float(x) for row in re.findall(r"^\| +[\d.]+ \|((?: +[\d.]+){2})$", out, re.MULTILINE) for x in row.split()
    ]
    assert len(cells) == 12
    best = re.search(r"best on val: (.*)", out)[1].split()
    assert best[-2] == "--temperature"
    assert float(best[-1]) != 1, "else the test shows nothing"
    assert float(re.search(r"val ppl +(\S+)$", out, re.MULTILINE)[1]) == min(cells)
    assert ends(text_of(capsys, pointer, *what, *best)) == ends(out)
    assert [entry["temperature"] for entry in log_of(save)] == [float(best[-1])] * 4
    without = text_of(capsys, pointer, *what, *POINTER_GRID)
    assert "temperature" not in without
    assert [entry["temperature"] for entry in log_of(save)[4:]] == [1.0, 1.0]
    fixed = text_of(capsys, pointer, *what, *POINTER_GRID, "--temperature", best[-1])
    assert ends(fixed) == ends(out) != ends(without)


def test_a_search_never_looks_at_the_test_text(tmp_path, capsys):
    """Another test text changes the test lines and nothing before them, in either script."""
    save, data = save_model(tmp_path / "m.pt"), write_corpus(tmp_path / "data", (400, 300, 300))
    dynamic = ["--search", "--search_lrs", 1e-4, "--search_lambs", 1e-3, "--batch_size", 8, "--device", "cpu"]
    for script, flags in ((pointer, POINTER_GRID), (dynamiceval, dynamic)):
        outs = []
        for words in ("w3 w4 w5 " * 30, "w40 w41 " * 30):
            (data / "test.txt").write_text(words + "\n")
            out = text_of(capsys, script, "--data", data, "--save", save, *flags, "--search_temperatures", 0.7, 1.4)
            outs.append(re.split(r"\| End of .* test", out))
        assert outs[0][0] == outs[1][0]
        assert outs[0][1] != outs[1][1]


# Dynamic evaluation


def slow_dynamic(slow: SlowDynamics, ids: Tensor, bptt: int, temperature: float) -> float:
    """Each word scored at the temperature; the weights move by the model's own loss."""
    total, hidden, text = 0.0, slow.parts[0].init_hidden(1), ids[:, None]
    for start in range(0, len(ids) - 1, bptt):
        source, target = text[start : start + bptt][: len(ids) - 1 - start], text[start + 1 : start + bptt + 1]
        with torch.no_grad():
            output, _ = slow.parts[0](source, hidden)
            decoder = slow.parts[0].decoder
            power = slow.parts[1].logprob(decoder.weight, decoder.bias, output).exp() ** (1 / temperature)
            total -= (power.gather(1, target)[:, 0] / power.sum(1)).log().sum().item()
        loss, hidden = mean_loss(*slow.parts, source, target, hidden)
        slow.move(loss)
    return total / (len(ids) - 1)


@every_kind
def test_dynamic_evaluation_is_scored_at_a_temperature_and_learns_without(kind, tmp_path):
    """Several temperatures in one pass are those one by one, because the weights move in the same way."""
    saved, text, how = open_toy(tmp_path, kind), make_text(200, seed=2), (1e-3, 0.02, 2e-5)
    ms = gradient_statistics(saved, make_text(700, seed=1), batch_size=8, bptt=5, max_batches=0)
    moving = MovingWeights(weights_of(saved), ms, *how)
    found, count = dynamic_losses(saved, moving, text, 5, temperatures=TEMPERATURES)
    assert count == len(text) - 1
    for loss, temperature in zip(found, TEMPERATURES, strict=True):
        slow = SlowDynamics(*double_model(**MODELS[kind]), *how)
        slow.take_statistics(make_text(700, seed=1), 8, 5)
        assert loss == pytest.approx(slow_dynamic(slow, text, 5, temperature), rel=1e-5)
        assert dynamic_loss(saved, moving, text, 5, temperature=temperature)[0] == pytest.approx(loss, rel=1e-6)


def test_dynamic_evaluation_with_the_pointer_and_a_temperature(tmp_path):
    """With weights that stand still it is the pointer's figure at that temperature."""
    saved, text = open_toy(tmp_path, "LSTM"), make_text(300)
    still = MovingWeights(weights_of(saved), [torch.ones_like(w) for w in weights_of(saved)], 0.0, 0.0, 2e-5)
    found, _ = dynamic_losses(saved, still, text, 5, (0.7, 0.3, 50), temperatures=TEMPERATURES)
    expected = pointer_loss(saved.model, saved.criterion, text, 1000, [0.7], [0.3], [50], TEMPERATURES)
    assert found == pytest.approx(expected.flatten().tolist(), rel=1e-6)


def test_dynamiceval_searches_the_temperature_when_asked(tmp_path, capsys):
    """A cell is the best temperature's; the best cell follows on the validation text, and its flags give it again."""
    save, data = save_model(tmp_path / "m.pt"), write_corpus(tmp_path / "data", (400, 300, 300))
    what = ["--data", data, "--save", save, "--batch_size", 8, "--device", "cpu"]
    grid = ["--search", "--search_tokens", 10**6, "--search_lrs", 1e-4, 1e-3, "--search_lambs", 0.001, 0.01]
    out = text_of(capsys, dynamiceval, *what, *grid, "--search_temperatures", 0.8, 1, 1.6)
    best = re.search(r"best on val: (.*)", out)[1].split()
    assert best[-2] == "--temperature"
    assert float(best[-1]) != 1, "else the test shows nothing"
    cells = [
        float(x) for row in re.findall(r"^\| +[\d.e-]+ \|((?: +[\d.]+){2})$", out, re.MULTILINE) for x in row.split()
    ]
    assert float(re.search(r"val ppl +(\S+)$", out, re.MULTILINE)[1]) == min(cells)
    assert ends(text_of(capsys, dynamiceval, *what, *best)) == ends(out)
    assert [entry["temperature"] for entry in log_of(save)] == [float(best[-1])] * 4
    for temperature in ([], ["--temperature", best[-1]]):
        found = text_of(capsys, dynamiceval, *what, *grid, *temperature)
        assert (ends(found) == ends(out)) == bool(temperature)
        assert ("--temperature" in found) == bool(temperature)


# score.py


def figures(text: str) -> list[str | float]:
    """The cells of a table, numbers as numbers."""
    cells = [cell for row in csv.reader(io.StringIO(text), delimiter="\t") for cell in row]
    return [float(cell) if re.fullmatch(r"-?\d+\.\d+", cell) else cell for cell in cells]


@every_kind
def test_tokens_at_a_temperature_are_the_definition(kind, tmp_path, capsys):
    """Surprisal and entropy in nats, rank; the row of the line is their sum."""
    save, text = save_model(tmp_path / "m.pt", **MODELS[kind]), write(tmp_path / "text", LINES)
    flags = ["--save", save, text, "--temperature", T]
    tokens = iter(
        list(csv.reader(io.StringIO(text_of(capsys, score, *flags, "--tokens", "--nats")), delimiter="\t"))[1:]
    )
    lines = iter(list(csv.reader(io.StringIO(text_of(capsys, score, *flags)), delimiter="\t"))[1:])
    for line in filter(None, LINES):
        ids, total = encode(line), 0.0
        for prob, word in zip(distributions(kind, [0, *ids[:-1]], T), ids, strict=True):
            row = next(tokens)
            assert float(row[3]) == pytest.approx(-math.log(prob[word]), abs=2e-4)
            assert float(row[4]) == pytest.approx(-(prob * np.log(prob)).sum(), abs=2e-4)
            assert int(row[5]) == 1 + (prob > prob[word]).sum()
            total += math.log(prob[word])
        row = next(lines)
        assert float(row[3]) == pytest.approx(total, abs=1e-3)
        assert float(row[4]) == pytest.approx(math.exp(-total / len(ids)), rel=1e-3)


def save_divided(path: Path, vocab: list[str], tokenizer: str | None, temperature: float) -> Path:
    """A model of one softmax whose logits are divided by a temperature: its p^(1/T), as a model of its own."""
    torch.manual_seed(0)
    args = settings_of("LSTM", tied=False)
    model, criterion = build(args | NO_DROPOUT, len(vocab))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for parameter in model.decoder.parameters():
        parameter.data /= temperature
    files.save(str(path), files.model_contents(Namespace(**args), vocab, model, criterion, {}, tokenizer))
    return path


def test_every_form_of_scores_has_the_temperature(tmp_path, capsys):
    """Each gives what it gives of the model whose logits are divided, and something else than without it."""
    lines = ["The cat sat on the mat.", "It isn't the dog's mat", "the cats sat (or ran)"]
    folder = prepare_levels(tmp_path, lines * 5, 300)["subword"]
    corpus = read_corpus(str(folder))
    capsys.readouterr()
    save, divided = (
        save_divided(tmp_path / f"{name}.pt", corpus.vocab, corpus.tokenizer, temperature)
        for name, temperature in (("m", 1.0), ("divided", T))
    )
    text, context = write(tmp_path / "text", lines), write(tmp_path / "context", lines[::-1])
    pairs = write(tmp_path / "pairs.tsv", ["the cat sat\tthe cat sit", "the mats ran\tthe mat ran"])
    blimp = [{"sentence_good": "the cat sat", "sentence_bad": "the cat sit", "one_prefix_prefix": "the cat"}]
    blimp = write(tmp_path / "blimp.jsonl", [json.dumps(pair) for pair in blimp])
    lists = write(tmp_path / "lists.tsv", ["a\t-1.5\tthe cat sat", "a\t-1\tthe dog ran", "b\t0\tthe mat"])
    table = write(tmp_path / "table.tsv", ["word\ttime", *(f"{word}\t3" for word in lines[0].split())])
    still = ["--adaptive", "--data", folder, "--lr", 0, "--lamb", 0, "--batch_size", 2]
    rows = tmp_path / "rows.tsv"
    for flags in (
        [text], [text, "--tokens"], [text, "--words"], [text, "--carry"], [text, "--carry", "--words"],
        [text, "--context", context], [text, "--tokens", *still], [text, *still], [text, "--words", "--carry", *still],
        ["--table", table, "--word", "word"], ["--pairs", pairs, blimp, "--rows", rows],
        ["--nbest", lists, "--all", "--weight", 0.3], ["--nbest", lists, "--eos", "count"],
    ):  # fmt: skip
        found = []
        for more in (["--save", save, "--temperature", T], ["--save", divided], ["--save", save]):
            found.append(figures(text_of(capsys, score, *flags, *more) + (rows.read_text() if rows in flags else "")))
        with_temperature, as_divided, without = found
        assert len(with_temperature) > 5
        for one, other in zip(with_temperature, as_divided, strict=True):
            assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-3, abs=1e-3)), flags
        assert with_temperature != without, flags


@every_kind
def test_adaptive_scores_are_tempered_and_its_learning_is_not(kind, tmp_path, capsys):
    """The formula of dynamic evaluation line by line; lines alone, and tokens with their distributions."""
    lines = [LINES[0], *LINES[2:8]]
    save, text = save_model(tmp_path / "m.pt", **MODELS[kind]), write(tmp_path / "text", lines)
    data = write_corpus(tmp_path / "data")
    how = {"lr": 0.003, "lamb": 0.05, "epsilon": 1e-4}
    slow = SlowDynamics(*double_model(**MODELS[kind]), *how.values())
    slow.take_statistics(read_corpus(str(data), WORDS).train.long(), 8, 100)
    expected = []
    for line in lines:  # a segment each: fewer than 100 tokens move the weights by less
        ids = [0, *encode(line)]
        source, target = torch.tensor(ids[:-1])[:, None], torch.tensor(ids[1:])[:, None]
        loss, _ = mean_loss(*slow.parts, source, target, slow.parts[0].init_hidden(1))
        with torch.no_grad():
            logprob = one_by_one(*slow.parts, ids[:-1])
        power = logprob.exp() ** (1 / T)
        expected.append((power.gather(1, target)[:, 0] / power.sum(1)).log().sum().item())
        slow.move(loss * len(target) / 100)
    flags = ["--save", save, text, "--adaptive", "--data", data, "--batch_size", 8, "--bptt", 100, "--temperature", T]
    flags += [word for name, value in how.items() for word in (f"--{name}", value)]
    rows = list(csv.reader(io.StringIO(text_of(capsys, score, *flags)), delimiter="\t"))[1:]
    assert [float(row[3]) for row in rows] == pytest.approx(expected, abs=5e-3)
    tokens = list(csv.reader(io.StringIO(text_of(capsys, score, *flags, "--tokens", "--nats")), delimiter="\t"))[1:]
    for number, value in enumerate(expected, start=1):
        assert -sum(float(row[3]) for row in tokens if row[0] == str(number)) == pytest.approx(value, abs=5e-3)


# Flags


def test_flags_that_do_nothing_or_are_out_of_range(tmp_path, capsys):
    """generate.py has its own --temperature, of the draws alone: it is not taken twice."""
    save, data = save_model(tmp_path / "m.pt"), write_corpus(tmp_path / "data")
    for script, flags, problem in (
        (pointer, ["--search_temperatures", 0.9], "--search_temperatures 0.9: does nothing without --search"),
        (dynamiceval, ["--search_temperatures", 0.9], "--search_temperatures 0.9: does nothing without --search"),
        (
            pointer,
            ["--search", "--search_temperatures", 0.9, "--temperature", 2],
            "--temperature 2.0: does nothing with",
        ),
        (dynamiceval, ["--search", "--search_temperatures", 1, "--temperature", 2], "--temperature 2.0: does nothing"),
        (pointer, ["--temperature", 0], "--temperature"),
        (score, ["--temperature", "nan", "text"], "--temperature"),
        (dynamiceval, ["--search", "--search_temperatures", 0.9, -1], "--search_temperatures"),
    ):
        assert call(script, "--data", data, "--save", save, *flags) == 2
        assert problem in error_line(capsys)
    prompt = ["--save", save, "--prompt", "w1 w2", "--words", 30, "--seed", 3]
    model, criterion = to_evaluate(load_model(str(save), "--save"), torch.device("cpu"))[:2]
    never, generator = WORDS.index("<unk>"), torch.Generator().manual_seed(3)
    words = generate.generate(model, criterion, [0, 3, 4], 30, 0.5, 0, 1.0, generator, never)
    assert WORDS[3] == "w1"
    drawn = " ".join(WORDS[word] for word in words).replace("<eos>", "\n").split()
    assert text_of(capsys, generate, *prompt, "--temperature", 0.5).split()[2:] == drawn
