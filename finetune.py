"""Fine-tune a saved model: averaged SGD from the first step, until the validation loss stops falling.

    python finetune.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --save PTB.pt
    python finetune.py --data data/penn --save PTB.pt --output PTB.ft.pt  # leave PTB.pt as it is
    python finetune.py --resume PTB.ft.pt                                 # go on with a stopped run
    python finetune.py --save PTB.pt --resume auto --max_minutes 60       # a cluster's job, each time

The file is replaced only by a better model, whole or not at all. The architecture and every setting that is not
given come from the file. Method: Merity, Keskar, Socher, arXiv 1708.02182, section 5.
"""

from argparse import Namespace
from typing import Any

import train
from harness import files, flags
from harness.log import say
from harness.script import run_script
from harness.start import begin, find_state, start_run
from utils import UserError

SCRIPT = "finetune.py"
# A new fine-tuning starts its own course: these do not come from the training that made the model.
OWN = ("epochs", "optimizer", "lr", "when", "nonmono")
OUTPUT = flags.Flag("--output", {}, None, "write the better model here and leave --save as it is")


def parse_args() -> dict[str, Any]:
    """The flags given on the command line, and no others."""
    parser = flags.ArgumentParser(__doc__, flags.RUN, flags.MODEL, flags.REGULARISATION, flags.OPTIMISATION)
    parser.add_flags("finetune.py alone", [OUTPUT])
    return vars(parser.parse_args())


def main() -> int:
    start = begin(parse_args(), find_start)  # the device, the processes, the settings, what there is to go on with
    args = start.args
    run = start_run(SCRIPT, start)  # seed, corpus, model, optimizer
    if start.saved:
        loss = train.evaluate_start(run, "before fine-tuning")
        if args.save != start.given.get("save", args.save):
            run.save_model(loss)
        run.start_averaging()
    deadline_s = start.began_s + 60 * args.max_minutes if args.max_minutes else None
    del start  # a state is several times the weights
    why = train.fit(run, "stop", deadline_s)
    return train.finish(run, why)


def find_start(given: dict[str, Any]) -> tuple[Namespace, dict[str, Any] | None, dict[str, Any] | None]:
    """The settings, and the state to go on from or else the model to fine-tune."""
    path, state = find_state(given, SCRIPT)
    auto = given.get("resume") == "auto"
    if state and state["script"] == SCRIPT:
        saved, stored = None, state["args"]
    elif path and not auto:
        raise UserError(f"--resume {path}.state: there is no such file; fine-tune with --save {path}")
    else:
        path, state = given.get("save", "PTB.pt"), None
        saved = files.load_model(path, "--save")
        stored = {name: value for name, value in saved["args"].items() if name not in OWN}
    if auto:
        say(f"| --resume auto: {f'goes on with {path}' if state else f'no run of {path} yet, starts one'}")
    flags.check_shape(given, stored, path)
    args = flags.resolve_args({**given, "resume": path if state else ""}, stored)
    args.save = given.get("output", given.get("save", path))
    return args, state, saved


if __name__ == "__main__":
    run_script(main, parallel=True)
