"""Flags that would do nothing beside the other settings are refused: a row of `NEEDS` says what each of them needs.

A value is refused only if it was given on the command line. 0 and the default ask for nothing, and what is in a saved
file has been accepted before.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from model import LAYERS
from optim import OPTIMIZERS, averages_after_stall
from utils import UserError


class Need(NamedTuple):
    """`flags`: names of settings; `met`: whether they have an effect; `problem`: the error, with settings in braces."""

    flags: str
    met: Callable[[Namespace], Any]
    problem: str


def without(what: str) -> str:
    return f"does nothing without {what}; give that too, or leave it out"


def searches(args: Namespace) -> bool:
    """Whether the script has --search, and it is on."""
    return getattr(args, "search", False)


FOUND = "does nothing with --search, which finds it; give one of them"
# `getattr`: several scripts have flags of these names, and not all of them have the other setting.
NEEDS = [
    # training
    Need("rounds rank cell chrono dropoutr", lambda s: "rounds" in LAYERS[s.model].options,
         without("--model Mogrifier")),
    Need("chrono", lambda s: not s.resume, "does nothing with --resume, whose weights are there already; leave it "
         "out"),
    Need("rank", lambda s: s.rounds, without("--rounds")),
    Need("wdrop", lambda s: LAYERS[s.model].defaults.get("wdrop") != 0, "does nothing with --model {model}, which has "
         "no weight drop; leave it out"),
    Need("dropoutl", lambda s: s.n_experts, without("--n_experts")),
    Need("beta1", lambda s: OPTIMIZERS[s.optimizer].moments, without("--optimizer adam or radam")),
    Need("average", lambda s: not s.no_average, "does not go with --no-average; give one of them"),
    Need("nonmono", averages_after_stall, without("averaging after a stall (--optimizer "
         "sgd without --average two-tailed, or --average alone)")),
    Need("anneal epochs", lambda s: not s.epochs or s.anneal < s.epochs, "the rate would fall from the end of "
         "epoch {anneal} (--anneal) to that of epoch {epochs} (--epochs); give a smaller --anneal, 0 to leave it out"),
    # evaluation
    Need("temperature", lambda s: not getattr(s, "epochs", 0), without("--epochs 0")),
    Need("temperature", lambda s: not getattr(s, "search_temperatures", None), "does nothing with "
         "--search_temperatures; give one of them"),
    Need("search_thetas search_lambdas search_windows search_lrs search_lambs search_tokens search_temperatures",
         searches, without("--search")),
    Need("theta lambdasm window", lambda s: getattr(s, "pointer", True), without("--pointer")),
    Need("theta lambdasm", lambda s: "pointer" in s or not searches(s), FOUND),
    Need("window", lambda s: not getattr(s, "search_windows", None), "does nothing with --search_windows; give one "
         "of them"),
    Need("lr lamb", lambda s: not searches(s), FOUND),
    Need("lr lamb epsilon bptt batch_size max_batches", lambda s: getattr(s, "adaptive", True), without("--adaptive")),
    Need("word sentence story", lambda s: getattr(s, "table", True), without("--table")),
    Need("rows", lambda s: getattr(s, "pairs", True), without("--pairs")),
    Need("weight score_weights length_bonus all", lambda s: getattr(s, "nbest", True), without("--nbest")),
    Need("words temperature top_k top_p seed", lambda s: not getattr(s, "next", None), "does nothing with --next; "
         "give one of them"),
    Need("line nats", lambda s: getattr(s, "surprisal", True), without("--surprisal")),
]  # fmt: skip


def check_needs(args: Namespace, defaults: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises UserError when a flag was given that does nothing; only the names in `defaults` are looked at."""
    for need in NEEDS:
        for name in (name for name in need.flags.split() if name in defaults):
            value = getattr(args, name)
            if value and value not in (defaults[name], stored.get(name)) and not need.met(args):
                values = value if isinstance(value, list) else [value] if value is not True else []
                flag = " ".join([f"--{name}", *map(str, values)])
                raise UserError(f"{flag}: {need.problem.format(**vars(args))}")
