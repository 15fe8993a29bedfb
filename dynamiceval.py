"""Evaluate a saved model while it goes on learning from the text: it scores each word before it learns from it.

    python dynamiceval.py --data data/penn --save PTB.pt
    python dynamiceval.py --data data/penn --save PTB.pt --search                  # find --lr and --lamb first
    python dynamiceval.py --data data/penn --save PTB.pt --pointer --lambdasm 0.1  # with the cache pointer too

The model's file is never changed. The statistics of its gradients over the training text are kept in SAVE.stats.

Method: Krause, Kahembwe, Murray, Renals, "Dynamic Evaluation of Neural Sequence Models", arXiv 1709.07432: per segment
a gradient step, divided by the root mean square of each weight's gradient over the training text (MS), and a decay
towards the saved weights in proportion to MS:

    w ← w + λ·D·(w_0 − w) − η·g / (MS + ε)        D = min(MS / M, 1/λ), M the mean of MS over tensors

Shapes: T time, B batch, H hidden, K temperatures, P pairs in the pointer's cache from the text before.
"""

import contextlib
import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from corpus.read import read_corpus
from data import Corpus, check_length, eval_batches
from evaluate import print_best, print_table, report, tempered_losses, untempered
from harness.files import STATS_FORMAT, NotWrittenError, Opened, check_parts, load, open_model, save
from harness.flags import COUNT, POSITIVE, SEARCH_TEMPERATURES, SWITCH, TEMPERED, Flag, number, parse_evaluation
from harness.log import RunLog, ppl, warn
from harness.script import run_script
from model import detach
from pointer import POINTER, mixture_logprob, pointer_prob
from utils import RunError, UserError

CHUNK = 1 << 16  # weights updated at once: everything that their update reads fits the CPU's cache
LR = [3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 1e-4]  # searched, for segments of 5 tokens
LAMB = [1e-3, 2e-3, 3e-3, 5e-3]
DEFAULT = {"lr": 5e-5, "lamb": 2e-3, "bptt": 5}  # as in the code that the paper's authors released
PUBLISHED = {"QRNN": {"lr": 1.2e-4, "lamb": 0.02, "bptt": 20}}
Gradients = Sequence[Tensor | None]  # one per weight; None if the segment does not use it


def weights_of(saved: Opened) -> list[Tensor]:
    """All weights of model and criterion, a tied one once."""
    return [*saved.model.parameters(), *saved.criterion.parameters()]


def segment_gradients(
    saved: Opened, batches: Iterable[tuple[Tensor, Tensor]], columns: int, temperatures: Sequence[float] = ()
) -> Iterator[tuple[Tensor, Tensor, Tensor, Gradients]]:
    """Segment after segment, the gradients of its mean loss, in training mode but without dropout.

    The hidden state goes on from segment to segment, detached.

    Args:
        batches: source and target, (T, B) each; the weights may change between segments.
        temperatures: yield the loss of every position at these temperatures instead of the mean. The gradients are
            always those of the model as it is, at a temperature of 1.

    Yields:
        losses: (K, N), or the mean (), in nats, on the device.
        states: (T, B, H), the last layer's raw output; target: (T, B).
    """
    model, criterion, weights = saved.model.train(), untempered(saved.criterion).train(), weights_of(saved)
    hidden = model.init_hidden(columns)
    for source, target in batches:
        output, hidden, raw, _ = model(source, detach(hidden), return_h=True)
        decoder = model.decoder
        reduction = "none" if temperatures else "mean"
        losses = criterion(decoder.weight, decoder.bias, output, target, reduction=reduction)
        gradients = torch.autograd.grad(losses.mean(), weights, allow_unused=True)
        losses = losses.detach()
        if temperatures:
            losses = losses[None]
        if any(temperature != 1 for temperature in temperatures):
            words = target.flatten()
            losses = tempered_losses(criterion, decoder.weight, decoder.bias, output.detach(), words, temperatures)
        yield losses, raw[-1].detach(), target, gradients


def gradient_statistics(saved: Opened, ids: Tensor, batch_size: int, bptt: int, max_batches: int) -> list[Tensor]:
    """MS, one tensor per weight: the root of the mean of g² over the segments of a text.

    Segments have `bptt` rows and `batch_size` columns; `max_batches`: take only so many segments; 0: all.
    """
    squares = [torch.zeros_like(weight) for weight in weights_of(saved)]
    segments = max(1, (len(ids) // batch_size - 1) // bptt)  # whole ones, except in a text shorter than one
    segments = min(segments, max_batches) if max_batches else segments
    batches, count = islice(eval_batches(ids, bptt, batch_size), segments), 0
    bar = tqdm(
        segment_gradients(saved, batches, batch_size), "statistics", segments, leave=False, unit=" segments",
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
    for _, _, _, gradients in bar:
        count += 1
        for square, gradient in zip(squares, gradients, strict=True):
            if gradient is not None:
                square.addcmul_(gradient, gradient)
    return [square.div_(count).sqrt_() for square in squares]


class MovingWeights:
    """The weights while they learn, and a copy of the saved ones.

    Args:
        weights: they move in place.
        ms: their statistics.
        lr, lamb, epsilon: η, λ and ε.
    """

    def __init__(self, weights: list[Tensor], ms: list[Tensor], lr: float, lamb: float, epsilon: float) -> None:
        mean = torch.stack([x.mean() for x in ms]).mean()  # M
        self.weights, self.saved = weights, [weight.detach().clone() for weight in weights]
        self.decay = [(x * (lamb / mean)).clamp_(max=1.0) for x in ms]  # λ·D
        self.rate = [lr / (x + epsilon) for x in ms]  # η / (MS + ε)
        self.chunk = CHUNK if weights[0].device.type == "cpu" else max(x.numel() for x in ms)

    @torch.no_grad()
    def update(self, gradients: Gradients) -> None:
        """One step of all weights, chunk after chunk."""
        for *parts, gradient in zip(self.weights, self.saved, self.decay, self.rate, gradients, strict=True):
            # New views each time: cuDNN's layers can have moved a weight to other memory.
            chunks = zip(*(part.view(-1).split(self.chunk) for part in parts), strict=True)
            if gradient is None:
                for weight, saved, decay, _ in chunks:
                    weight.lerp_(saved, decay)
                continue
            for (weight, saved, decay, rate), g in zip(chunks, gradient.reshape(-1).split(self.chunk), strict=True):
                weight.lerp_(saved, decay).addcmul_(g, rate, value=-1)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the saved weights back."""
        for weight, saved in zip(self.weights, self.saved, strict=True):
            weight.copy_(saved)


def dynamic_losses(
    saved: Opened,
    moving: MovingWeights,
    ids: Tensor,
    bptt: int,
    pointer: tuple[float, float, int] | None = None,
    title: str = "",
    temperatures: Sequence[float] = (1.0,),
) -> tuple[list[float], int]:
    """Mean negative log-likelihood of the predicted tokens, in nats; the model scores a token before it learns from it.

    The weights move, in the same way at every temperature, and are put back at the end. Ctrl-C ends it early, with the
    figures so far.

    Args:
        ids: (n,), the text; its first token is only read.
        bptt: tokens per segment: the weights move after each segment.
        pointer: θ, λ and window of the cache pointer; None: without it.
        temperatures: of the model's distributions, before the cache is mixed in.

    Returns:
        The loss at each temperature, and how many of the n - 1 tokens have been scored.
    """
    total, count = torch.zeros(len(temperatures), dtype=torch.float64), 0
    plain = pointer is None and list(temperatures) == [1.0]
    states, words = torch.empty(0), torch.empty(0, dtype=torch.long)  # the pairs in the pointer's cache
    bar = tqdm(total=len(ids) - 1, desc=title, unit=" tokens", leave=False, disable=not sys.stderr.isatty())
    try:
        for losses, new_states, target, gradients in segment_gradients(
            saved, eval_batches(ids, bptt, 1), columns=1, temperatures=() if plain else temperatures
        ):
            if plain:
                total += losses.item() * len(target)
            elif pointer is None:
                total += losses.cpu().double().sum(1)
            else:
                theta, lambdasm, window = pointer
                past = min(len(states), window)
                states = torch.cat([states.to(new_states)[len(states) - past :], new_states.squeeze(1)])  # (P + T, H)
                words = torch.cat([words.to(target)[len(words) - past :], target.squeeze(1)])
                prob = pointer_prob(states, words, past, [theta], [window]).cpu().double()  # (1, 1, T)
                share = torch.tensor(lambdasm, dtype=torch.float64)
                total -= mixture_logprob(prob[0], -losses.cpu().double(), share).sum(1)  # of (K, T)
            count += len(target)
            moving.update(gradients)
            bar.set_postfix_str(f"ppl {ppl(total.min().item() / count):.2f}", refresh=False)
            bar.update(len(target))
    except KeyboardInterrupt:
        if not count:
            raise
    finally:
        bar.close()
        moving.restore()
    return (total / count).tolist(), count


def dynamic_loss(
    saved: Opened,
    moving: MovingWeights,
    ids: Tensor,
    bptt: int,
    pointer: tuple[float, float, int] | None = None,
    title: str = "",
    temperature: float = 1.0,
) -> tuple[float, int]:
    """`dynamic_losses` at one temperature."""
    (loss,), count = dynamic_losses(saved, moving, ids, bptt, pointer, title, [temperature])
    return loss, count


def find_statistics(saved: Opened, path: str, corpus: Corpus, args: Namespace) -> list[Tensor]:
    """The statistics in the file `path` if they belong to these weights, text and settings; otherwise new ones.

    Raises:
        UserError: the training text is too short for --batch_size.
    """
    check_length(corpus.train, args.batch_size, args.data or saved.args.data)
    weights = weights_of(saved)
    digest = hashlib.sha256("\n".join(saved.vocab).encode())
    for weight in weights:
        digest.update(weight.detach().cpu().numpy().data)
    settings = {"batch_size": args.batch_size, "bptt": args.bptt, "max_batches": args.max_batches}
    settings |= {"text": corpus.digest, "weights": digest.hexdigest()}
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"--save {path}: is a folder, a pipe or a device; move it, the statistics are kept there")
    with contextlib.suppress(UserError):  # the file is missing or damaged
        stats = load(path, "--save", STATS_FORMAT)
        check_parts(stats, {"how": dict, "ms": list}, path)
        shapes = [weight.shape for weight in weights]
        # Compared as text: in a damaged file there can be values that cannot be compared.
        if str(stats["how"]) == str(settings) and are_roots(stats["ms"], shapes):
            return [tensor.to(saved.device) for tensor in stats["ms"]]
    ms = gradient_statistics(saved, corpus.train.to(saved.device), args.batch_size, args.bptt, args.max_batches)
    try:
        save(path, {"format": STATS_FORMAT, "how": settings, "ms": [tensor.cpu() for tensor in ms]})
    except NotWrittenError as error:
        warn(f"{path}: cannot be written ({error.reason}); the statistics are taken again next time")
    return ms


def are_roots(ms: list[Any], shapes: list[torch.Size]) -> bool:
    """Whether these are tensors of float32 and of these shapes, their numbers finite and at least 0."""
    sound = (
        isinstance(x, Tensor) and x.dtype == torch.float32 and bool((x >= 0).all() and x.isfinite().all()) for x in ms
    )
    return all(sound) and [x.shape for x in ms] == shapes


def search(saved: Opened, ms: list[Tensor], ids: Tensor, args: Namespace) -> tuple[float, float, float]:
    """Prints a table of perplexities over the first tokens of a text; returns the best η, λ and temperature.

    A cell of the table is at the temperature that is best there.
    """
    ids, factor = ids[: args.search_tokens + 1], args.bptt / 5
    rates, lambs = [lr * factor for lr in args.search_lrs], [lamb * factor for lamb in args.search_lambs]
    temperatures = args.search_temperatures or [args.temperature]
    losses: dict[tuple[float, float, float], float] = {}

    def loss_of(lr: float, lamb: float) -> float:
        moving = MovingWeights(weights_of(saved), ms, lr, lamb, args.epsilon)
        title = f"lr {lr:.2g} lamb {lamb:.2g}"
        found, count = dynamic_losses(saved, moving, ids, args.bptt, title=title, temperatures=temperatures)
        if count < len(ids) - 1:
            raise KeyboardInterrupt
        losses.update({(lr, lamb, temperature): loss for temperature, loss in zip(temperatures, found, strict=True)})
        return min(found)

    table = ([loss_of(lr, lamb) for lamb in lambs] for lr in rates)
    print_table(f"{len(ids) - 1} tokens", "lr", rates, "lamb", lambs, table)
    lr, lamb, temperature = min(losses, key=losses.__getitem__)
    best = {"lr": lr, "lamb": lamb} | ({} if temperatures == [1.0] else {"temperature": temperature})
    print_best(best, {"lr": rates, "lamb": lambs, "temperature": temperatures})
    return lr, lamb, temperature


FACTOR = {"type": number(float, 0, most=1e3)}
ABOVE_0 = {"type": number(float, 1e-12, most=1e3)}  # 0 would make the rate infinite for a weight with MS = 0
DYNAMIC = [
    Flag("--lr", FACTOR, None, "rate η (default: 5e-5, QRNN 1.2e-4)"),
    Flag("--lamb", FACTOR, None, "decay towards the saved weights, λ (default: 0.002, QRNN 0.02)"),
    Flag("--epsilon", ABOVE_0, 2e-5, "limits the rate of weights whose gradients were small, ε"),
    Flag("--bptt", POSITIVE, None, "tokens per segment: the weights move after each (default: 5, QRNN 20)"),
    Flag("--batch_size", POSITIVE, 100, "columns of training text for the statistics"),
    Flag("--max_batches", COUNT, 0, "segments of training text for the statistics; 0: all of it"),
]
SCORED = TEMPERED._replace(help=f"{TEMPERED.help}; the weights move as without it")
SEARCH = [
    Flag(
        "--search",
        SWITCH,
        False,
        "find lr and lamb (and the temperature, with --search_temperatures) on the validation text",
    ),
    Flag("--search_tokens", POSITIVE, 30_000, "tokens of the validation text that the search uses"),
    Flag("--search_lrs", {**FACTOR, "nargs": "+"}, LR, "the values tried, times bptt / 5"),
    Flag("--search_lambs", {**FACTOR, "nargs": "+"}, LAMB, "the values tried, times bptt / 5"),
    SEARCH_TEMPERATURES,
]
MIXED = [
    Flag("--pointer", SWITCH, False, "mix the cache pointer in"),
    *(flag for flag in POINTER if flag.name in ("theta", "lambdasm", "window")),
]


def fill_in(args: Namespace, saved: Opened) -> None:
    """Sets --lr, --lamb and --bptt to their published values for this kind of model where they were not given."""
    for name, value in (DEFAULT | PUBLISHED.get(saved.args.model, {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def main() -> int:
    groups = ("dynamic evaluation", [*DYNAMIC, SCORED]), ("search", SEARCH), ("with the cache pointer", MIXED)
    args = parse_evaluation(__doc__, *groups)
    saved = open_model(args)
    fill_in(args, saved)
    corpus = read_corpus(args.data or saved.args.data, saved.vocab, tokenizer=saved.tokenizer)
    ms = find_statistics(saved, f"{args.save}.stats", corpus, args)
    if args.search:
        args.lr, args.lamb, args.temperature = search(saved, ms, corpus.valid.to(saved.device), args)
    moving = MovingWeights(weights_of(saved), ms, args.lr, args.lamb, args.epsilon)
    pointer = (args.theta, args.lambdasm, args.window) if args.pointer else None
    log = RunLog(f"{args.save}.log.jsonl")
    for split, ids in (("val", corpus.valid), ("test", corpus.test)):
        loss, count = dynamic_loss(saved, moving, ids.to(saved.device), args.bptt, pointer, split, args.temperature)
        if loss != loss:
            raise RunError(f"the {split} loss is {loss}: try a lower --lr")
        whole = count == len(ids) - 1
        title = "End of dynamic evaluation"
        if not whole:
            title = f"Part of dynamic evaluation, {count} of {len(ids) - 1} tokens"
        units = report(title, f"{split} ", loss, saved, ids[: count + 1])
        settings = {"lr": args.lr, "lamb": args.lamb, "bptt": args.bptt, "pointer": pointer, "tokens": count}
        settings["temperature"] = args.temperature
        log.write("dynamic evaluation", loss, split=split, partial=not whole, **settings, **units)
        if not whole:
            return 130
    return 0


if __name__ == "__main__":
    run_script(main)
