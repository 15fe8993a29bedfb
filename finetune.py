"""Fine-tune a saved model: averaged SGD from the first step, until the validation loss stops falling.

    python finetune.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --save PTB.pt
    python finetune.py --data data/penn --save PTB.pt --output PTB.ft.pt  # do not change PTB.pt
    python finetune.py --resume PTB.ft.pt                                 # go on with a run that was stopped
    python finetune.py --save PTB.pt --resume auto --max_minutes 60       # a cluster's job, submitted again and again

The file is replaced only by a better model, whole or not at all. Flags that are not given are taken from the saved
model, except --lr (30), --epochs and --nonmono, which have their defaults. Method: Merity, Keskar, Socher, arXiv
1708.02182, section 5.
"""

from harness.checkpoint import save_model, save_state
from harness.flags import MODEL, OPTIMISATION, REGULARISATION, RUN, ArgumentParser, Flag
from harness.script import run_script
from harness.start import begin
from train import evaluate_start, finish, fit, start_run


def main() -> int:
    parser = ArgumentParser(__doc__, RUN, MODEL, REGULARISATION, OPTIMISATION, saved=True)
    output = Flag("--output", {}, None, "write the better model to this file and do not change --save")
    parser.add_flags("finetune.py only", [output])
    given = vars(parser.parse_args())
    with begin("finetune.py", given) as start:  # processes, device, settings, a state or model to go on from
        run = start_run(start)  # corpus, model, optimizer; then the state, if there is one
        if start.saved:
            loss = evaluate_start(run, "before fine-tuning")
            run.start_averaging()
            if not start.overwrites_start:
                save_model(run, loss)  # alone it is no start of a run: the next command begins again from --save
                save_state(run)
        del start  # frees the state, which is several times as large as the weights
        why = fit(run, stop_on_stall=True)
        return finish(run, why)


if __name__ == "__main__":
    run_script(main, parallel=True)
