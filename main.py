"""Train a language model on a folder of text, from scratch or from where an earlier run stopped.

    python main.py --data data/penn --batch_size 20 --dropouti 0.4 --dropouth 0.25 --epochs 500 --save PTB.pt
    python main.py --resume PTB.pt                               # go on with that run
    python main.py --resume auto --save PTB.pt --max_minutes 60  # a cluster's job, submitted again and again
    python main.py --resume PTB.pt --epochs 0 --data data/other  # evaluate on other text, change nothing

Method: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182.
"""

import os
import time
from typing import Any

import torch

import checkpoint
import options
import train
from batches import EVAL_BATCH_SIZE, Texts, load_texts
from parallel import ALONE, find_ranks
from run import start_run
from utils import JsonLog, UserError, check_writable, figures, pick_device, run_script
from watch import board_folder

SCRIPT = "main.py"


def parse_args() -> dict[str, Any]:
    """The flags given on the command line, and no others."""
    parser = options.make_parser(__doc__)
    options.add_run_flags(parser)
    options.add_model_flags(parser)
    options.add_training_flags(parser)
    group = parser.add_argument_group("main.py alone")
    options.flag(group, "--optimizer", choices=["sgd", "adam"], help="sgd: NT-ASGD, averaging once it stalls")
    group.add_argument("--when", type=int, nargs="+", help="epochs after which the rate is divided by 10")
    group.add_argument("--splits", type=int, nargs="*", help="first words of the split softmax's clusters")
    options.flag(group, "--vocab_size", type=options.count, help="keep the N most frequent words; 0: all")
    options.flag(group, "--min_count", type=options.count, help="keep words seen N times or more")
    return vars(parser.parse_args())


def main() -> int:
    started = time.monotonic()
    given = options.resolve_auto(parse_args(), SCRIPT, from_model=True)
    resume = given.get("resume", "")
    state, saved = load_resumed(resume, with_state=given.get("epochs") != 0) if resume else (None, None)
    stored = state or saved or {"args": {}, "vocab": None}
    if resume:
        checkpoint.check_architecture(given, stored["args"], resume)
    args = options.settle(given, stored["args"])
    ranks = find_ranks()
    if args["epochs"] > 0:
        ranks.check_batch_size(args["batch_size"])
        check_writable(args["save"], "--save")
        if ranks.leads:
            board_folder(args["tensorboard"], args["save"], SCRIPT)
    elif ranks.leads:
        ranks = ALONE  # rank 0 evaluates alone
    else:
        return 0

    torch.manual_seed(args["seed"])
    device = pick_device(ranks.device_name(args["device"]))

    columns = args["batch_size"] if args["epochs"] > 0 else 1  # nothing is trained: any training text will do
    with ranks.rank_0_first():
        texts = load_texts(
            args["data"], stored["vocab"], device, columns, args["vocab_size"], args["min_count"]
        )
    if args["epochs"] == 0:
        return evaluate_only(saved, checkpoint.resume_paths(resume)[0], texts, args["bptt"], device)

    run = start_run(SCRIPT, args, texts, device, warm_start=None if state else saved, ranks=ranks)
    run.check_space()
    if state:
        run.load_state(state, given)
    elif saved and os.path.realpath(args["save"]) == os.path.realpath(checkpoint.resume_paths(resume)[0]):
        train.evaluate_start(run, texts.valid, args["bptt"], "warm start")
    del state, saved, stored  # several times the weights, on every rank

    reason = train.fit(
        run,
        texts.train,
        texts.valid,
        on_stall="average" if args["optimizer"] == "sgd" else "nothing",
        started=started,
        **{name: args[name] for name in train.FIT_SETTINGS},
    )
    go_on = options.go_on_command(run.save, given, ranks.here)
    return train.finish(run, reason, texts.test, args["bptt"], go_on)


def load_resumed(path: str, with_state: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The state beside a model, if there is one, and the model, which may not have been written yet."""
    path, state_path = checkpoint.resume_paths(path)
    has_state = with_state and os.path.exists(state_path)
    state = checkpoint.load_state(state_path, "--resume", SCRIPT) if has_state else None
    saved = checkpoint.load_model(path, "--resume") if os.path.exists(path) or state is None else None
    return state, saved


def evaluate_only(
    saved: dict[str, Any] | None, path: str, texts: Texts, bptt: int, device: torch.device
) -> int:
    """`--epochs 0`: the saved model's figures on this text; nothing is trained, no file is written."""
    if saved is None:
        raise UserError(f"--epochs 0: there is no saved model to evaluate in {path!r}; give --resume MODEL")
    model, criterion = (module.to(device) for module in checkpoint.restore(saved))
    loss = train.evaluate(model, criterion, texts.valid, bptt, EVAL_BATCH_SIZE)
    print(f"| End of evaluation | {figures(loss, 'valid ')}")
    train.test(path, texts.test, bptt, JsonLog(None))
    return 0


if __name__ == "__main__":
    run_script(main, parallel=True)
