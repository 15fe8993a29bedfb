"""The words of a training text, counted row by row: BabyLM's rules ask for the model after so many words of training.

Shapes: B columns of the text, L rows in each, V vocabulary.
"""

import torch
from torch import Tensor

from corpus.codec import texts_of_pieces
from corpus.read import EOS
from utils import not_a_command

MILLION = 1_000_000
# Every million words to ten, every ten to a hundred, every hundred to a thousand (babylm.github.io, 2025 and 2026).
MARKS = [n * step for step in (1, 10, 100) for n in range(1, 10)] + [1000]


class WordCount:
    """Counts the words that training has seen.

    A word is a token other than `<eos>`. With a tokenizer of characters or subwords it is a word of the text: a
    stretch without white space.

    Args:
        ids: (B·L,), the training text, column after column, or a few more.
        batch_size: B.
    """

    def __init__(self, tokenizer: str | None, vocab: list[str], ids: Tensor, batch_size: int) -> None:
        device, self.batch_size = ids.device, batch_size
        texts = texts_of_pieces(tokenizer, vocab)
        if texts is None:
            whole = [int(word != EOS) for word in vocab]
            first = last = [False for _ in vocab]
        else:  # each word that begins after white space inside of a piece, and one at its first character
            whole = [len(text.split()) - (text[:1].strip() != b"") for text in texts]
            first = [text[:1].strip() != b"" for text in texts]
            last = [text[-1:].strip() == b"" for text in texts]
        self.inside = torch.tensor(whole, dtype=torch.uint8, device=device)  # (V,): words that begin inside of it
        self.starts = torch.tensor(first, device=device)  # (V,): whether its first character belongs to a word
        self.ends = torch.tensor(last, device=device)  # (V,): whether its last character is white space
        self.rows = self.count_rows(ids)  # (L,): the words up to each row of the epoch
        self.total = int(self.rows[-1])  # of an epoch

    def count_rows(self, ids: Tensor) -> Tensor:
        """The words in the rows up to each row of all columns, (L,); the first row is only a source."""
        rows = len(ids) // self.batch_size
        counts = torch.zeros(rows, dtype=torch.int64, device=ids.device)
        for column in ids[: rows * self.batch_size].view(self.batch_size, rows):
            source, target = column[:-1].long(), column[1:].long()
            counts[1:] += self.inside[target] + (self.starts[target] & self.ends[source])
        return counts.cumsum(0).cpu()  # a synchronisation on CUDA

    def start_epoch(self, ids: Tensor) -> None:
        """Counts an epoch whose columns are rotated (--shuffle).

        Another row is then only a source, so the epoch's count can differ by up to B words. Every epoch still counts as
        many words, so that no mark falls between two epochs.
        """
        self.rows = self.count_rows(ids).clamp(max=self.total)
        self.rows[-1] = self.total

    def marks(self, epoch: int, start: int, end: int) -> list[int]:
        """The marks, in millions of words, that training passes from row `start` of an epoch to its row `end`."""
        before, after = (int((epoch - 1) * self.total + self.rows[row]) for row in (start, end))
        return [mark for mark in MARKS if before < mark * MILLION <= after]


if __name__ == "__main__":
    not_a_command(__file__)
