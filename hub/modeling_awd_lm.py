"""AWD-LSTM language models and their kin for Transformers: LSTM, GRU, QRNN, Mogrifier; evaluation and generation.

The file needs torch and Transformers (4.51 to 5.x) only. Nothing is dropped out, in training neither.

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
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

from .configuration_awd_lm import AwdLmConfig

Carried = tuple[Tensor, ...]  # what a layer carries from token to token, each tensor (1, B, ·)


def last_of(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """The last step of each row, (B, T, H) -> (1, B, H); `lengths`: the steps of each row, None: T."""
    return sequence[torch.arange(len(sequence)), -1 if lengths is None else lengths - 1][None]


# Layers. forward(x (B, T, E), carried, lengths) -> out (B, T, H), carried after the last step of each row.


class TorchLayer(nn.RNNBase):
    """A layer of torch. Padded rows are packed: of an LSTM's cells torch gives the last one only."""

    def __init__(self, inputs: int, hidden: int, first: bool, config: AwdLmConfig) -> None:
        super().__init__(inputs, hidden, batch_first=True)  # type: ignore[arg-type,call-arg]

    def forward(self, x: Any, carried: Any, lengths: Tensor | None) -> tuple[Tensor, Carried]:
        single = isinstance(self, nn.GRU)
        carried = carried[0] if single and carried else carried
        packed = x
        if lengths is not None:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, carried = super().forward(packed, carried)
        if lengths is not None:
            out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.size(1))
        return out, (carried,) if single else carried


class LSTM(TorchLayer, nn.LSTM):  # type: ignore[misc]
    """Gates: i, f, g, o."""


class GRU(TorchLayer, nn.GRU):  # type: ignore[misc]
    """Gates: r, z, n."""


class QRNN(nn.Module):
    """Bradbury et al., arXiv 1611.01576: z, f, o = W · x_t, in the first layer W · [x_t, x_{t-1}]; fo-pooling."""

    def __init__(self, inputs: int, hidden: int, first: bool, config: AwdLmConfig) -> None:
        super().__init__()
        self.first = first
        self.linear = nn.Linear(inputs * (2 if first else 1), 3 * hidden)

    def forward(self, x: Tensor, carried: Carried | None, lengths: Tensor | None) -> tuple[Tensor, Carried]:
        if carried is None:
            carried = x.new_zeros(1, len(x), self.linear.out_features // 3), torch.zeros_like(x[:, 0])[None]
        inputs, c, cells = x, carried[0][0], []
        if self.first:
            inputs = torch.cat([x, torch.cat([carried[1].transpose(0, 1), x[:, :-1]], dim=1)], dim=-1)
        z, f, o = self.linear(inputs).chunk(3, -1)
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        for t in range(x.size(1)):
            c = torch.lerp(c, z[:, t], f[:, t])
            cells.append(c)
        c = torch.stack(cells, dim=1)
        return o * c, (last_of(c, lengths), *([last_of(x, lengths)] if self.first else []))


def make_round(source: int, to: int, rank: int) -> nn.ParameterDict:
    """A Mogrifier's round: the factors `a` and `b` of a matrix, or with rank 0 the matrix `weight`; a bias."""
    shapes = {"a": (source, rank), "b": (rank, to)} if rank else {"weight": (source, to)}
    return nn.ParameterDict({name: torch.zeros(shape) for name, shape in (shapes | {"bias": (to,)}).items()})


def gate(source: Tensor, weights: Any) -> Tensor:
    """2σ(source · A · B + bias)."""
    product = source @ weights["a"] @ weights["b"] if "a" in weights else source @ weights["weight"]
    return 2 * (product + weights["bias"]).sigmoid()


class Mogrifier(nn.Module):
    """Melis et al., arXiv 1909.01792; without rounds the LSTM of arXiv 1707.05589. Gates: i, f, g, o."""

    def __init__(self, inputs: int, hidden: int, first: bool, config: AwdLmConfig) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.zeros(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.zeros(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        sizes = inputs, hidden
        self.rounds = nn.ModuleList(
            make_round(sizes[r % 2 == 0], sizes[r % 2], config.rank) for r in range(config.rounds)
        )

    def forward(self, x: Tensor, carried: Carried | None, lengths: Tensor | None) -> tuple[Tensor, Carried]:
        zeros = x.new_zeros(len(x), self.weight_hh.size(1))
        h, c = (zeros, zeros) if carried is None else (carried[0][0], carried[1][0])
        outputs, cells = [], []
        for x_t in x.unbind(1):
            for r, weights in enumerate(self.rounds):
                x_t, h = (x_t, gate(x_t, weights) * h) if r % 2 else (gate(h, weights) * x_t, h)
            i, f, g, o = (F.linear(x_t, self.weight_ih, self.bias) + F.linear(h, self.weight_hh)).chunk(4, -1)
            f = f.sigmoid()
            c = f * c + torch.minimum(i.sigmoid(), 1 - f) * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
            cells.append(c)
        out = torch.stack(outputs, dim=1)
        return out, (last_of(out, lengths), last_of(torch.stack(cells, dim=1), lengths))


LAYERS: dict[str, Any] = {kind.__name__: kind for kind in (LSTM, GRU, QRNN, Mogrifier)}


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
        kind = LAYERS[config.kind]
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
