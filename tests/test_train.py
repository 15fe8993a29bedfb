"""The training step against its equations: rates, regularisation, clipping, averaging; and evaluation."""

import copy
import itertools
import math
import os
import signal
from argparse import Namespace
from pathlib import Path
from typing import NoReturn

import pytest
import reference
import torch
from conftest import load
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from toys import KINDS, NO_DROPOUT, dropouts_of, settings_of

import train
from data import Corpus, VariableLengthSampler, get_batch, rotate_columns
from harness import files
from harness.checkpoint import save_model, save_state
from harness.flags import resolve_args
from harness.ranks import Stop, Stopper
from model import RNNModel, build, detach
from splitcross import SplitCrossEntropyLoss
from train import Run, evaluate, train_step, validate

V, BPTT, LR = 30, 12, 3.0


@pytest.fixture
def make_run(tmp_path):
    """`make_run(**settings)`: a run at its first step, its weights large enough to tell gradients apart."""

    def make(**settings: object) -> Run:
        ids = torch.randint(0, V, (2000,))
        corpus = Corpus([f"w{i}" for i in range(V)], ids, ids[:500], ids[:300], "a digest")
        given = settings_of(settings.pop("model", "LSTM"), emsize=8, nhid=10)
        given |= {"batch_size": 4, "bptt": BPTT, "lr": LR}
        given |= {"alpha": 0.0, "beta": 0.0, "clip": 0.0, "wdecay": 0.0, "save": str(tmp_path / "m.pt")}
        args = resolve_args(given | NO_DROPOUT | settings, {})
        run = Run("main.py", args, corpus, torch.device("cpu"))
        for parameter in run.parameters:
            torch.nn.init.normal_(parameter, std=0.3)
        run.model.train()
        return run

    return make


def draw_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """So many batches of variable length, no two neighbours equally long: source and target, (T, B) each."""
    ids = torch.randint(0, V, (2000,))
    sampler = VariableLengthSampler(ids, BPTT, 4, torch.Generator().manual_seed(1))
    found = [get_batch(ids, slices) for slices in itertools.islice(sampler, count)]
    assert all(len(a[0]) != len(b[0]) for a, b in itertools.pairwise(found))
    return found


def weights(run: Run) -> dict[str, Tensor]:
    """Copies of all that is trained, the criterion's too."""
    return {name: p.detach().clone() for name, p in run.weights.named_parameters()}


class ByHand:
    """The same descent, written out: model and criterion of the run, copied, and plain SGD."""

    def __init__(self, run: Run) -> None:
        self.model, self.criterion = copy.deepcopy(run.model), copy.deepcopy(run.criterion)
        self.hidden = self.model.init_hidden(4)

    def step(self, source: Tensor, target: Tensor, alpha=0.0, beta=0.0, clip=0.0, wdecay=0.0) -> float:
        """One step; returns the plain loss."""
        output, hidden, raw, dropped = self.model(source, self.hidden, return_h=True)
        self.hidden = detach(hidden)
        loss = -self.criterion.logprob(self.model.decoder.weight, self.model.decoder.bias, output)[
            torch.arange(target.numel()), target.reshape(-1)
        ].mean()
        whole = loss + alpha * dropped[-1].pow(2).mean() + beta * (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
        parameters = [*self.model.parameters(), *self.criterion.parameters()]
        gradients = torch.autograd.grad(whole, parameters)
        norm = torch.stack([g.pow(2).sum() for g in gradients]).sum().sqrt()
        scale = min(1.0, clip / norm.item()) if clip else 1.0
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= LR * len(source) / BPTT * (scale * g + wdecay * p)
        return loss.item()


def assert_same(run: Run, by_hand: ByHand) -> None:
    expected = [*by_hand.model.parameters(), *by_hand.criterion.parameters()]
    for (name, found), other in zip(weights(run).items(), expected, strict=True):
        torch.testing.assert_close(found, other.detach(), rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_freed_during_the_backward_pass(make_run, monkeypatch, kind):
    """When the embedding's gradient is there, the last one, no layer's output is in memory any more."""
    run = make_run(model=kind, nlayers=3, dropouth=0.2, dropout=0.2, alpha=2.0, beta=1.0)
    outputs, gone = [], []
    forward = run.model.forward

    def watched(*args: object, **how: object):
        output, hidden, raw, dropped = forward(*args, **how)
        outputs.extend(StorageWeakRef(x.untyped_storage()) for x in (*raw, *dropped))
        return output, hidden, raw, dropped

    monkeypatch.setattr(run.model, "forward", watched)
    run.model.encoder.weight.register_post_accumulate_grad_hook(
        lambda _: gone.extend(output.expired() for output in outputs)
    )
    train_step(run, *draw_batches(1)[0])
    assert gone == [True] * 6


@pytest.mark.parametrize("splits", [[], [5, 12]])
def test_rate_follows_the_batchs_own_length(make_run, splits):
    """Three steps of unlike lengths: each moves by lr · length / bptt times its own gradient."""
    run = make_run(splits=splits)
    by_hand = ByHand(run)
    for batch in draw_batches(3):
        loss = train_step(run, *batch)
        assert loss.item() == pytest.approx(by_hand.step(*batch), rel=1e-5)
        assert_same(run, by_hand)


def test_regularisation_is_in_the_objective_and_not_in_the_loss(make_run):
    """AR on the dropped output and TAR on the raw one drive the step; the reported loss leaves both out."""
    run = make_run(dropout=0.4, dropouth=0.2, dropouti=0.3, wdrop=0.3, alpha=2.0, beta=1.5)
    by_hand, plain, batches = ByHand(run), ByHand(run), draw_batches(3)
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        loss = train_step(run, *batch)
        torch.manual_seed(seed)
        assert loss.item() == pytest.approx(by_hand.step(*batch, alpha=2.0, beta=1.5), rel=1e-5)
        assert_same(run, by_hand)
    torch.manual_seed(0)
    plain.step(*batches[0])
    with pytest.raises(AssertionError):
        assert_same(run, plain)


def test_clipping_covers_the_criterion(make_run):
    """The norm is that of all gradients, the split softmax's own among them, regularisation included."""
    run = make_run(splits=[5, 12], dropout=0.2, alpha=2.0, beta=1.0, clip=0.05)
    by_hand = ByHand(run)
    for seed, batch in enumerate(draw_batches(2)):
        torch.manual_seed(seed)
        train_step(run, *batch)
        torch.manual_seed(seed)
        by_hand.step(*batch, 2.0, 1.0, clip=0.05)
        assert_same(run, by_hand)


def test_weight_decay(make_run):
    """Every weight decays, at the batch's own rate, and clipping does not look at it."""
    run = make_run(splits=[5, 12], wdecay=0.02, clip=0.1)
    by_hand = ByHand(run)
    for batch in draw_batches(2):
        train_step(run, *batch)
        by_hand.step(*batch, clip=0.1, wdecay=0.02)
        assert_same(run, by_hand)


# Averaging


def test_averaging_is_the_mean_of_the_weights_after_each_step(make_run):
    """A slow float64 mean gives the same; the descent goes on with the raw weights, at its scaled rate."""
    run = make_run(splits=[5, 12])
    by_hand, after = ByHand(run), []
    for number, batch in enumerate(draw_batches(9)):
        if number == 3:
            run.start_averaging()
        train_step(run, *batch)
        by_hand.step(*batch)
        assert_same(run, by_hand)
        if number >= 3:
            after.append({name: w.double() for name, w in weights(run).items()})
    assert [*run.best_weights()] == [*run.mean.weights.values()]
    means = {name: p.detach() for name, p in run.mean.weights.named_parameters()}
    assert set(means) == set(after[0])
    for name, mean in means.items():
        expected = torch.stack([step[name] for step in after]).mean(0)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(mean, weights(run)[name], atol=1e-4)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1.0), ("adam", 0.05), ("radam", 0.5)])
def test_two_tailed_from_the_first_step(make_run, optimizer, lr):
    """Over a real text: the model is the long mean, its loss is what is told, the weights go their way without it.

    The reference keeps the weights after every step.
    """
    settings = {"optimizer": optimizer, "lr": lr}
    run = make_run(splits=[5, 12], average="two-tailed", **settings)
    plain = make_run(splits=[5, 12], no_average=True, **settings)
    run.parameters[0].data[0] += 1  # what was before the first step does not count
    plain.weights.load_state_dict(run.weights.state_dict())
    after, long, short, switched = [], 0, 0, []
    judge, how = copy.deepcopy(run.weights).double(), (run.corpus.valid, BPTT, 10)

    def loss_of(begin: int) -> float:
        mean = {name: torch.stack([step[name] for step in after[begin:]]).mean(0) for name in after[0]}
        with torch.no_grad():
            for name, parameter in judge.named_parameters():
                parameter.copy_(mean[name])
        return evaluate(judge["model"], judge["criterion"], *how)

    for number, batch in enumerate(draw_batches(40)):
        train_step(run, *batch)
        run.count_step(torch.zeros(()), len(batch[0]))
        train_step(plain, *batch)
        after.append({name: w.double() for name, w in weights(run).items()})
        if number % 4 == 3:
            before = loss_of(long)
            if loss_of(short) <= before:
                long, short = short, len(after)
            switched.append(short == len(after))
            assert validate(run, lambda: None) == pytest.approx(loss_of(long), abs=1e-5)
            assert evaluate(*run.best_weights(), *how) == pytest.approx(loss_of(long), abs=1e-5)
            run.model.train()
    for parameter, other in zip(run.parameters, plain.parameters, strict=True):
        assert torch.equal(parameter, other)
    assert (run.mean.count, run.mean.short.count) == (len(after) - long, len(after) - short)
    assert {True, False} == set(switched), switched


class OverflowingScaler:
    """What fp16's scaler does when the gradients of the batches numbered `bad` overflow."""

    def __init__(self, bad: set[int]) -> None:
        self.bad, self.batch, self.factor = bad, 0, 2.0**16

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def get_scale(self) -> float:
        return self.factor

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.batch not in self.bad:
            optimizer.step()

    def update(self) -> None:
        self.factor *= 0.5 if self.batch in self.bad else 1.0
        self.batch += 1


def test_a_step_that_fp16_skips_is_not_in_the_mean(make_run):
    """Four batches, two of them skipped: the mean is that of the weights after the other two."""
    run = make_run()
    run.scaler = OverflowingScaler({1, 3})
    run.start_averaging()
    after = []
    for number, batch in enumerate(draw_batches(4)):
        train_step(run, *batch)
        if number not in (1, 3):
            after.append(weights(run))
    assert run.mean.count == 2
    for name, mean in run.mean.weights.named_parameters():
        expected = (after[0][name] + after[1][name]) / 2
        torch.testing.assert_close(mean.detach(), expected, rtol=1e-5, atol=1e-6)


def test_saved_model_is_the_mean(make_run):
    """What is saved while averaging is the mean, the criterion's too, and not the raw weights."""
    run = make_run(splits=[5, 12], wdrop=0.5)
    run.start_averaging()
    for batch in draw_batches(4):
        train_step(run, *batch)
    save_model(run, 1.0)
    model, criterion = run.best_weights()
    saved = load(run.args.save)
    for part, module in (("model", model), ("criterion", criterion)):
        for name, tensor in module.state_dict().items():
            assert torch.equal(saved[part][name], tensor)
    assert not torch.equal(saved["model"]["encoder.weight"], run.model.encoder.weight)
    assert not torch.equal(saved["criterion"]["tail_vectors"], run.criterion.tail_vectors)


# Evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_is_the_reference_whatever_bptt(kind):
    """The mean over the predicted tokens, each counted once, equals float64; `bptt` changes nothing."""
    args = settings_of(kind, emsize=8, nhid=10, splits=[5, 12]) | dropouts_of(kind)
    model, criterion = build(args, V)
    for parameter in [*model.parameters(), *criterion.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    weights = {"model": model.state_dict(), "criterion": criterion.state_dict()}
    saved = {"args": args} | {part: reference.arrays(tensors) for part, tensors in weights.items()}
    ids = torch.randint(0, V, (503,))
    for batch_size in (1, 10):
        expected = reference.mean_loss(saved, ids.numpy(), batch_size)
        for bptt in (1, 7, 70, 1000):
            loss = evaluate(model.train(), criterion, ids, bptt, batch_size)
            assert loss == pytest.approx(expected, rel=1e-6), (batch_size, bptt)


def test_evaluate_touches_no_gradient_and_no_generator():
    """Evaluation draws nothing and leaves no gradients: training after it is the same as without."""
    model, criterion = RNNModel("LSTM", V, 8, 10, 2), SplitCrossEntropyLoss(8, [])
    before = torch.get_rng_state()
    evaluate(model.train(), criterion, torch.randint(0, V, (200,), generator=torch.Generator()), 10, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


# The saved file in code


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_restored_to_evaluate(tmp_path, kind):
    """`load_model` and `to_evaluate` give model and criterion that evaluate as before, with nothing dropped."""
    vocab, path, ids = [f"w{i}" for i in range(V)], str(tmp_path / "m.pt"), torch.randint(0, V, (200,))
    for tied in (True, False):
        args = settings_of(kind, splits=[5, 12], tied=tied) | dropouts_of(kind)
        model, criterion = build(args, V)
        files.save(path, files.model_contents(Namespace(**args), vocab, model, criterion, {"valid_loss": 1.0}))
        opened = files.to_evaluate(files.load_model(path, "--save"), torch.device("cpu"))
        assert opened.vocab == vocab
        assert not opened.model.training
        expected = evaluate(model, criterion, ids, 10, 4)
        assert math.isfinite(expected)
        assert evaluate(opened.model, opened.criterion, ids, 10, 4) == expected


# Files that cannot be written


def full(*_: object) -> NoReturn:
    raise OSError(28, "No space left on device")


def test_a_file_that_cannot_be_written_is_said_once_and_tried_again(make_run, monkeypatch, capsys):
    """One warning for as many attempts, the file before stays; a run that ends then says so, until one works."""
    run = make_run()
    assert save_model(run, 2.0)
    save_state(run)
    model, state = Path(run.args.save), Path(f"{run.args.save}.state")
    before = model.read_bytes(), state.read_bytes()
    assert not run.writing.failed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(3):
            assert not save_model(run, 1.0)
            save_state(run)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    for path, line in zip((model, state), warnings, strict=True):
        assert f"{path}: cannot be written (No space left on device), what was there is kept" in line
    assert (model.read_bytes(), state.read_bytes()) == before
    assert sorted(p.name for p in model.parent.iterdir()) == ["m.pt", "m.pt.state"]

    for failing in ("m.pt", "m.pt.state"):
        with pytest.raises(files.NotWrittenError, match=rf"{failing}: cannot be written .No space left on device."):
            train.finish(run, "SIGTERM")
        assert save_model(run, 1.0)
    save_state(run)
    assert train.finish(run, "SIGTERM") == 143
    assert load(model)["metrics"]["valid_loss"] == 1.0
    assert not capsys.readouterr().err


def test_a_device_that_fails_while_a_file_is_written_is_no_full_disk(make_run, monkeypatch, capsys):
    """Its error is raised as it is, and the file before stays."""
    run = make_run()
    save_model(run, 2.0)
    before = Path(run.args.save).read_bytes()

    def fail(contents: object, file: object) -> NoReturn:
        file.write(b"half a file")
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    for attempt in (lambda: save_model(run, 1.0), lambda: save_state(run)):
        with pytest.raises(torch.AcceleratorError):
            attempt()
    assert not run.writing.failed
    assert not capsys.readouterr().err
    assert Path(run.args.save).read_bytes() == before
    assert [p.name for p in Path(run.args.save).parent.iterdir()] == ["m.pt"]


# Signals


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        ([signal.SIGINT], "SIGINT"),
        ([signal.SIGTERM], "SIGTERM"),
        ([signal.SIGINT, signal.SIGTERM], "SIGTERM"),
        ([signal.SIGTERM, signal.SIGINT], "SIGTERM"),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], "SIGTERM"),
        ([signal.SIGHUP, signal.SIGUSR1], "SIGHUP"),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP], "SIGTERM"),
        ([signal.SIGPIPE, signal.SIGINT], "SIGPIPE"),
    ],
)
def test_the_most_urgent_signal_counts(signals, reason):
    """A signal is noted, and obeyed by the next check; only a second Ctrl-C interrupts at once."""
    with Stopper() as stopper:
        stopper.check()
        for number in signals:
            signal.raise_signal(number)
        with pytest.raises(Stop) as stop:
            stopper.check("--max_steps")
        assert stop.value.reason == reason
        assert stopper.ending() == ("" if reason == "SIGINT" else reason)
        if reason == "SIGINT":
            stopper.check_ending()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_a_processor_without_bfloat16_stays_in_float32_and_says_so(make_run, monkeypatch, capsys):
    """One warning, and no autocast."""
    monkeypatch.setattr("products.has_bf16", lambda: False)
    assert make_run(amp="bf16").amp is None
    assert capsys.readouterr().err.count("has no bfloat16; it stays with float32") == 1
    monkeypatch.setattr("products.has_bf16", lambda: True)
    assert make_run(amp="bf16").amp is torch.bfloat16
    assert not capsys.readouterr().err


def test_shuffled_epochs_begin_each_column_where_its_own_new_draw_says(make_run):
    run, drawn = make_run(shuffle=True), []
    for _ in range(2):
        run.start_epoch()
        drawn.append(run.offsets)
        text = torch.cat([source for source, _ in train.train_batches(run)])
        rotated = rotate_columns(run.corpus.train, 4, run.offsets).view(4, -1).T
        assert torch.equal(text, rotated[: len(text)])
        assert len(text) == len(rotated) - 1
        run.at.epoch += 1
        run.at.restart_epoch()
    assert not torch.equal(*drawn)
    assert all(len(set(offsets.tolist())) > 1 for offsets in drawn)


@pytest.mark.parametrize(
    ("bptt", "given", "expected"),  # 2,000 tokens in 4 columns
    [(5, None, 10), (6, None, 9), (300, None, 1), (600, None, 1), (5, 17, 17), (5, 2000, 2000)],
)
def test_a_line_per_tenth_of_a_short_epoch(make_run, bptt, given, expected):
    assert make_run(bptt=bptt, log_interval=given).log_interval == expected


def test_a_line_per_200_batches_of_a_long_epoch(make_run):
    assert make_run(bptt=1, batch_size=1).log_interval == 200


@pytest.mark.parametrize("samples", [1, 3])
def test_a_mixture_is_trained_with_a_mask_per_column_on_its_latents(make_run, monkeypatch, samples):
    run, seen = make_run(n_experts=2, dropoutl=0.5, samples=samples), []
    assert run.criterion.dropout.p == 0.5
    experts = run.criterion.experts
    monkeypatch.setattr(run.criterion, "experts", lambda x, columns: seen.append(columns) or experts(x, columns))
    train_step(run, *draw_batches(1)[0])
    assert seen == [4 * samples]
    run.criterion.eval()
    run.start_epoch()
    assert run.criterion.training


@pytest.mark.parametrize("kind", ["LSTM", "QRNN", "rlstm"])
@pytest.mark.parametrize("samples", [1, 3])
def test_columns_start_from_zero_as_often_as_drop_state_says(make_run, kind, samples):
    """Each column of the batch by itself; the copies of a column by --samples together, in all layers and tensors."""
    run, (batch,), seen = make_run(model=kind, drop_state=0.3, samples=samples), draw_batches(1), []
    run.model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    for _ in range(200):
        run.hidden = [tuple(map(torch.ones_like, carried)) for carried in run.hidden]
        train_step(run, *batch)
    expected = torch.rand(200, 4, generator=torch.Generator().manual_seed(run.args.seed)) >= 0.3
    assert expected.all(1).any(), "else a batch without a draw is not tested"
    for hidden, kept in zip(seen, expected, strict=True):
        for tensor in (tensor for carried in hidden for tensor in carried):
            assert torch.equal(tensor, kept.repeat_interleave(samples)[None, :, None].expand_as(tensor).float())


def test_without_drop_state_nothing_is_drawn(make_run):
    """The generator of batch lengths stays as it was, and the state that is carried is handed on as it is."""
    run, (batch,), seen = make_run(drop_state=0.0), draw_batches(1), []
    run.model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    before, hidden = run.length_generator.get_state(), run.hidden
    train_step(run, *batch)
    assert torch.equal(run.length_generator.get_state(), before)
    assert seen[0] is hidden


def test_a_batch_of_one_row_has_no_temporal_regularisation(make_run):
    run, ((source, target),) = make_run(beta=1.0), draw_batches(1)
    train_step(run, source[:1], target[:1])
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_signals_mean_what_they_did_before_once_training_is_over():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stopper():
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
