"""Fine-tune a saved model: averaged SGD from the first step, until the validation loss stops falling.

    python finetune.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --save PTB.pt
    python finetune.py --data data/penn --save PTB.pt --output PTB.ft.pt  # leave PTB.pt as it is
    python finetune.py --resume PTB.ft.pt                                 # go on with a stopped run
    python finetune.py --save PTB.pt --resume auto --max_minutes 60       # a cluster's job, each time

The file is replaced only by a better model, whole or not at all. What is not given comes from the file, but for a
course of its own: the rate (30), --epochs and --nonmono are as by default. Method: Merity, Keskar, Socher, arXiv
1708.02182, section 5.
"""

import train
from harness import ArgumentParser, Flag, run_script
from harness.flags import MODEL, OPTIMISATION, REGULARISATION, RUN
from harness.start import begin, start_run


def main() -> int:
    parser = ArgumentParser(__doc__, RUN, MODEL, REGULARISATION, OPTIMISATION, saved=True)
    output = Flag("--output", {}, None, "write the better model here and leave --save as it is")
    parser.add_flags("finetune.py only", [output])
    given = vars(parser.parse_args())
    start = begin("finetune.py", given)  # the device, the processes, the settings, what there is to go on with
    run = start_run(start)  # seed, corpus, model, optimizer
    if start.found.saved:
        loss = train.evaluate_start(run, "before fine-tuning")
        if not start.replaces:
            run.save_model(loss)
        run.start_averaging()
    del start  # a state is several times the weights
    why = train.fit(run, on_stall="stop")
    return train.finish(run, why)


if __name__ == "__main__":
    run_script(main, parallel=True)
