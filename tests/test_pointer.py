"""The cache pointer against a float64 brute force: one token at a time, the full mixture over all words."""

import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, read_log, write_corpus
from runner import run_cli
from toys import MODELS, WORDS, Largest, call, double_model, error_line, make_model, make_text, save_model

import pointer
from evaluate import evaluate
from model import Criterion, RNNModel
from pointer import mixture_logprob, pointer_loss, pointer_prob

TEXT = make_text(2100)  # three segments of the shortest length that evaluation uses


@cache
def cached_model(name: str) -> tuple[RNNModel, Criterion]:
    return double_model(**MODELS[name])


@cache
@torch.no_grad()
def token_by_token(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Last layer's raw output (n-1, E) and the model's distribution (n-1, V), a word at a time."""
    model, criterion = cached_model(name)
    hidden, states, probs = model.init_hidden(1), [], []
    for word in TEXT[:-1]:
        output, hidden, raw, _ = model(word.view(1, 1), hidden, return_h=True)
        states.append(raw[-1][0, 0].numpy())
        probs.append(criterion.logprob(model.decoder.weight, model.decoder.bias, output)[0].exp().numpy())
    return np.stack(states), np.stack(probs)


def brute_force(name: str, theta: float, lambdasm: float, window: int) -> float:
    """DESIGN's formula, as it stands: the mean loss over TEXT."""
    states, probs = token_by_token(name)
    words, total = TEXT.numpy(), 0.0
    for i, prob in enumerate(probs):
        seen = slice(max(0, i - window), i)
        if seen.start < seen.stop:
            attention = np.exp(theta * states[seen] @ states[i])
            in_cache = np.zeros(len(WORDS))
            np.add.at(in_cache, words[1:][seen], attention / attention.sum())
            prob = lambdasm * in_cache + (1 - lambdasm) * prob
        assert math.isclose(prob.sum(), 1, abs_tol=1e-9)
        total -= math.log(prob[words[i + 1]])
    return total / len(probs)


@pytest.mark.parametrize("name", MODELS)
def test_pointer_is_the_brute_force_for_every_bptt(name):
    """Loss = brute force to 1e-10, whether the text comes in three segments, in uneven ones, or whole."""
    expected = brute_force(name, theta=0.7, lambdasm=0.2, window=300)
    for bptt in (1, 1500, 5000):
        loss = pointer_loss(*cached_model(name), TEXT, bptt, [0.7], [0.2], [300])
        assert loss.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("window", [0, 1, 7, 127, 128, 129, 1100, 10**30])
def test_every_window_alone_and_beside_others(window):
    """Windows of 0, 1, around the block and the segment, and larger than the text: alone and in a grid."""
    expected = brute_force("LSTM", 1.4, 0.3, window)
    alone = pointer_loss(*cached_model("LSTM"), TEXT, 1, [1.4], [0.3], [window])
    beside = pointer_loss(*cached_model("LSTM"), TEXT, 1, [1.4], [0.3], [50, window, 700])[0, 0, 1]
    assert alone.item() == pytest.approx(expected, abs=1e-10)
    assert beside.item() == pytest.approx(expected, abs=1e-10)


def test_a_grid_is_its_settings_one_by_one():
    """Every cell of (θ, λ, window) is in its place and the same as the brute force."""
    thetas, lambdas, windows = [0.0, 1.1], [0.0, 0.15, 1.0], [20, 400]
    losses = pointer_loss(*cached_model("GRU"), TEXT[:1500], 70, thetas, lambdas, windows)
    for s, theta in enumerate(thetas):
        for i, lambdasm in enumerate(lambdas):
            for w, window in enumerate(windows):
                one = pointer_loss(*cached_model("GRU"), TEXT[:1500], 70, [theta], [lambdasm], [window])
                assert losses[s, i, w].item() == pytest.approx(one.item(), rel=1e-12)
    assert len({round(value, 9) for value in losses[:, 1].flatten().tolist()}) == 4


@pytest.mark.parametrize("block", [1, 3, 64, 10_000])
def test_the_block_size_changes_nothing(monkeypatch, block):
    """Positions one by one, a few, or all at once: the same probabilities."""
    states, words = torch.randn(600, 8, dtype=torch.float64), TEXT[:600]
    expected = pointer_prob(states, words, 150, [0.5], [90, 150])
    monkeypatch.setattr(pointer, "BLOCK", block)
    torch.testing.assert_close(pointer_prob(states, words, 150, [0.5], [90, 150]), expected)


def test_float32_is_the_float64_to_rounding():
    """The model as it is saved, in float32, is within 1e-5 nats of it, sharp attention included."""
    _, model, criterion = make_model()
    loss = pointer_loss(model, criterion, TEXT, 70, [20.0], [0.2], [500])
    assert loss.item() == pytest.approx(brute_force("LSTM", 20.0, 0.2, 500), abs=1e-5)


def test_huge_scores_overflow_nothing():
    """Attention scores far beyond the range of exp still make probabilities between 0 and 1."""
    states, words = 100 * torch.randn(300, 8), TEXT[:300]
    prob = pointer_prob(states, words, 0, [10.0], [100])[..., 1:]
    assert prob.isfinite().all()
    assert prob.min() >= 0
    assert prob.max() <= 1 + 1e-6
    assert prob.max() > 0.9


def test_without_the_pointer_it_is_the_plain_loss():
    """λ = 0 and window 0 are bitwise each other, and evaluate's loss at batch size 1."""
    model, criterion = cached_model("LSTM")
    none = pointer_loss(model, criterion, TEXT, 70, [1.0], [0.0], [500]).item()
    assert none == pointer_loss(model, criterion, TEXT, 70, [1.0], [0.4], [0]).item()
    assert none == pytest.approx(evaluate(model, criterion, TEXT, 70, 1), rel=1e-13)
    log_vocab = torch.randn(50, dtype=torch.float64)
    prob, zero = torch.rand(50, dtype=torch.float64).round(), torch.zeros((), dtype=torch.float64)
    assert torch.equal(mixture_logprob(prob, log_vocab, zero), log_vocab)


def test_the_first_position_is_not_scaled_by_the_share():
    """With no pair yet p_vocab stands alone: a text of one prediction has the plain loss for every λ."""
    model, criterion = cached_model("LSTM")
    plain = evaluate(model, criterion, TEXT[:2], 70, 1)
    for lambdasm in (0.5, 1.0):
        loss = pointer_loss(model, criterion, TEXT[:2], 70, [1.0], [lambdasm], [10]).item()
        assert loss == pytest.approx(plain, rel=1e-13)


def test_memory_is_bounded_by_block_and_window():
    """No tensor made on the way is larger than BLOCK × (window + BLOCK), or than the states themselves."""

    window, n = 200, 3000
    states = torch.randn(n, 4)
    words = torch.randint(50_000, (n,))
    with Largest() as largest:
        pointer_prob(states, words, 0, [1.0], [window])
    assert largest.elements <= max(pointer.BLOCK * (window + pointer.BLOCK), states.numel())
    assert largest.elements >= pointer.BLOCK * window


def printed(out: str) -> dict[str, tuple[float, float]]:
    """split -> (loss, ppl), from the lines that scripts parse."""
    pattern = r"^\| End of pointer \| (val|test) loss +([\d.]+) \| \1 ppl +([\d.]+)$"
    return {s: (float(loss), float(ppl)) for s, loss, ppl in re.findall(pattern, out, re.MULTILINE)}


def test_the_command_prints_and_logs_both_splits(tmp_path):
    """Validation and test in the original's lines; the log has them unrounded; the model is untouched."""
    save, data = save_model(tmp_path / "toy.pt"), write_corpus(tmp_path / "data")
    before = save.read_bytes()
    flags = ["--data", data, "--save", save, "--model", "LSTM", "--lambdasm", 0.1, "--theta", 1.0]
    result = run_cli(*flags, "--window", 500, "--bptt", 5000, "--cuda", cwd=tmp_path, script="pointer.py")
    assert (result.status, result.err) == (0, "")
    figures = printed(result.out)
    assert list(figures) == ["val", "test"]
    logged = read_log(Path(f"{save}.log.jsonl"))
    for line in logged:
        assert figures[line["split"]] == (round(line["loss"], 2), round(line["ppl"], 2))
        assert (line["theta"], line["lambdasm"], line["window"]) == (1.0, 0.1, 500)
    assert [line["split"] for line in logged] == ["val", "test"]
    assert save.read_bytes() == before


def test_no_share_prints_what_the_trainer_prints(tmp_path, capsys):
    """--lambdasm 0 and --window 0: the test line of main.py's evaluation, to the last digit."""
    import main

    save, data = save_model(tmp_path / "toy.pt"), write_corpus(tmp_path / "data")
    assert call(main, "--resume", save, "--epochs", 0, "--data", data) == 0
    expected = re.search(r"test loss +[\d.]+ \| test ppl +[\d.]+", capsys.readouterr().out).group()
    for flags in (["--lambdasm", 0], ["--window", 0]):
        assert call(pointer, "--data", data, "--save", save, *flags) == 0
        assert expected in capsys.readouterr().out


def test_a_share_of_one_is_infinite_and_logged_as_json(tmp_path, capsys):
    """Words that the cache has not seen have no probability at all: printed as inf, in the log null."""
    save, data = save_model(tmp_path / "toy.pt"), write_corpus(tmp_path / "data")
    assert call(pointer, "--data", data, "--save", save, "--lambdasm", 1, "--window", 3) == 0
    assert re.search(r"\| End of pointer \| test loss +inf \| test ppl +inf\n", capsys.readouterr().out)
    for line in read_log(Path(f"{save}.log.jsonl")):
        assert (line["loss"], line["ppl"]) == (None, None)


SEARCH = ["--search", "--search_thetas", 0, 0.5, 2, "--search_lambdas", 0, 0.1, 0.4]
SEARCH += ["--search_windows", 3, 100]


def test_search_takes_the_best_on_validation(tmp_path, capsys):
    """The table has every combination, the best is its least value, and the test line is that setting's."""
    save, data = save_model(tmp_path / "toy.pt"), write_corpus(tmp_path / "data")
    assert call(pointer, "--data", data, "--save", save, *SEARCH) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| +[\d.]+ \|((?: +[\d.]+){3})$", out, re.MULTILINE)
    cells = [float(cell) for row in rows for cell in row.split()]
    assert len(cells) == 3 * 3 * 2
    assert printed(out)["val"][1] == min(cells)
    settings = re.search(r"best on val: (.*)", out).group(1).split()
    assert call(pointer, "--data", data, "--save", save, *settings) == 0
    assert printed(capsys.readouterr().out) == printed(out)


def test_search_never_looks_at_the_test_text(tmp_path, capsys):
    """Another test text changes the test line and nothing before it."""
    save, data = save_model(tmp_path / "toy.pt"), write_corpus(tmp_path / "data")
    outs = []
    for words in (None, "w40 w41 " * 30):
        if words:
            (data / "test.txt").write_text(words + "\n")
        assert call(pointer, "--data", data, "--save", save, *SEARCH) == 0
        outs.append(capsys.readouterr().out.split("| End of pointer | test"))
    assert outs[0][0] == outs[1][0]
    assert outs[0][1] != outs[1][1]


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    """Ranges and other corpora; test_bad_input_cli.py has models that cannot be opened."""
    save, data = save_model(tmp_path / "toy.pt"), write_corpus(tmp_path / "data")
    no_unk = save_model(tmp_path / "no_unk.pt", vocab=["<eos>", *WORDS[2:40]])
    for flags, names in (
        (["--save", save, "--model", "GRU"], "--model GRU"),
        (["--save", save, "--lambdasm", 1.5], "--lambdasm"),
        (["--save", save, "--theta", -1], "--theta"),
        (["--save", save, "--theta", "nan"], "--theta"),
        (["--save", save, "--window", -5], "--window"),
        (["--save", save, "--bptt", 0], "--bptt"),
        (["--save", no_unk], "which has no <unk>"),
        (["--save", save, "--data", tmp_path / "nowhere"], "nowhere"),
    ):
        assert call(pointer, "--data", data, *flags) == 2
        assert names in error_line(capsys)


def test_weights_that_are_not_finite_are_a_failed_run(tmp_path, capsys):
    """A loss of nan is told in one line with status 1, not printed as a perplexity."""
    save, data = save_model(tmp_path / "toy.pt"), write_corpus(tmp_path / "data")
    saved = load(save)
    saved["model"]["encoder.weight"].fill_(torch.nan)
    torch.save(saved, save)
    assert call(pointer, "--data", data, "--save", save) == 1
    assert "nan" in error_line(capsys)
