"""What bench.py holds the toolkit against: the same training step on torch's own modules, and the floor.

    python -m pytest tests/test_bench.py     # the plain step computes what ours computes, loss by loss

The plain step is the method (Merity, Keskar, Socher, arXiv 1708.02182) as one would write it for a paper:
`nn.LSTM`, `F.dropout` of the weight, a mask over the whole embedding, `F.linear` and `F.cross_entropy`, for
the QRNN a loop over time under autograd. It shares no code with the toolkit.

The floor is the matrix products of that step and nothing else.

Shapes: T time, B batch, E embedding, H hidden, V vocabulary, N = T·B.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]


class PlainLSTM(nn.Module):
    """nn.LSTM with weight drop, the classic way: the raw matrix is trained, the LSTM's own is set a batch."""

    def __init__(self, input_size: int, hidden_size: int, wdrop: float) -> None:
        super().__init__()
        self.wdrop = wdrop
        self.lstm = nn.LSTM(input_size, hidden_size)
        if wdrop:
            self.weight_hh_l0_raw = self.lstm.weight_hh_l0
            del self.lstm._parameters["weight_hh_l0"]
            self.lstm.weight_hh_l0 = self.weight_hh_l0_raw.detach()

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.wdrop:
            self.lstm.weight_hh_l0 = F.dropout(self.weight_hh_l0_raw, self.wdrop, self.training)
        return self.lstm(x, state)

    def init_state(self, batch_size: int) -> State:
        zeros = self.lstm.bias_hh_l0.new_zeros(1, batch_size, self.lstm.hidden_size)
        return zeros, zeros.clone()


class PlainQRNN(nn.Module):
    """A QRNN layer (Bradbury et al., arXiv 1611.01576), its recurrence a loop over time under autograd."""

    def __init__(self, input_size: int, hidden_size: int, window: int, wdrop: float) -> None:
        super().__init__()
        self.window, self.wdrop = window, wdrop
        self.linear = nn.Linear(window * input_size, 3 * hidden_size)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        c, x_last = state  # (1, B, H), (1, B, E)
        inputs = x
        if self.window == 2:
            inputs = torch.cat([x, torch.cat([x_last, x[:-1]])], dim=-1)  # (T, B, 2E)
        weight = self.linear.weight
        if self.wdrop:
            weight = F.dropout(weight, self.wdrop, self.training)
        z, f, o = F.linear(inputs, weight, self.linear.bias).chunk(3, dim=-1)  # (T, B, H) each
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        c, outputs = c[0], []
        for new_t, keep_t in zip(f * z, 1 - f, strict=True):
            c = new_t + keep_t * c
            outputs.append(c)
        return o * torch.stack(outputs), (c.unsqueeze(0), x[-1:])

    def init_state(self, batch_size: int) -> State:
        zeros = self.linear.bias.new_zeros
        return (
            zeros(1, batch_size, self.linear.out_features // 3),
            zeros(1, batch_size, self.linear.in_features // self.window),
        )


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """One mask a sequence: (T, B, ·) -> (T, B, ·)."""
    if not training or p == 0:
        return x
    return x * x.new_empty(1, x.size(1), x.size(2)).bernoulli_(1 - p).div_(1 - p)


class PlainModel(nn.Module):
    """The tied language model and its loss; `args` as in options.py, `splits` a list."""

    def __init__(self, args: dict[str, Any], ntoken: int) -> None:
        super().__init__()
        self.args, self.splits = args, args["splits"]
        emsize, nhid, nlayers = args["emsize"], args["nhid"], args["nlayers"]
        self.encoder = nn.Embedding(ntoken, emsize)
        sizes = [emsize, *[nhid] * (nlayers - 1), emsize]
        if args["model"] == "LSTM":
            layers = [PlainLSTM(a, b, args["wdrop"]) for a, b in pairwise(sizes)]
        else:
            windows = [2] + [1] * (nlayers - 1)
            layers = [
                PlainQRNN(a, b, w, args["wdrop"]) for (a, b), w in zip(pairwise(sizes), windows, strict=True)
            ]
        self.rnns = nn.ModuleList(layers)
        self.decoder = nn.Linear(emsize, ntoken)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if self.splits:
            self.tail_vectors = nn.Parameter(torch.zeros(len(self.splits), emsize))
            self.tail_bias = nn.Parameter(torch.zeros(len(self.splits)))

    def init_hidden(self, batch_size: int) -> list[State]:
        return [layer.init_state(batch_size) for layer in self.rnns]

    def forward(self, words: Tensor, hidden: list[State]) -> tuple[Tensor, list[State], Tensor]:
        """(T, B) -> the last layer's output after its dropout, the new states, that output before it."""
        args, weight = self.args, self.encoder.weight
        if args["dropoute"] and self.training:
            keep = 1 - args["dropoute"]
            weight = weight * weight.new_empty(weight.size(0), 1).bernoulli_(keep).div_(keep)  # (V, E)
        x = locked_dropout(F.embedding(words, weight), args["dropouti"], self.training)  # (T, B, E)
        states = []
        for i, (layer, state) in enumerate(zip(self.rnns, hidden, strict=True)):
            raw, state = layer(x, state)
            p = args["dropouth"] if i < len(self.rnns) - 1 else args["dropout"]
            x = locked_dropout(raw, p, self.training)
            states.append(state)
        return x, states, raw

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean over (T, B) targets, in nats: one softmax, or the split one (arXiv 1803.08240, 3.2)."""
        output, targets = output.flatten(0, 1), targets.flatten()  # (N, E), (N,)
        weight, bias, splits = self.decoder.weight, self.decoder.bias, self.splits
        if not splits:
            return F.cross_entropy(F.linear(output, weight, bias), targets)
        head_weight = torch.cat([weight[: splits[0]], self.tail_vectors])
        head_bias = torch.cat([bias[: splits[0]], self.tail_bias])
        head_targets = targets.clone()
        total = output.new_zeros(())
        for k, (start, end) in enumerate(pairwise([*splits, weight.size(0)])):
            hit = (targets >= start) & (targets < end)  # (N,)
            head_targets[hit] = splits[0] + k
            logits = F.linear(output[hit], weight[start:end], bias[start:end])
            total = total + F.cross_entropy(logits, targets[hit] - start, reduction="sum")
        total = total + F.cross_entropy(
            F.linear(output, head_weight, head_bias), head_targets, reduction="sum"
        )
        return total / len(targets)


def plain_optimizer(model: PlainModel) -> torch.optim.Optimizer:
    """torch's own, by its defaults."""
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[model.args["optimizer"]]
    return kind(model.parameters(), lr=model.args["lr"], weight_decay=model.args["wdecay"])


def plain_step(
    model: PlainModel, optimizer: torch.optim.Optimizer, hidden: list[State], source: Tensor, target: Tensor
) -> tuple[Tensor, list[State]]:
    """One optimizer step over source and target, (T, B) each: the loss in nats a token, the new states."""
    args = model.args
    hidden = [tuple(tensor.detach() for tensor in state) for state in hidden]
    optimizer.zero_grad()
    output, hidden, raw = model(source, hidden)
    loss = model.loss(output, target)
    objective = loss
    if args["alpha"]:
        objective = objective + args["alpha"] * output.pow(2).mean()
    if args["beta"]:
        objective = objective + args["beta"] * (raw[1:] - raw[:-1]).pow(2).mean()
    objective.backward()
    nn.utils.clip_grad_norm_(model.parameters(), args["clip"])
    optimizer.step()
    return loss.detach(), hidden


def products(args: dict[str, Any], ntoken: int, targets: Tensor) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every weight that a step multiplies by; `targets` (T, B) of one batch.

    The recurrent matrices count with all N rows at once, though no LSTM can do that; the decoder counts
    once, tied or not. Of a split softmax: the head for all rows, each cluster for the targets within it.
    Looking words up in the embedding is no product.
    """
    N, emsize, splits = targets.numel(), args["emsize"], args["splits"]
    shapes = []
    sizes = [emsize, *[args["nhid"]] * (args["nlayers"] - 1), emsize]
    for layer, (inputs, hidden) in enumerate(pairwise(sizes)):
        if args["model"] == "LSTM":
            shapes += [(N, inputs, 4 * hidden), (N, hidden, 4 * hidden)]
        else:
            shapes += [(N, inputs * (2 if layer == 0 else 1), 3 * hidden)]
    shapes += [(N, emsize, splits[0] + len(splits) if splits else ntoken)]
    for start, end in pairwise([*splits, ntoken] if splits else []):
        rows = int(((targets >= start) & (targets < end)).sum())
        shapes += [(rows, emsize, end - start)] if rows else []
    return shapes


def make_floor(shapes: list[tuple[int, int, int]], device: torch.device) -> Callable[[], None]:
    """The products of one step by `torch.mm`, into memory that is there: forward, then backward.

    An output stands for its own gradient in the backward products: a matrix of the same shape, of numbers as
    good as others.
    """
    work = []
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, device=device)
        weight = torch.randn(outputs, inputs, device=device) / inputs**0.5
        work.append((x, weight, x.new_empty(rows, outputs), torch.empty_like(x), torch.empty_like(weight)))

    def floor() -> None:
        for x, weight, y, _, _ in work:
            torch.mm(x, weight.t(), out=y)  # forward
        for x, weight, y, dx, dweight in reversed(work):
            torch.mm(y, weight, out=dx)  # the gradient of the input
            torch.mm(y.t(), x, out=dweight)  # the gradient of the weight

    return floor
