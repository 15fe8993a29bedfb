"""`main.py --keep_words`: the weights are kept after every mark in words of training, beside the saved model."""

from corpus.words import WordCount
from data import rotate_columns
from harness.checkpoint import SavedRun
from harness.files import NotWrittenError, model_contents, save
from harness.log import say_or_drop, warn


def mark_name(mark: int) -> str:
    """BabyLM's name of the weights after `mark` million words."""
    return f"chck_{mark}M"


def mark_path(save: str, mark: int) -> str:
    """Their file."""
    return f"{save}.{mark_name(mark)}"


class Keeper:
    """Writes the weights to evaluate with as a saved model at each mark of `corpus.words.MARKS`.

    A file holds no validation loss. After a kill the run comes to the same mark again and writes the same file again.
    """

    def __init__(self, run: SavedRun) -> None:
        self.count = WordCount(run.corpus.tokenizer, run.corpus.vocab, run.device)
        self.epoch = 0  # whose words are counted

    def after_step(self, run: SavedRun, rows: int) -> None:
        """Writes what is due after a step over `rows` rows of text. Rank 0 alone writes."""
        at = run.at
        if self.epoch != at.epoch:
            ids, columns = run.corpus.train, run.args.batch_size
            self.count.start_epoch(ids if run.offsets is None else rotate_columns(ids, columns, run.offsets), columns)
            self.epoch = at.epoch
        for mark in self.count.marks(at.epoch, at.row - rows, at.row) if run.ranks.is_main else []:
            path, (model, criterion) = mark_path(run.args.save, mark), run.best_weights()
            metrics = {
                "script": run.script, "fingerprint": run.corpus.digest, "million_words": mark, "epoch": at.epoch,
                "step": at.step, "averaged": run.mean is not None,
            }  # fmt: skip
            contents = model_contents(run.args, run.corpus.vocab, model, criterion, metrics, run.corpus.tokenizer)
            try:
                save(path, contents)
            except NotWrittenError as error:
                warn(f"{path}: cannot be written ({error.reason}), the run goes on without it")
                continue
            say_or_drop(f"| {mark} million words of training | {path}")
