"""Ids to batches: a corpus as `corpus/read.py` reads it, cut into columns of running text.

A text is cut into B columns of equal length, its remainder trimmed; a batch is the next T rows. With the
alphabet as text and B = 4 (the batch of T = 2 rows at the start has a-g-m-s, b-h-n-t as its source):

    a g m s     source  a g m s     target  b h n t
    b h n t             b h n t             c i o u
    c i o u
    . . . .

The batch after it goes on where it ended, so that the hidden state carries over, column by column.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from utils import BPTTBatchSampler, UserError, not_a_command

EVAL_BATCH_SIZE, TEST_BATCH_SIZE = 10, 1  # as published


class Corpus(NamedTuple):
    """Three texts as token ids, and their vocabulary (N tokens per text, `<eos>` counted).

    vocab: id -> word, sorted by frequency in the training text, ties in order of first appearance.
    train, valid, test: (N,) int16 if the ids fit, else int32; memory-mapped from the cache.
    digest: the sha256 of the three texts.
    tokenizer: the contents of the folder's tokenizer.json, or None.
    """

    vocab: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor
    digest: str
    tokenizer: str | None = None

    def to(self, device: torch.device) -> "Corpus":
        return self._replace(train=self.train.to(device), valid=self.valid.to(device), test=self.test.to(device))


class VariableLengthSampler(BPTTBatchSampler):
    """Slices of a variable length, the same for all columns: PyTorch-NLP's sampler with drawn lengths.

    A batch's length (AWD, section 5): `bptt` with probability 0.95, else `bptt / 2`; then a normal draw of
    deviation 5 around it, cut to an integer, at least 5; at most `max_length` if that is given.

    Args:
        data: the text, 1-D; only its length is used.
        generator: draws the lengths; its state is stored with a run.
        start: the row to begin at, for a run that goes on in the middle of an epoch.
    """

    __len__ = None  # the number of batches depends on the draws

    def __init__(
        self, data: Tensor, bptt: int, batch_size: int, generator: torch.Generator,
        start: int = 0, max_length: int = 0,
    ) -> None:  # fmt: skip
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


def rotate_columns(ids: Tensor, batch_size: int, offsets: Tensor) -> Tensor:
    """The text with column b rotated by offsets[b] rows (partial shuffling; Press, arXiv 1903.04167)."""
    rows = len(ids) // batch_size
    columns = ids[: rows * batch_size].view(batch_size, rows)
    return torch.cat([column.roll(-int(offset)) for column, offset in zip(columns, offsets, strict=True)])


def get_batch(ids: Tensor, slices: list[slice]) -> tuple[Tensor, Tensor]:
    """Source and target of one draw of slices, one slice per column: (T, B) and (T, B), int64.

    Both are views of the same T + 1 rows.
    """
    rows = torch.stack([ids[s.start : s.stop + 1] for s in slices], dim=1).long()  # (T + 1, B)
    return rows[:-1], rows[1:]


def eval_batches(ids: Tensor, bptt: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole text in batches of `bptt` rows and `batch_size` columns: source and target, (T, B) each."""
    sampler = BPTTBatchSampler(ids, bptt, batch_size, drop_last=True)
    return (get_batch(ids, slices) for slices in sampler)


def check_length(ids: Tensor, batch_size: int, data: str, split: str = "training") -> None:
    """Raises UserError when a text of the corpus `data` is too short for a batch: two rows of `batch_size` columns."""
    if len(ids) < 2 * batch_size:
        hint = f"give --batch_size {len(ids) // 2} at most, or more training text"
        if split == "validation":  # the flag changes nothing there
            hint = "give more validation text (with prepare.py, a larger --valid or a --valid_file)"
        raise UserError(
            f"{data}: the {split} text has {len(ids)} tokens, too few for a batch of {batch_size} columns, which takes "
            f"{2 * batch_size}; {hint}"
        )


if __name__ == "__main__":
    not_a_command(__file__)
