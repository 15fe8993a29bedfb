"""Batches of running text: fixed length for evaluation, variable length for training.

The text is cut into B columns of equal length, its remainder trimmed; a batch is the next T rows. With the
alphabet as text and B = 4 (the batch of T = 2 rows at the start has a-g-m-s, b-h-n-t as its source):

    a g m s     source  a g m s     target  b h n t
    b h n t             b h n t             c i o u
    c i o u
    . . . .

A batch after it goes on where it ended, so that the hidden state carries over, column by column.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compat import BPTTBatchSampler
from data import read_corpus
from utils import UserError

EVAL_BATCH_SIZE, TEST_BATCH_SIZE = 10, 1  # as published


class VariableLengthSampler(BPTTBatchSampler):
    """Slices of a variable length, the same for all columns: PyTorch-NLP's sampler with drawn lengths.

    A batch's length (AWD, section 5): `bptt` with probability 0.95, else `bptt / 2`; then a normal draw of
    deviation 5 around it, cut to an integer, at least 5; at most `max_length` when that is given.

    Args:
        data: the text, 1-D; only its length is looked at.
        generator: where the lengths are drawn from; its state is part of a resumable run.
        start: the row to begin at, for a run that goes on in the middle of an epoch.
    """

    def __init__(
        self,
        data: Tensor,
        bptt: int,
        batch_size: int,
        generator: torch.Generator,
        start: int = 0,
        max_length: int = 0,
    ) -> None:
        super().__init__(data, bptt, batch_size, drop_last=True)
        self.bptt, self.generator, self.start, self.max_length = bptt, generator, start, max_length
        self.rows = len(data) // batch_size

    def draw_length(self) -> int:
        bptt = self.bptt if torch.rand((), generator=self.generator) < 0.95 else self.bptt / 2
        length = max(5, int(torch.normal(float(bptt), 5.0, (1,), generator=self.generator).item()))
        return min(length, self.max_length) if self.max_length else length

    def __iter__(self) -> Iterator[list[slice]]:
        row, last = self.start, self.rows - 1  # the last row is a target only
        while row < last:
            length = min(self.draw_length(), last - row)
            yield [slice(column["offset"] + row, column["offset"] + row + length) for column in self.samplers]
            row += length


def get_batch(ids: Tensor, slices: list[slice]) -> tuple[Tensor, Tensor]:
    """Source and target of one draw of slices, a slice a column: (T, B) and (T, B), int64.

    Both are views of the same T + 1 rows, so no target can belong to another draw than its source.
    """
    rows = torch.stack([ids[s.start : s.stop + 1] for s in slices], dim=1).long()  # (T + 1, B)
    return rows[:-1], rows[1:]


def eval_batches(ids: Tensor, bptt: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of the text in batches of `bptt` rows and `batch_size` columns: source and target, (T, B) each.

    The state carries over, so the length of a segment changes no figure; short segments of few columns are
    made longer, since the matrix products like at least a thousand rows at once.
    """
    sampler = BPTTBatchSampler(ids, max(bptt, 1024 // batch_size), batch_size, drop_last=True)
    return (get_batch(ids, slices) for slices in sampler)


@dataclass
class Texts:
    """The three splits as 1-D integers on the device, and the vocabulary they are encoded with."""

    vocab: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor


def load_texts(
    data: str,
    vocab: list[str] | None,
    device: torch.device,
    batch_size: int,
    vocab_size: int = 0,
    min_count: int = 0,
) -> Texts:
    """Reads a corpus (see `data.read_corpus`) onto the device and checks that each split fills a batch.

    Raises:
        UserError: the corpus cannot be read, or is too short.
    """
    corpus = read_corpus(data, vocab, vocab_size, min_count)
    check_length(corpus.train, batch_size, f"{data}: training text")
    check_length(corpus.valid, EVAL_BATCH_SIZE, f"{data}: validation text")
    return Texts(corpus.vocab, *(ids.to(device) for ids in (corpus.train, corpus.valid, corpus.test)))


def check_length(ids: Tensor, batch_size: int, name: str) -> None:
    """Raises UserError when the text is too short for one batch: two rows of `batch_size` columns."""
    if len(ids) < 2 * batch_size:
        raise UserError(
            f"{name}: {len(ids)} tokens are too few for a batch of {batch_size} columns, which takes "
            f"{2 * batch_size}; use a smaller --batch_size or more text"
        )
