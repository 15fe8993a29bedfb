"""Train a language model on a folder of text, from scratch or from where an earlier run stopped.

    python main.py --data data/penn --batch_size 20 --dropouti 0.4 --dropouth 0.25 --epochs 500 --save PTB.pt
    python main.py --resume PTB.pt                               # go on with that run
    python main.py --resume auto --save PTB.pt --max_minutes 60  # a cluster's job, submitted again and again
    python main.py --resume PTB.pt --epochs 0 --data data/other  # only evaluate, on another text

Method: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182.
"""

from evaluate import evaluate_only
from harness.flags import FLAGS, ArgumentParser
from harness.script import run_script
from harness.start import begin, load_corpus
from train import evaluate_start, finish, fit, start_run


def main() -> int:
    given = vars(ArgumentParser(__doc__, *FLAGS).parse_args())
    with begin("main.py", given) as start:  # processes, device, settings, a state or model to go on from
        if start.saved and start.args.epochs == 0:
            if start.ranks.is_main:
                evaluate_only(start.saved, load_corpus(start), start.args.bptt, start.args.temperature)
            return 0
        run = start_run(start)  # corpus, model, optimizer; then the state, if there is one
        if start.saved and start.overwrites_start:
            evaluate_start(run, "warm start")
        del start  # frees the state, which is several times as large as the weights
        why = fit(run)
        return finish(run, why)


if __name__ == "__main__":
    run_script(main, parallel=True)
