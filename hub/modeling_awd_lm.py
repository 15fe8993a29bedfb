"""AWD-LSTM language models and their kin for Transformers: evaluation and generation.

It needs torch, Transformers (4.51 to 5.x) and the two files beside it. Nothing is dropped out, in training neither.

Shapes: B rows, T time, E embedding, H hidden, V vocabulary (`<pad>` is its last entry), K experts.

    input_ids (B, T) -> embedding (B, T, E) -> layer 1 -> ... -> layer L (B, T, H) -> logits (B, T, V)

The logits of a split softmax and of a mixture are log-probabilities, which `log_softmax` does not change.

Padding: the tokens of a row are brought to its front, the layers run, and every column gets the output after the last
token up to it. So a row's results do not depend on where its padding is, and the last column has the row's last output.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

from .configuration_awd_lm import AwdLmConfig
from .layers_awd_lm import LAYERS, Carried


class Decoder(nn.Module):
    """The output layer: one softmax, a split one, or a mixture."""

    def __init__(self, config: AwdLmConfig) -> None:
        super().__init__()
        self.config, H = config, config.hidden_size
        E = config.sizes[0] if config.n_experts else H
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not config.tied:
            self.weight = nn.Parameter(torch.zeros(config.vocab_size, E))
        if config.splits:
            self.tail_vectors = nn.Parameter(torch.zeros(len(config.splits), H))
            self.tail_bias = nn.Parameter(torch.zeros(len(config.splits)))
        if config.n_experts:
            self.prior = nn.Linear(H, config.n_experts, bias=False)
            self.latent = nn.Linear(H, config.n_experts * E)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, V)."""
        weight = embedding if self.config.tied else self.weight
        if self.config.n_experts:
            return self.mixture(x, weight)
        return self.split(x, weight) if self.config.splits else F.linear(x, weight, self.bias)

    def split(self, x: Tensor, weight: Tensor) -> Tensor:
        """log p(w) = log p(its cluster's tombstone) + log p(w | cluster): arXiv 1803.08240, section 3.2."""
        splits, first = self.config.splits, self.config.splits[0]
        vectors, bias = torch.cat([weight[:first], self.tail_vectors]), torch.cat([self.bias[:first], self.tail_bias])
        head = F.linear(x, vectors, bias).log_softmax(-1)
        parts = [head[..., :first]]
        for k, (start, end) in enumerate(pairwise([*splits, len(weight)])):
            inside = F.linear(x, weight[start:end], self.bias[start:end]).log_softmax(-1)
            parts.append(head[..., first + k, None] + inside)
        return torch.cat(parts, dim=-1)

    def mixture(self, x: Tensor, weight: Tensor) -> Tensor:
        """log Σ_k π_k · softmax(W · tanh(L_k · h + b_k) + b): arXiv 1711.03953."""
        prior = self.prior(x).log_softmax(-1)  # (B, T, K)
        latents = torch.tanh(self.latent(x)).chunk(self.config.n_experts, -1)
        parts = (F.linear(x, weight, self.bias).log_softmax(-1) + prior[..., k, None] for k, x in enumerate(latents))
        return reduce(torch.logaddexp, parts)


# Padding and memory


def find_padding(mask: Tensor | None, T: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Where the tokens of padded rows are; None if nothing is padded. Of a mask per query, the last query's is taken.

    Returns the columns with a row's tokens first (B, T); for every column the place among these of the last token up
    to it (B, T); the numbers of tokens (B,).
    """
    while mask is not None and mask.dim() > 2:
        mask = mask[:, -1]
    if mask is None or bool((mask[:, -T:] != 0).all()):
        return None
    padded = mask[:, -T:] == 0
    places = (~padded).long().cumsum(1)
    return torch.argsort(padded.long(), dim=1, stable=True), (places - 1).clamp(min=0), places[:, -1].clamp(min=1)


def take(x: Tensor, columns: Tensor) -> Tensor:
    """The columns of each row: (B, T, H), (B, T) -> (B, T, H)."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.size(2)))


def mark(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """The ids with -1 for padding."""
    if mask is None or mask.dim() > 2:
        return input_ids
    return input_ids.masked_fill(mask[:, -input_ids.size(1) :] == 0, -1)


@dataclass
class Memory:
    """What the layers carry, and the ids that they have read, (B, T), so that it is never used for another text."""

    seen: Tensor
    layers: list[Carried]

    def for_rows(self, ids: Tensor) -> "Memory | None":
        """The memory of rows that begin with what was read, in any order, as beam search has it; None: none is."""
        begins = ids[:, : self.seen.size(1)]
        if ids.size(1) <= self.seen.size(1):
            return None
        if torch.equal(begins, self.seen):
            return self
        found, rows = (begins[:, None] == self.seen[None]).all(2).max(1)  # (B,) each
        if not bool(found.all()):
            return None
        return Memory(begins, [tuple(tensor[:, rows] for tensor in carried) for carried in self.layers])


@dataclass
class AwdLmOutput(BaseModelOutput):
    memory: Memory | None = None


@dataclass
class AwdLmCausalOutput(CausalLMOutput):
    memory: Memory | None = None


class AwdLmPreTrainedModel(PreTrainedModel):
    config_class = AwdLmConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # the loss is a mean over this batch
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.uniform_(parameter, -0.1, 0.1)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder if self.base_model is self else self.base_model.encoder

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.encoder = value

    def get_output_embeddings(self) -> None:
        """None: the output layer is no single linear layer."""

    def give(self, output: Any, return_dict: bool | None) -> Any:
        """The output, or a tuple of its parts."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class AwdLmModel(AwdLmPreTrainedModel):
    """Embedding and recurrent layers."""

    def __init__(self, config: AwdLmConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.sizes[0])
        kind = LAYERS[config.kind if config.cell == "lstm" else config.cell]
        self.rnns = nn.ModuleList(kind(a, b, i == 0, config) for i, (a, b) in enumerate(pairwise(config.sizes)))
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, memory: Memory | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None, **kwargs: Any,
    ) -> AwdLmOutput | tuple[Any, ...]:  # fmt: skip
        """`memory`: that of an output of `use_cache=True`, to go on from."""
        x = self.encoder(input_ids) if inputs_embeds is None else inputs_embeds
        order, back, lengths = find_padding(attention_mask, x.size(1)) or (None, None, None)
        x = x if order is None else take(x, order)
        every, carried = [x], []
        for i, layer in enumerate(self.rnns):
            x = sum(every[1:-1], x) if self.config.cell == "rlstm" and i else x  # residual layers
            x, after = layer(x, memory.layers[i] if memory else None, lengths if use_cache else None)
            every.append(x)
            carried.append(after)
        if self.config.kind == "Mogrifier":  # its layers are summed
            every[-1] = sum(every[1:-1], every[-1])
        every = every if back is None else [take(x, back) for x in every]
        new = None
        if use_cache and input_ids is not None:
            seen = mark(input_ids, attention_mask)
            new = Memory(torch.cat([memory.seen, seen], dim=1) if memory else seen, carried)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return self.give(AwdLmOutput(every[-1], tuple(every) if wanted else None, memory=new), return_dict)


class AwdLmForCausalLM(AwdLmPreTrainedModel, GenerationMixin):
    def __init__(self, config: AwdLmConfig) -> None:
        super().__init__(config)
        self.model, self.decoder = AwdLmModel(config), Decoder(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        logits_to_keep: int = 0, return_dict: bool | None = None, **kwargs: Any,
    ) -> AwdLmCausalOutput | tuple[Any, ...]:  # fmt: skip
        """As `AwdLmModel`. `labels`: ids (B, T), -100 for none. `logits_to_keep`: of the last columns; 0: of all."""
        out = self.model(input_ids, attention_mask, return_dict=True, **kwargs)
        logits, loss = self.decoder(out.last_hidden_state[:, -logits_to_keep:], self.model.encoder.weight), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return self.give(AwdLmCausalOutput(loss, logits, out.hidden_states, memory=out.memory), return_dict)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: Memory | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The ids that were not read yet. Transformers' own names for a cache differ by version; none is used."""
        memory = memory.for_rows(mark(input_ids, attention_mask)) if memory and use_cache else None
        start = memory.seen.size(1) if memory else 0
        mask = None if attention_mask is None else attention_mask[:, start:]
        inputs = {"input_ids": input_ids[:, start:], "attention_mask": mask, "memory": memory, "use_cache": use_cache}
        return {**inputs, "logits_to_keep": 1, "output_hidden_states": output_hidden_states}

    def _update_model_kwargs_for_generation(self, outputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super()._update_model_kwargs_for_generation(outputs, *args, **kwargs), "memory": outputs.memory}


class AwdLmForSequenceClassification(AwdLmPreTrainedModel):
    """A linear layer over the output after a row's last token."""

    def __init__(self, config: AwdLmConfig) -> None:
        super().__init__(config)
        self.model, self.score = AwdLmModel(config), nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        return_dict: bool | None = None, **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:  # fmt: skip
        """As `AwdLmModel`. `labels`: (B,), classes; with a single label numbers, and the loss is the squared error."""
        out = self.model(input_ids, attention_mask, return_dict=True, **kwargs)
        logits, loss = self.score(out.last_hidden_state[:, -1]), None
        if labels is not None:
            one = self.config.num_labels == 1
            loss = F.mse_loss(logits[:, 0], labels.to(logits)) if one else F.cross_entropy(logits, labels)
        return self.give(SequenceClassifierOutput(loss, logits, out.hidden_states), return_dict)
