"""Fine-tune a saved model: averaged SGD from the first step, until the validation loss stops falling.

    python finetune.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --save PTB.pt
    python finetune.py --data data/penn --save PTB.pt --output PTB.ft.pt  # leave PTB.pt as it is
    python finetune.py --resume PTB.ft.pt                                 # go on with a stopped run
    python finetune.py --save PTB.pt --resume auto --max_minutes 60       # a cluster's job, each time

The file is replaced only by a better model, whole or not at all. The architecture and every setting that is
not given come from the file. Method: Merity, Keskar, Socher, arXiv 1708.02182, section 5.
"""

import time
from typing import Any

import torch

import checkpoint
import options
import train
from batches import load_texts
from parallel import find_ranks
from run import start_run
from utils import check_writable, pick_device, run_script
from watch import board_folder

SCRIPT = "finetune.py"
# A new fine-tuning starts its own course: these do not come from the training that made the model.
OWN = ("epochs", "optimizer", "lr", "when", "nonmono")


def parse_args() -> dict[str, Any]:
    """The flags given on the command line, and no others."""
    parser = options.make_parser(__doc__)
    options.add_run_flags(parser)
    options.add_model_flags(parser)
    options.add_training_flags(parser)
    parser.add_argument("--output", help="write the better model here and leave --save as it is")
    return vars(parser.parse_args())


def main() -> int:
    started = time.monotonic()
    given = options.resolve_auto(parse_args(), SCRIPT, from_model=False)
    resume = given.get("resume", "")
    path, state_path = checkpoint.resume_paths(resume) if resume else (given.get("save", "PTB.pt"), "")
    state = checkpoint.load_state(state_path, "--resume", SCRIPT) if resume else None
    saved = state or checkpoint.load_model(path, "--save")
    checkpoint.check_architecture(given, saved["args"], path)
    stored = saved["args"] if resume else {k: v for k, v in saved["args"].items() if k not in OWN}
    args = {**options.settle(given, stored), "save": given.get("output", given.get("save", path))}
    ranks = find_ranks()
    ranks.check_batch_size(args["batch_size"])
    check_writable(args["save"], "--output" if "output" in given else "--save")
    if ranks.leads:
        board_folder(args["tensorboard"], args["save"], SCRIPT)

    torch.manual_seed(args["seed"])
    device = pick_device(ranks.device_name(args["device"]))
    with ranks.rank_0_first():
        texts = load_texts(args["data"], saved["vocab"], device, args["batch_size"])

    run = start_run(SCRIPT, args, texts, device, warm_start=None if resume else saved, ranks=ranks)
    run.check_space()
    if resume:
        run.load_state(state, given)
    else:
        loss = train.evaluate_start(run, texts.valid, args["bptt"], "before fine-tuning")
        if args["save"] != path:
            run.save_model(loss)
        run.start_averaging()
    del state, saved  # several times the weights, on every rank

    reason = train.fit(
        run,
        texts.train,
        texts.valid,
        on_stall="stop",
        started=started,
        **{name: args[name] for name in train.FIT_SETTINGS},
    )
    go_on = options.go_on_command(run.save, given, ranks.here)
    return train.finish(run, reason, texts.test, args["bptt"], go_on)


if __name__ == "__main__":
    run_script(main, parallel=True)
