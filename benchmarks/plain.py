"""The training step that bench.py compares with the toolkit's, written plainly on torch's modules.

It is the method (Merity, Keskar, Socher, arXiv 1708.02182) as one would write it for a paper: `nn.LSTM`, `nn.GRU`,
`F.dropout` of the weight, a mask over the whole embedding, `F.linear` and `F.cross_entropy`; QRNN, Mogrifier and
RLSTM are loops over time under autograd. It shares no code with the toolkit; tests/test_bench.py compares the losses.

Shapes: T time, B batch, E embedding, H hidden, V vocabulary, N = T·B.
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...] | None  # a layer's hidden state; None: zeros


class WeightDrop:
    """Weight drop as in the original: the raw matrix is trained, and the layer's matrix is set per batch."""

    def __init__(self, input_size: int, hidden_size: int, wdrop: float) -> None:
        super().__init__(input_size, hidden_size)
        self.wdrop, self.weight_hh_l0_raw = wdrop, self.weight_hh_l0
        del self.weight_hh_l0

    def forward(self, x: Tensor, state: Tensor | State) -> tuple[Tensor, Tensor | State]:
        self.weight_hh_l0 = F.dropout(self.weight_hh_l0_raw, self.wdrop, self.training)
        return super().forward(x, state)


class PlainLSTM(WeightDrop, nn.LSTM):
    pass


class PlainGRU(WeightDrop, nn.GRU):
    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        output, h = super().forward(x, state and state[0])
        return output, (h,)


class PlainQRNN(nn.Module):
    """A QRNN layer (Bradbury et al., arXiv 1611.01576), its recurrence a loop over time under autograd."""

    def __init__(self, input_size: int, hidden_size: int, wdrop: float, window: int) -> None:
        super().__init__()
        self.window, self.wdrop = window, wdrop
        self.linear = nn.Linear(window * input_size, 3 * hidden_size)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        hidden_size = self.linear.out_features // 3
        c, x_last = state or (x.new_zeros(x.size(1), hidden_size), torch.zeros_like(x[:1]))  # (B, H), (1, B, E)
        inputs = x
        if self.window == 2:
            inputs = torch.cat([x, torch.cat([x_last, x[:-1]])], dim=-1)  # (T, B, 2E)
        weight = F.dropout(self.linear.weight, self.wdrop, self.training)
        z, f, o = F.linear(inputs, weight, self.linear.bias).chunk(3, dim=-1)  # (T, B, H) each
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        outputs = []
        for new, keep in zip(f * z, 1 - f, strict=True):
            c = new + keep * c
            outputs.append(c)
        return o * torch.stack(outputs), (c, x[-1:])


class PlainMogrifier(nn.Module):
    """A Mogrifier layer (Melis et al., arXiv 1909.01792), its steps a loop under autograd."""

    def __init__(self, input_size: int, hidden_size: int, rounds: int, rank: int, dropoutr: float) -> None:
        super().__init__()
        self.dropoutr = dropoutr
        self.weight_ih = nn.Parameter(torch.randn(4 * hidden_size, input_size) / input_size**0.5)
        self.weight_hh = nn.Parameter(torch.randn(4 * hidden_size, hidden_size) / hidden_size**0.5)
        self.bias, self.rounds = nn.Parameter(torch.zeros(4 * hidden_size)), nn.ModuleList()
        for r in range(rounds):
            source, to = (input_size, hidden_size) if r % 2 else (hidden_size, input_size)
            parts = {"a": torch.randn(source, rank), "b": torch.randn(rank, to), "bias": torch.zeros(to)}
            self.rounds.append(nn.ParameterDict({name: part * 0.1 for name, part in parts.items()}))

    def cell(self, x: Tensor, h: Tensor, c: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, E), h and c (B, H) -> h, c after the step."""
        i, f, g, o = (F.linear(x, self.weight_ih, self.bias) + F.linear(h, self.weight_hh)).chunk(4, -1)
        i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
        c = f * c + torch.minimum(i, 1 - f) * g.tanh()
        return o * c.tanh(), c

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state or [x.new_zeros(x.size(1), self.weight_hh.size(1))] * 2  # (B, H)
        mask, outputs = F.dropout(torch.ones_like(h), self.dropoutr, self.training), []
        for x_t in x:
            h = h * mask
            for r, weights in enumerate(self.rounds):
                source = x_t if r % 2 else h
                gate = 2 * torch.sigmoid(source @ weights["a"] @ weights["b"] + weights["bias"])
                x_t, h = (x_t, gate * h) if r % 2 else (gate * x_t, h)
            h, c = self.cell(x_t, h, c, mask)
            outputs.append(h)
        return torch.stack(outputs), (h, c)


class PlainRLSTM(PlainMogrifier):
    """The same with the cell of Melis, arXiv 2211.01848."""

    def __init__(self, input_size: int, hidden_size: int, rounds: int, rank: int, dropoutr: float) -> None:
        super().__init__(input_size, hidden_size, rounds, rank, dropoutr)
        self.weight_ih = nn.Parameter(self.weight_ih[: 2 * hidden_size].detach().clone())
        self.weight_hh = nn.Parameter(self.weight_hh[: 3 * hidden_size].detach().clone())
        self.weight_fu = nn.Parameter(torch.randn(hidden_size, hidden_size) / hidden_size**0.5)
        self.weight_oc = nn.Parameter(torch.randn(hidden_size, hidden_size) / hidden_size**0.5)

    def cell(self, x: Tensor, h: Tensor, c: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        b_i, b_j, b_f, b_o = self.bias.chunk(4)
        x_i, x_j = F.linear(x, self.weight_ih).chunk(2, -1)
        h_i, h_j, h_f = F.linear(h, self.weight_hh).chunk(3, -1)
        i, j = torch.sigmoid(x_i + h_i + b_i), torch.tanh(x_j + h_j + b_j)
        f = torch.sigmoid(F.linear(i * j, self.weight_fu) + h_f + b_f)
        c = f * c + torch.minimum(i, 1 - f) * j
        return torch.sigmoid(F.linear(c * mask, self.weight_oc, b_o)) * c.tanh(), c


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """One mask per sequence: (T, B, ·) -> (T, B, ·)."""
    if not training or p == 0:
        return x
    return x * x.new_empty(1, x.size(1), x.size(2)).bernoulli_(1 - p).div_(1 - p)


class PlainModel(nn.Module):
    """The tied language model and its loss; `args`: the settings of main.py, `splits` a list."""

    def __init__(self, args: Namespace, ntoken: int) -> None:
        super().__init__()
        self.args = args
        last = args.nhidlast or args.emsize
        sizes = [args.emsize, *[args.nhid] * (args.nlayers - 1), last]
        if args.model == "Mogrifier":
            cell = PlainRLSTM if args.cell == "rlstm" else PlainMogrifier
            layers = [cell(a, b, args.rounds, args.rank, args.dropoutr) for a, b in pairwise(sizes)]
        elif args.model in ("LSTM", "GRU"):
            kind = {"LSTM": PlainLSTM, "GRU": PlainGRU}[args.model]
            layers = [kind(a, b, args.wdrop) for a, b in pairwise(sizes)]
        else:
            layers = [PlainQRNN(a, b, args.wdrop, 1 if i else 2) for i, (a, b) in enumerate(pairwise(sizes))]
        self.rnns = nn.ModuleList(layers)
        self.encoder, self.decoder = nn.Embedding(ntoken, args.emsize), nn.Linear(args.emsize, ntoken)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if args.splits:
            self.tail_vectors = nn.Parameter(torch.zeros(len(args.splits), args.emsize))
            self.tail_bias = nn.Parameter(torch.zeros(len(args.splits)))

        if args.n_experts:
            self.prior = nn.Linear(last, args.n_experts, bias=False)
            self.latent = nn.Linear(last, args.n_experts * args.emsize)

    def forward(self, words: Tensor, hidden: list[State]) -> tuple[Tensor, list[State], Tensor]:
        """(T, B) -> the last layer's output after its dropout, the new states, that output before it."""
        args, weight = self.args, self.encoder.weight
        if args.dropoute and self.training:
            keep = 1 - args.dropoute
            weight = weight * weight.new_empty(weight.size(0), 1).bernoulli_(keep).div_(keep)  # (V, E)
        drop = F.dropout if args.model == "Mogrifier" else locked_dropout
        x = drop(F.embedding(words, weight), args.dropouti, self.training)  # (T, B, E)
        states, outputs, dropped = [], [], []
        for i, (layer, state) in enumerate(zip(self.rnns, hidden, strict=True)):
            raw, state = layer(x, state)
            outputs.append(raw)
            if args.model == "Mogrifier" and len(outputs) == len(hidden):
                raw = sum(outputs)
            x = drop(raw, args.dropouth if i < len(hidden) - 1 else args.dropout, self.training)
            states.append(state)
            dropped.append(x)
            if args.cell == "rlstm" and i < len(hidden) - 1:
                x = sum(dropped)
        return x, states, raw

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean over (T, B) targets, in nats: one softmax, a split one (arXiv 1803.08240, 3.2), or a mixture."""
        if self.args.n_experts:
            return self.mixture_loss(output, targets.flatten())
        output, targets = output.flatten(0, 1), targets.flatten()  # (N, E), (N,)
        weight, bias, splits = self.decoder.weight, self.decoder.bias, self.args.splits
        if not splits:
            return F.cross_entropy(F.linear(output, weight, bias), targets)
        head_weight = torch.cat([weight[: splits[0]], self.tail_vectors])
        head_bias = torch.cat([bias[: splits[0]], self.tail_bias])
        head_targets, total = targets.clone(), 0.0
        for k, (start, end) in enumerate(pairwise([*splits, len(weight)])):
            hit = (targets >= start) & (targets < end)  # (N,)
            head_targets[hit] = splits[0] + k
            logits = F.linear(output[hit], weight[start:end], bias[start:end])
            total = total + F.cross_entropy(logits, targets[hit] - start, reduction="sum")
        head = F.linear(output, head_weight, head_bias)
        return (total + F.cross_entropy(head, head_targets, reduction="sum")) / len(targets)

    def mixture_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The same under K softmaxes (arXiv 1711.03953)."""
        latents = locked_dropout(torch.tanh(self.latent(output)), self.args.dropoutl, self.training)  # (T, B, K·E)
        logits = self.decoder(latents.view(len(targets), -1, self.args.emsize))  # (N, K, V)
        prior = F.softmax(self.prior(output), -1).view(len(targets), -1, 1)
        prob = (prior * F.softmax(logits, -1)).sum(1)  # (N, V)
        return F.nll_loss(prob.log(), targets)


def make_plain_step(model: PlainModel) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that does one optimizer step over source and target, (T, B) each: the loss in nats per token."""
    args, hidden = model.args, [None] * len(model.rnns)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[args.optimizer]
    betas = {"betas": (args.beta1, 0.999)} if args.optimizer == "adam" else {}
    optimizer = kind(model.parameters(), lr=args.lr, weight_decay=args.wdecay, **betas)
    model.train()

    def step(source: Tensor, target: Tensor) -> Tensor:
        nonlocal hidden
        optimizer.zero_grad()
        output, states, raw = model(source, hidden)
        hidden = [tuple(tensor.detach() for tensor in state) for state in states]
        loss = objective = model.loss(output, target)
        if args.alpha:
            objective = objective + args.alpha * output.pow(2).mean()
        if args.beta:
            objective = objective + args.beta * (raw[1:] - raw[:-1]).pow(2).mean()
        objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        return loss.detach()

    return step
