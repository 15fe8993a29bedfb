"""A run: what training changes, and how it is written down.

`Run.state()` holds everything that an exact resume needs; the class itself knows nothing of files but names.
"""

import os
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

import checkpoint
from batches import Texts
from files import RunFiles
from model import RNNModel, State, detach
from parallel import ALONE, OF_ONE_MACHINE, Ranks
from splitcross import SplitCrossEntropyLoss, linear_cross_entropy
from utils import RunError, UserError, check_space, copy_whole, figures, keep_freed_memory, ppl
from watch import RunLog, board_folder, say

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Progress:
    """Where a run stands: plain numbers, saved with its state."""

    lr: float  # the base rate, before the scaling by batch length
    epoch: int = 1
    row: int = 0  # of the batched text: where the next batch starts
    batch: int = 0  # of this epoch
    step: int = 0  # optimizer steps of the whole run
    loss_sum: float = 0.0  # over the batches since the last log line
    loss_count: int = 0
    epoch_s: float = 0.0  # spent in this epoch, as of `Run.count_time`
    best_loss: float | None = None  # validation, nats a token, of the saved model
    history: list[float] = field(default_factory=list)  # validation loss of every epoch

    def not_finite(self, what: str, step: int) -> RunError:
        """The error of a run that has diverged by `step`."""
        return RunError(
            f"{what} at epoch {self.epoch}, step {step}, rate {self.lr:g}; the saved model is as it was: try "
            "a lower --lr or --clip"
        )


class Run:
    """What a training step changes, and with `state()` everything that an exact resume needs.

    Args:
        script: who trains, main.py or finetune.py; only the same one can resume.
        args: the script's settings, plain data; they travel in the model.
        vocab: index -> word.
        save: where the model goes; the state goes to `save` + ".state".
        fingerprint: of the training text, to refuse a resume on another one.
        ranks: the processes that share the work.
    """

    def __init__(
        self,
        script: str,
        model: RNNModel,
        criterion: SplitCrossEntropyLoss,
        *,
        args: dict[str, Any],
        vocab: list[str],
        save: str,
        fingerprint: list[int],
        ranks: Ranks = ALONE,
    ) -> None:
        self.script, self.model, self.criterion, self.ranks = script, model, criterion, ranks
        self.args, self.vocab, self.save, self.fingerprint = args, vocab, save, fingerprint
        self.weights = nn.ModuleDict({"model": model, "criterion": criterion})  # all that is trained
        self.parameters = list(self.weights.parameters())
        self.amp = AMP[args["amp"]]  # forward and loss run under autocast to it; None: in float32
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        # The projection's softmax is what gains from a compiler: cuDNN's and oneDNN's layers would not.
        compiled = torch.compile(linear_cross_entropy, dynamic=True) if args["compile"] else None
        self.loss = partial(criterion, cross_entropy=compiled) if compiled else criterion
        self.optimizer = make_optimizer(self.parameters, args["optimizer"], args["lr"], args["wdecay"])
        self.average: AveragedModel | None = None
        self.columns = ranks.columns(args["batch_size"])  # this rank's, of the whole batch
        self.hidden: list[State] = self.first_hidden()
        self.lengths = torch.Generator().manual_seed(args["seed"])  # batch lengths, apart from the masks
        self.progress = Progress(lr=args["lr"])
        self.grad_norm: Tensor | None = None  # of the last step, before clipping; still on the device
        self.files = RunFiles(save, args["keep_last"])
        self.start_clock()
        self.log = RunLog(None)
        if ranks.leads:
            self.log = RunLog(f"{save}.log.jsonl", board_folder(args["tensorboard"], save, script))

    def start_clock(self) -> None:
        """From here on time counts as the epoch's."""
        self.counted_until = time.perf_counter()

    def count_time(self) -> None:
        """Brings the epoch's seconds up to date."""
        now = time.perf_counter()
        self.progress.epoch_s += now - self.counted_until
        self.counted_until = now

    def first_hidden(self) -> list[State]:
        """The state that an epoch begins with, of this rank's columns."""
        return self.model.init_hidden(self.columns.stop - self.columns.start)

    @property
    def averaging(self) -> bool:
        return self.average is not None

    def start_averaging(self) -> None:
        """From the next step on the weights enter a running mean; the descent goes on with the raw ones."""
        self.average = AveragedModel(self.weights, multi_avg_fn=get_swa_multi_avg_fn())

    def evaluated(self) -> tuple[RNNModel, SplitCrossEntropyLoss]:
        """The weights to evaluate with: the mean once it holds any, else the raw ones."""
        weights = self.average.module if self.average and self.average.n_averaged > 0 else self.weights
        return weights["model"], weights["criterion"]

    def save_model(self, loss: float) -> None:
        """Writes the model, now or once the disk takes it."""
        metrics = {
            "script": self.script,
            "fingerprint": self.fingerprint,
            "valid_loss": loss,
            "valid_ppl": ppl(loss),
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "averaged": self.averaging,
        }
        if self.ranks.leads:
            contents = checkpoint.model_contents(self.args, self.vocab, *self.evaluated(), metrics)
            self.files.save_model(contents)

    def save_state(self, displaced: dict[str, Any] | None = None) -> bool:
        """Writes the state; False when it cannot be written: the one before is kept.

        Raises:
            RunError: a weight is not finite, or not the same on all ranks, so that no run could go on from
                it; the one before is kept.
        """
        if not all(parameter.isfinite().all() for parameter in self.parameters):
            raise self.progress.not_finite("a weight is not finite", self.progress.step)
        self.ranks.check_same(self.parameters)
        self.count_time()
        state = self.state(displaced)
        return self.files.save_state(state) if self.ranks.leads else True

    def check_space(self) -> None:
        """Raises RunError when the disk is full before anything is trained; else not a byte is left there."""
        # The state is the largest file: the weights, and of each two moments under Adam, under SGD the mean
        # once it averages (a model that --max_steps displaces is left out).
        copies = 3 if self.args["optimizer"] == "adam" else 2
        if self.ranks.leads:
            size = copies * sum(p.numel() * p.element_size() for p in self.parameters)
            check_space(self.files.state, size)

    def state(self, displaced: dict[str, Any] | None = None) -> dict[str, Any]:
        """Plain data and tensors. `displaced`: the saved model that one of mid-epoch is about to replace;
        a whole run would still have it, so a resumed one puts it back.

        Of several ranks it holds all columns of the carried state, and the generators' states in a row each.
        """
        device = self.parameters[0].device
        generators = {"cpu": self.ranks.each(torch.get_rng_state()), "lengths": self.lengths.get_state()}
        if device.type == "cuda":
            generators["cuda"] = self.ranks.each(torch.cuda.get_rng_state(device))
        return {
            "format": checkpoint.STATE_FORMAT,
            "script": self.script,
            "args": self.args,
            "vocab": self.vocab,
            "fingerprint": self.fingerprint,
            "weights": self.weights.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "hidden": self.ranks.join_columns(detach(self.hidden)),
            "progress": asdict(self.progress),
            "displaced": displaced,
        }

    def load_state(self, state: dict[str, Any], given: dict[str, Any]) -> None:
        """Goes on from `state`; the flags `given` on the command line win over what it says.

        Raises:
            UserError: it was made on another text, or a part of it does not fit.
        """
        model_path, state_path = checkpoint.resume_paths(self.args["resume"])
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                f"--data {self.args['data']}: is not the text that {state_path} was made on; give that "
                "text, or remove the .state for a warm start from the model alone"
            )
        try:
            self.restore(state, given)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--resume {state_path}: a part of it does not fit this run ({reason}); remove it for a "
                "warm start from the model alone"
            ) from None
        self.ranks.check_alike({"step of the .state": self.progress.step})
        if self.ranks.leads:
            self.restore_model(state["displaced"], model_path)
        self.progress.best_loss = self.ranks.from_rank_0(self.progress.best_loss)
        say(f"| resumed at epoch {self.progress.epoch}, batch {self.progress.batch}")

    def restore_model(self, displaced: dict[str, Any] | None, path: str) -> None:
        """Puts the best model so far in its place: that of `path`, or the displaced one.

        The file may be of a later step than the state, and better than all models before it: the state is a
        copy from earlier, or could not be written after that model was. Only a better model replaces it: on
        the CPU, the same one at the latest.
        """
        metrics = checkpoint.load_model(path, "--resume")["metrics"] if os.path.exists(path) else None
        newer = metrics is not None and self.is_newer_best(metrics)
        if displaced is not None and not newer:
            checkpoint.save(self.save, displaced)
        elif metrics is not None and self.save != path:
            copy_whole(path, self.save)
        if newer:
            loss = self.progress.best_loss = metrics["valid_loss"]
            say(f"| {self.save} is of step {metrics['step']}: kept until a better one | {figures(loss)}")
        elif metrics is None and displaced is None and self.progress.best_loss is not None:
            self.progress.best_loss = None
            say(f"| {path}: the best model is not there; the next validation saves one, better or not")

    def is_newer_best(self, metrics: dict[str, Any]) -> bool:
        """Whether a saved model is of a later step of this run than its state, and the best so far.

        A model of another script or text is none of its steps: its loss says nothing here.
        """
        loss, best = metrics.get("valid_loss"), self.progress.best_loss
        same = metrics.get("script") == self.script and metrics.get("fingerprint") == self.fingerprint
        newer = same and metrics.get("step", 0) > self.progress.step
        return newer and loss is not None and (best is None or loss < best)

    def restore(self, state: dict[str, Any], given: dict[str, Any]) -> None:
        """The parts of a state, each to its place."""
        self.weights.load_state_dict(checkpoint.fit_names(state["weights"], self.weights))
        if state["average"] is not None:
            self.start_averaging()
            self.average.load_state_dict(checkpoint.fit_names(state["average"], self.average))
        if state["args"]["optimizer"] == self.args["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.args["wdecay"]
        self.progress = Progress(**state["progress"])
        if "lr" in given and given["lr"] != state["args"]["lr"]:  # else it stays divided as --when did
            self.progress.lr = given["lr"]
        device = self.parameters[0].device
        if state["hidden"][0][0].size(1) == self.args["batch_size"]:
            self.hidden = [
                tuple(tensor[:, self.columns].to(device) for tensor in layer) for layer in state["hidden"]
            ]
        else:  # another --batch_size: the columns of the text are others, this epoch starts again
            self.progress.row = self.progress.batch = 0
        generators = state["generators"]
        self.lengths.set_state(generators["lengths"])
        masks = torch.atleast_2d(generators["cpu"])  # (ranks, ·)
        if len(masks) != self.ranks.size:
            say(f"| {len(masks)} processes before, {self.ranks.size} now: not bit for bit the same run")
            self.ranks.seed(self.args["seed"], self.progress.step)
            return
        rank = self.ranks.rank
        torch.set_rng_state(masks[rank].clone())  # torch (2.13) reads the start of the storage, not of a view
        if "cuda" in generators and device.type == "cuda":
            torch.cuda.set_rng_state(torch.atleast_2d(generators["cuda"])[rank].clone(), device)


def make_optimizer(parameters: list[Tensor], name: str, lr: float, wdecay: float) -> torch.optim.Optimizer:
    """SGD (NT-ASGD's descent) or Adam, with weight decay, over model and criterion alike."""
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    fused = parameters[0].device.type == "cpu" or None  # one pass, without temporaries; None: torch decides
    return kind(parameters, lr=lr, weight_decay=wdecay, fused=fused)


def start_run(
    script: str,
    args: dict[str, Any],
    texts: Texts,
    device: torch.device,
    warm_start: dict[str, Any] | None,
    ranks: Ranks = ALONE,
) -> Run:
    """A run at its first step, from fresh weights or from those of a saved model; the same on all ranks."""
    ranks.start(device)
    # The gates of all positions, 16 bytes a hidden unit: where they are too large to be kept when freed,
    # keeping what is half as large gains 1 % of time and costs 8 % of memory (WikiText-2's LSTM).
    if 16 * args["batch_size"] * args["bptt"] * args["nhid"] > 2**25:
        keep_freed_memory(2**24)
    dropouts = {name: args[name] for name in checkpoint.DROPOUTS}
    if warm_start:
        model, criterion = checkpoint.restore(warm_start, **dropouts)
    else:
        model, criterion = checkpoint.build(args, texts.vocab, **dropouts)
    args["splits"] = criterion.splits
    run = Run(
        script,
        model.to(device),
        criterion.to(device),
        args=args,
        vocab=texts.vocab,
        save=args["save"],
        fingerprint=[len(texts.train), int(texts.train.sum(dtype=torch.int64))],
        ranks=ranks,
    )
    alike = {f"--{name}": value for name, value in args.items() if name not in OF_ONE_MACHINE}
    ranks.check_alike(
        {
            "goes on with a run": bool(args["resume"]),
            "the script": script,
            **alike,
            "words": len(texts.vocab),
            "tokens to train on, and a sum of them": run.fingerprint,
        }
    )
    if not ranks.leads:  # the weights are drawn, by the same seed on all; masks are not to be the same
        ranks.seed(args["seed"])
    say(f"Args: {args}\nModel total parameters: {sum(p.numel() for p in run.parameters)}")
    return run
