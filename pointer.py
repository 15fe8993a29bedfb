"""Evaluate a saved model with the continuous cache pointer, or search the pointer's settings on validation.

    python pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000
    python pointer.py --data data/penn --save PTB.pt --search --search_windows 500 2000
    python pointer.py --data data/penn --save PTB.pt --search --search_temperatures 0.8 0.85 0.9 0.95 1 1.05 1.1

Shapes: P pairs of state and next word from the text before, T positions after them, H hidden, S, L, W the numbers of
θ, λ and windows that are tried, K that of temperatures. The text is one column (batch size 1).

Method: Grave, Joulin, Usunier, "Improving Neural Language Models with a Continuous Cache",
arXiv 1612.04426 ("Cache"), section 3. The cache is used from its first pair on, also before the window is full.
"""

import itertools
import math
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from corpus.read import read_corpus
from data import eval_batches
from evaluate import print_best, print_table, report, tempered_losses
from harness.files import open_model
from harness.flags import COUNT, POSITIVE, SEARCH_TEMPERATURES, SWITCH, TEMPERED, Flag, number, parse_evaluation
from harness.log import RunLog
from harness.script import run_script
from model import Criterion, RNNModel
from products import product
from utils import RunError

BLOCK = 128  # positions at once: their scores over a window of 4,000 (2 MB) fit the CPU's cache
SEGMENT = 1024  # positions at once in the model, or --bptt if that is more: enough for fast matrix products
LOGITS = 1024  # positions whose logits exist at once


def pointer_prob(states: Tensor, words: Tensor, past: int, thetas: Sequence[float], windows: Sequence[int]) -> Tensor:
    """The probability that the cache alone gives to each word (Cache, section 3.1).

    Position i sees the pairs (state j, word j) with i - window <= j < i, as many as there are. Their weights are
    softmax_j(θ · state_i · state_j). Only pairs whose word is the target add to its probability, so no tensor is as
    large as the vocabulary: memory is BLOCK × (window + BLOCK).

    Args:
        states: (P + T, H), the last layer's raw output.
        words: (P + T,), the word that came after each state: the target of that position.
        past: P, at least the widest window, or all pairs since the text began.
        thetas, windows: S and W settings.

    Returns:
        (S, W, T), for the positions from P on; nan where there is no pair yet.
    """
    prob = states.new_full((len(thetas), len(windows), len(states) - past), torch.nan)
    position = torch.arange(len(states), device=states.device)
    for first in range(past, len(states), BLOCK):
        last = min(first + BLOCK, len(states))
        row = position[first:last, None]  # (block, 1)
        begin = max(0, first - max(windows))
        scores = product(states[first:last], states[begin : last - 1].T)  # (block, window + block - 1)
        for w, window in enumerate(windows):
            start = max(0, first - window)  # the first pair that any position of the block sees
            column = position[start : last - 1]
            # The pairs whose word is the target, some 1 % of all. A synchronisation on CUDA.
            hit, pair = (words[start : last - 1] == words[first:last, None]).nonzero(as_tuple=True)
            old = max(0, last - 1 - window - start)  # so many columns hold pairs that are too old for some position
            too_old, too_new = column[:old] < row - window, column[first - start :] >= row
            for s, theta in enumerate(thetas):
                logits = theta * scores[:, start - begin :]
                logits[:, :old].masked_fill_(too_old, -torch.inf)
                logits[:, first - start :].masked_fill_(too_new, -torch.inf)
                attention = (logits[hit, pair] - logits.logsumexp(1)[hit]).exp()
                here = prob[s, w, first - past : last - past]
                here.zero_().index_add_(0, hit, attention)
    prob[:, [window == 0 for window in windows]] = torch.nan
    if past == 0:
        prob[..., :1] = torch.nan
    return prob


def mixture_logprob(prob: Tensor, log_vocab: Tensor, lambdasm: Tensor) -> Tensor:
    """log(λ·p_cache + (1-λ)·p_vocab), or log p_vocab where there is no pair yet (nan in `prob`).

    With λ = 0 it is `log_vocab`, bit for bit. All float64: prob (..., T), log_vocab (T,), lambdasm ().
    """
    mixed = torch.logaddexp(lambdasm.log() + prob.log(), torch.log1p(-lambdasm) + log_vocab)
    return torch.where(prob.isnan(), log_vocab, mixed)


@torch.no_grad()
def pointer_loss(
    model: RNNModel,
    criterion: Criterion,
    ids: Tensor,
    bptt: int,
    thetas: Sequence[float],
    lambdas: Sequence[float],
    windows: Sequence[int],
    temperatures: Sequence[float] = (1.0,),
) -> Tensor:
    """Mean negative log-likelihood with the pointer under every combination of settings.

    One pass over the text: all settings share the model's forward pass and the products of states, all λ the softmax
    over them. The hidden state and the pairs go on from segment to segment, so `bptt` changes no figure.

    Args:
        ids: (n,), the text; its first token is only read.
        temperatures: of p_vocab, before the cache is mixed in.

    Returns:
        (S, L, W, K), float64, in nats per predicted token.
    """
    model.eval()
    windows = [min(window, len(ids)) for window in windows]  # there are no more pairs than that
    weight, bias = model.decoder.weight, model.decoder.bias
    hidden = model.init_hidden(1)
    states, words = weight.new_empty(0, model.layers[-1].hidden_size), ids.new_empty(0, dtype=torch.long)
    total = torch.zeros(len(thetas), len(lambdas), len(windows), len(temperatures), dtype=torch.float64)
    for source, target in eval_batches(ids, max(bptt, SEGMENT), 1):
        output, hidden, raw, _ = model(source, hidden, return_h=True)
        losses = [
            tempered_losses(criterion, weight, bias, h, w, temperatures)
            for h, w in zip(output.split(LOGITS), target.squeeze(1).split(LOGITS), strict=True)
        ]
        log_vocab = -torch.cat(losses, dim=1).cpu().double()  # (K, T); not every device has float64

        past = min(len(states), max(windows))
        states = torch.cat([states[len(states) - past :], raw[-1].squeeze(1)])  # (P + T, H)
        words = torch.cat([words[len(words) - past :], target.squeeze(1)])
        prob = pointer_prob(states, words, past, thetas, windows).cpu().double()  # (S, W, T)
        for (i, lambdasm), (k, one) in itertools.product(enumerate(lambdas), enumerate(log_vocab)):
            logprob = mixture_logprob(prob, one, torch.tensor(lambdasm, dtype=torch.float64))  # (S, W, T)
            total[:, i, :, k] -= logprob.sum(-1)
    return total / (len(ids) - 1)


def search(loss: Tensor, tried: dict[str, Sequence[Any]]) -> dict[str, Any]:
    """Prints the grid of losses (S, L, W, K) as tables of perplexities; returns the best settings.

    `tried`: theta, lambdasm, window and temperature, with the values of each.
    """
    thetas, lambdas, windows, temperatures = tried.values()
    for w, window in enumerate(windows):
        for k, temperature in enumerate(temperatures):
            title = f"window {window}" + (f", temperature {temperature:g}" if temperatures != [1.0] else "")
            print_table(title, "theta", thetas, "lambdasm", lambdas, loss[:, :, w, k].tolist())
    settings = list(itertools.product(*tried.values()))[int(loss.argmin())]
    best = dict(zip(tried, settings, strict=True))
    print_best({name: value for name, value in best.items() if name != "temperature" or temperatures != [1.0]}, tried)
    return best


THETA, SHARE = {"type": number(float, 0, most=1000)}, {"type": number(float, 0, most=1)}
POINTER = [
    Flag("--theta", THETA, 1.0, "sharpness of the attention, θ"),
    Flag("--lambdasm", SHARE, 0.1, "share of the pointer, λ"),
    Flag("--window", COUNT, 500, "pairs of state and next word in the cache"),
    Flag("--bptt", POSITIVE, 2000, "tokens at once; changes no figure"),
    TEMPERED._replace(help=f"{TEMPERED.help}; before the cache is mixed in"),
]
SEARCH = [
    Flag("--search", SWITCH, False, "find theta, lambdasm and window (and the temperature, with --search_temperatures) "
         "on the validation text"),
    Flag("--search_thetas", {**THETA, "nargs": "+"}, [0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.4, 2.0, 2.8],
         "the values tried"),
    Flag("--search_lambdas", {**SHARE, "nargs": "+"}, [0.03, 0.05, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.35],
         "the values tried"),
    Flag("--search_windows", {**COUNT, "nargs": "+"}, None, "the values tried (default: that of --window)"),
    SEARCH_TEMPERATURES,
]  # fmt: skip


def parse_args() -> Namespace:
    groups = ("pointer (the defaults are for the Penn Treebank)", POINTER), ("search", SEARCH)
    return parse_evaluation(__doc__, *groups)


def main() -> None:
    args = parse_args()
    saved = open_model(args)
    corpus = read_corpus(args.data or saved.args.data, saved.vocab, tokenizer=saved.tokenizer)
    log = RunLog(f"{args.save}.log.jsonl")

    def losses(ids: Tensor, settings: Iterable[Sequence[Any]]) -> Tensor:
        return pointer_loss(saved.model, saved.criterion, ids.to(saved.device), args.bptt, *settings)

    def finish(split: str, ids: Tensor, loss: float) -> None:
        """Prints and logs the figures of one text."""
        if math.isnan(loss):
            raise RunError(f"the {split} loss is {loss}: the model's weights are not finite; use another model")
        units = report("End of pointer", f"{split} ", loss, saved, ids)
        log.write("pointer", loss, split=split, **settings, **units)

    settings = {name: getattr(args, name) for name in ("theta", "lambdasm", "window", "temperature")}
    tried: dict[str, Sequence[Any]] = {name: [value] for name, value in settings.items()}
    if args.search:
        tried |= {"theta": args.search_thetas, "lambdasm": args.search_lambdas}
        tried["window"] = args.search_windows or tried["window"]
        tried["temperature"] = args.search_temperatures or tried["temperature"]
    valid = losses(corpus.valid, tried.values())
    if args.search:
        settings = search(valid, tried)
    finish("val", corpus.valid, valid.min().item())
    finish("test", corpus.test, losses(corpus.test, [[value] for value in settings.values()]).item())


if __name__ == "__main__":
    run_script(main)
