"""Train a language model on a folder of text, from scratch or from where an earlier run stopped.

    python main.py --data data/penn --batch_size 20 --dropouti 0.4 --dropouth 0.25 --epochs 500 --save PTB.pt
    python main.py --resume PTB.pt                               # go on with that run
    python main.py --resume auto --save PTB.pt --max_minutes 60  # a cluster's job, submitted again and again
    python main.py --resume PTB.pt --epochs 0 --data data/other  # evaluate on other text, change nothing

Method: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182.
"""

import train
from harness import ArgumentParser, run_script
from harness.flags import FLAGS
from harness.start import begin, load_corpus, start_run


def main() -> int:
    given = vars(ArgumentParser(__doc__, *FLAGS).parse_args())
    start = begin("main.py", given)  # the device, the processes, the settings, what there is to go on with
    args, _, saved, path = start.found
    if args.epochs == 0:
        return train.evaluate_only(saved, path, load_corpus(start), args.bptt) if start.ranks.is_main else 0
    run = start_run(start)  # seed, corpus, model, optimizer
    if saved and start.replaces:
        train.evaluate_start(run, "warm start")
    del start, saved  # a state is several times the weights
    why = train.fit(run)
    return train.finish(run, why)


if __name__ == "__main__":
    run_script(main, parallel=True)
