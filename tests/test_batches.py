"""Batches: the text is covered once, targets are sources shifted by one, lengths are drawn as they should."""

import itertools
import string

import pytest
import torch
from reference import columns
from torch import Tensor

from data import VariableLengthSampler, check_length, eval_batches, get_batch, rotate_columns
from utils import UserError

LETTERS = torch.arange(26)


def sampler(ids: Tensor, bptt: int, batch_size: int, seed: int = 0, **more: int) -> VariableLengthSampler:
    return VariableLengthSampler(ids, bptt, batch_size, torch.Generator().manual_seed(seed), **more)


def test_columns_of_the_alphabet():
    """The layout as drawn at the top of data.py: a-g-m-s, b-h-n-t, ..., y and z trimmed."""
    sources, targets = map(torch.cat, zip(*eval_batches(LETTERS, 2, 4), strict=True))
    assert "".join(string.ascii_lowercase[i] for i in sources.flatten()) == "agmsbhntcioudjpvekqw"
    assert "".join(string.ascii_lowercase[i] for i in targets.flatten()) == "bhntcioudjpvekqwflrx"


@pytest.mark.parametrize("n", [14, 401, 3000])
def test_training_covers_the_text_once(n):
    """Sources in order are all rows but the last, targets all rows but the first, column by column."""
    ids = torch.arange(n)
    for batch_size, bptt, seed in itertools.product((1, 4, 7), (1, 12, 70), range(3)):
        batches = [get_batch(ids, slices) for slices in sampler(ids, bptt, batch_size, seed)]
        text = columns(ids, batch_size)
        assert torch.equal(torch.cat([source for source, _ in batches]), text[:-1])
        assert torch.equal(torch.cat([target for _, target in batches]), text[1:])
        assert all(source.shape == target.shape for source, target in batches)


@pytest.mark.parametrize("n", [20, 401, 3000])
def test_evaluation_covers_the_text_once(n):
    """Every row but the first is predicted exactly once; each batch has `bptt` rows, the last one what is left."""
    ids = torch.arange(n)
    for batch_size, bptt in itertools.product((1, 4, 10), (1, 12, 70, 10_000)):
        batches = list(eval_batches(ids, bptt, batch_size))
        text = columns(ids, batch_size)
        whole, rest = divmod(len(text) - 1, bptt)
        assert [len(source) for source, _ in batches] == [bptt] * whole + [rest] * (rest > 0)
        assert torch.equal(torch.cat([source for source, _ in batches]), text[:-1])
        assert torch.equal(torch.cat([target for _, target in batches]), text[1:])


def test_partial_shuffling_rotates_every_column_by_its_own_offset():
    ids = torch.arange(3 * 7 + 2)  # two tokens too many for three columns
    rotated = rotate_columns(ids, 3, torch.tensor([0, 1, 6])).view(3, 7).tolist()
    assert rotated == [[0, 1, 2, 3, 4, 5, 6], [8, 9, 10, 11, 12, 13, 7], [20, 14, 15, 16, 17, 18, 19]]


def test_batches_are_what_an_embedding_takes():
    """Small stored integers come out as int64."""
    ids = torch.arange(100).to(torch.int16)
    source, target = next(iter(eval_batches(ids, 5, 4)))
    assert source.dtype == target.dtype == torch.int64
    source, target = get_batch(ids, next(iter(sampler(ids, 5, 4))))
    assert source.dtype == target.dtype == torch.int64


def lengths(bptt: int, count: int = 8000, **more: int) -> Tensor:
    """The lengths of so many batches, the last one of the text left out: (count,)."""
    ids = torch.zeros(1, dtype=torch.int8).expand(count * (bptt + 10))
    batches = zip(sampler(ids, bptt, 1, **more), range(count), strict=False)
    return torch.tensor([len(get_batch(ids, slices)[0]) for slices, _ in batches], dtype=torch.float64)


def test_length_distribution():
    """70 with probability 0.95, else 35; a normal draw of deviation 5 around it."""
    drawn = lengths(70)
    short = drawn < 52.5
    assert short.double().mean() == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / len(drawn)) ** 0.5)
    for part, mean in ((drawn[~short], 70), (drawn[short], 35)):
        tolerance = 5 * 5 / len(part) ** 0.5
        assert mean - 0.5 - tolerance < part.mean() < mean + tolerance  # rounded, or cut to an integer
        assert part.std() == pytest.approx(5, rel=5 / (2 * len(part)) ** 0.5)
        assert (part - part.mean()).pow(3).mean() / 125 == pytest.approx(0, abs=5 * (6 / len(part)) ** 0.5)
    assert torch.equal(drawn, drawn.round())
    correlation = torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]
    assert abs(correlation) < 5 / len(drawn) ** 0.5


def test_length_is_at_least_five():
    """Around a `bptt` of 6 many draws lie below 5, and become 5."""
    drawn = lengths(6)
    assert drawn.min() == 5
    assert 0.3 < (drawn == 5).double().mean() < 0.7


def test_length_is_capped():
    """`max_length` is a cap on every batch, and changes no shorter one."""
    free, capped = lengths(70), lengths(70, max_length=72)
    assert free.max() > 80
    assert torch.equal(capped, free.clamp(max=72))


def test_nobody_knows_how_many_batches_there_are():
    """The number depends on the draws, so `len` of the sampler is an error rather than torchnlp's guess."""
    with pytest.raises(TypeError):
        len(sampler(LETTERS, 5, 2))


def test_lengths_come_from_their_own_generator():
    """The same seed gives the same lengths, another one others, and torch's own generator is not touched."""
    before = torch.get_rng_state()
    first, same, other = ([*sampler(torch.arange(2000), 20, 2, seed)] for seed in (1, 1, 2))
    assert first == same != other
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_goes_on_where_it_stopped():
    """From a row and the generator's state at any batch, the rest of the epoch is the same."""
    ids = torch.arange(1000)
    generator = torch.Generator().manual_seed(4)
    row, stops, epoch = 0, [], []
    for slices in VariableLengthSampler(ids, 20, 3, generator):
        source, _ = get_batch(ids, slices)
        epoch.append(source)
        row += len(source)
        stops.append((row, generator.get_state()))
    for done, (row, state) in enumerate(stops[:-1], start=1):
        again = VariableLengthSampler(ids, 20, 3, torch.Generator().set_state(state), start=row)
        rest = torch.cat([get_batch(ids, slices)[0] for slices in again])
        assert torch.equal(rest, torch.cat(epoch[done:]))
        assert torch.equal(rest, columns(ids, 3)[row:-1])


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_text_has_to_fill_one_batch(batch_size):
    """Two rows make one batch; a token less is an error that names the text, both numbers, and what to do."""
    ids = torch.arange(2 * batch_size)
    check_length(ids, batch_size, "data/x")
    assert len(list(eval_batches(ids, 70, batch_size))) == 1
    size = rf"text has {2 * batch_size - 1} tokens, too few for a batch of {batch_size} columns, .*; give"
    with pytest.raises(UserError, match=rf"data/x: the training {size} --batch_size {batch_size - 1} at most, or more"):
        check_length(ids[1:], batch_size, "data/x")
    with pytest.raises(UserError, match=rf"data/x: the validation {size} more validation text"):
        check_length(ids[1:], batch_size, "data/x", "validation")
