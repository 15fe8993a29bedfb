"""Where a run stands: the part of its state that is plain numbers.

python -c "import torch; print(torch.load('PTB.pt.state', weights_only=True)['at'])"
"""

from dataclasses import dataclass, field

from utils import RunError


@dataclass
class Position:
    """Where a run stands: plain numbers, saved with its state."""

    lr: float  # the base rate, before annealing and the scaling by batch length
    epoch: int = 1
    row: int = 0  # of the batched text: where the next batch starts
    batch: int = 0  # of this epoch
    step: int = 0  # optimizer steps of the whole run
    loss_sum: float = 0.0  # over the batches since the last log line
    loss_count: int = 0
    epoch_s: float = 0.0  # spent in this epoch, as of `Run.count_time`
    best_loss: float | None = None  # validation, nats per token, of the saved model
    history: list[float] = field(default_factory=list)  # validation loss of every epoch
    before: str = ""  # the sha256 of what lay at --save when the run began: another run's model

    def __post_init__(self) -> None:
        """Raises TypeError when a count from a file is no whole number."""
        for name in ("epoch", "row", "batch", "step", "loss_count"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"its {name} is {getattr(self, name)!r}")

    def restart_epoch(self) -> None:
        """To the epoch's first row: nothing is counted yet."""
        self.row = self.batch = self.loss_count = 0
        self.loss_sum = self.epoch_s = 0.0

    def not_finite(self, what: str, step: int) -> RunError:
        """The error of a run that has diverged by `step`."""
        return RunError(
            f"{what} at epoch {self.epoch}, step {step}, base rate {self.lr:g}; the saved model is as it was: try "
            "a lower --lr or --clip"
        )
