"""Train a language model on a folder of text, from scratch or from where an earlier run stopped.

    python main.py --data data/penn --batch_size 20 --dropouti 0.4 --dropouth 0.25 --epochs 500 --save PTB.pt
    python main.py --resume PTB.pt                               # go on with that run
    python main.py --resume auto --save PTB.pt --max_minutes 60  # a cluster's job, submitted again and again
    python main.py --resume PTB.pt --epochs 0 --data data/other  # evaluate on other text, change nothing

Method: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182.
"""

import os
from argparse import Namespace
from typing import Any

import train
from data import EVAL_BATCH_SIZE
from harness import files, flags
from harness.log import RunLog, figures, say
from harness.script import run_script
from harness.start import Start, begin, find_state, load_corpus, start_run
from optim import OPTIMIZERS
from utils import UserError

SCRIPT = "main.py"


def parse_args() -> dict[str, Any]:
    """The flags given on the command line, and no others."""
    return vars(flags.ArgumentParser(__doc__, *flags.FLAGS).parse_args())


def main() -> int:
    start = begin(parse_args(), find_start)  # the device, the processes, the settings, what there is to go on with
    args = start.args
    if args.epochs == 0:
        return evaluate_only(start) if start.ranks.is_main else 0
    run = start_run(SCRIPT, start)  # seed, corpus, model, optimizer
    if start.saved and os.path.realpath(args.save) == os.path.realpath(args.resume):
        train.evaluate_start(run, "warm start")
    deadline_s = start.began_s + 60 * args.max_minutes if args.max_minutes else None
    del start  # a state is several times the weights
    why = train.fit(run, OPTIMIZERS[args.optimizer].on_stall, deadline_s)
    return train.finish(run, why)


def find_start(given: dict[str, Any]) -> tuple[Namespace, dict[str, Any] | None, dict[str, Any] | None]:
    """The settings, and the state to go on from or else the model to begin with, where there is one."""
    path, state = find_state(given, SCRIPT)
    what = f"goes on with {path}" if state else f"warm start from {path}, which has no .state"
    saved = None
    if state and state["script"] != SCRIPT:
        what = f"{state['script']} has gone on with {path}, its training is over: evaluates it"
        given["epochs"], state = 0, None
    if path and not state:
        if os.path.exists(path) or given["resume"] != "auto":
            saved = files.load_model(path, "--resume")
        else:
            what = f"no run of {path} yet, starts one"
    if given.get("resume") == "auto":
        say(f"| --resume auto: {what}")
    stored = state or saved
    if stored:
        flags.check_shape(given, stored["args"], path)
    resume = path if stored else ""
    return flags.resolve_args({**given, "resume": resume}, stored["args"] if stored else {}), state, saved


def evaluate_only(start: Start) -> int:
    """`--epochs 0`: the saved model's figures on this text; nothing is trained, no file is written."""
    args, saved = start.args, start.saved
    if saved is None:
        raise UserError("--epochs 0: there is no saved model to evaluate; give --resume MODEL")
    corpus = load_corpus(args, saved["vocab"], batch_size=1).to(start.device)
    model, criterion, *_ = files.to_evaluate(saved, start.device)
    loss = train.evaluate(model, criterion, corpus.valid, args.bptt, EVAL_BATCH_SIZE)
    say(f"| End of evaluation | {figures(loss, 'valid ')}")
    train.test(args.resume, corpus.test, args.bptt, RunLog(None))
    return 0


if __name__ == "__main__":
    run_script(main, parallel=True)
