"""The settings that shape the model of modeling_awd_lm.py, as config.json has them."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class AwdLmConfig(PretrainedConfig):
    """The shape of a model.

    Args:
        kind: of the recurrent layers: LSTM, GRU, QRNN or Mogrifier.
        sizes: the embedding's width, then that of each layer's output.
        vocab_size: words, and `<pad>` as the last one.
        tied: the output layer multiplies by the embedding.
        splits: the first word of each cluster of a split softmax; empty for one softmax.
        n_experts: softmaxes in the mixture; 0 for none.
        rounds, rank: of a Mogrifier; rank 0 is full rank.
        cell: of a Mogrifier: lstm or rlstm.
        max_position_embeddings: for programs that ask for a longest text. The model has no limit.
    """

    model_type = "awd_lm"

    def __init__(
        self, kind: str = "LSTM", sizes: Sequence[int] = (400, 1150, 1150, 400), vocab_size: int = 10_001,
        tied: bool = True, splits: Sequence[int] = (), n_experts: int = 0, rounds: int = 0, rank: int = 0,
        cell: str = "lstm", max_position_embeddings: int = 1_000_000, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.kind, self.sizes, self.vocab_size, self.tied = kind, list(sizes), vocab_size, tied
        self.splits, self.n_experts, self.rounds, self.rank = list(splits), n_experts, rounds, rank
        self.cell, self.max_position_embeddings = cell, max_position_embeddings
        derived = {"hidden_size": self.sizes[-1], "num_hidden_layers": len(self.sizes) - 1}
        # False, tied or not: a tied weight exists once, and Transformers has nothing to tie.
        super().__init__(**{**kwargs, **derived, "tie_word_embeddings": False})
