"""A run: what training changes, where it stands, and how it is written down and gone on with.

`Run.state()` holds everything that an exact resume needs. harness/start.py says how a run begins.
"""

import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import harness.files as files
from corpus.files import file_digest
from data import Corpus
from harness.log import RunLog, figures, ppl, say, warn
from harness.position import Position
from harness.ranks import ALONE, Ranks
from model import Criterion, Hidden, RNNModel, build, detach
from mos import sampled
from optim import Mean, annealed, make_optimizer
from products import has_bf16
from utils import UserError, keep_freed_memory, map_tensors, out_of_memory

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """What a training step changes, and all that it needs.

    Args:
        script: who trains, main.py or finetune.py; only the same one can resume.
        args: the settings; they travel in the model.
        corpus: its texts on the device; its digest tells a resumed run that it is the same text.
        saved: a model to start from, as `files.load_model` reads it.
        ranks: the processes that share the work.

    Raises:
        UserError: the settings do not go together.
    """

    def __init__(
        self, script: str, args: Namespace, corpus: Corpus, device: torch.device,
        saved: dict[str, Any] | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.script, self.args, self.corpus, self.device, self.ranks = script, args, corpus, device, ranks
        # The gates of all positions, 16 bytes per hidden unit: where they are too large to be kept when freed,
        # keeping what is half as large gains 1 % of time and costs 8 % of memory (WikiText-2's LSTM).
        if 16 * args.batch_size * args.bptt * args.nhid > 2**25:
            keep_freed_memory(2**24)
        try:
            self.model, self.criterion = build(vars(args), len(corpus.vocab))
            # The projection's softmax is what gains from a compiler: cuDNN's and oneDNN's layers would not.
            self.loss = self.criterion.compiled() if args.compile else self.criterion
            self.loss = sampled(self.criterion, args.samples, args.compile) if args.samples > 1 else self.loss
        except ValueError as error:
            raise UserError(str(error)) from None
        args.splits = self.criterion.splits
        self.weights = nn.ModuleDict({"model": self.model, "criterion": self.criterion})  # all that is trained
        if saved:
            self.model.load_state_dict(files.fit_names(saved["model"], self.model))
            self.criterion.load_state_dict(saved["criterion"])
        self.weights.to(device)
        self.parameters = list(self.weights.parameters())
        ranks.broadcast_weights(self.parameters)
        if not ranks.is_main:
            ranks.seed(args.seed)  # dropout masks are not to be the same

        self.amp = AMP[args.amp]  # forward and loss run under autocast to it; None: in float32
        if args.amp == "bf16" and device.type == "cpu" and not has_bf16():
            warn("--amp bf16: this processor has no bfloat16; it stays with float32")
            self.amp = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.optimizer = make_optimizer(self.parameters, args.optimizer, args.lr, args.wdecay, args.beta1)
        self.mean: Mean | None = None  # of the weights, once averaging is on
        self.columns = ranks.columns(args.batch_size)  # this rank's, of the whole batch
        self.hidden: list[Hidden] = self.first_hidden()
        self.offsets: Tensor | None = None  # by which the columns are rotated in this epoch, with --shuffle
        self.lengths = torch.Generator().manual_seed(args.seed)  # batch lengths, apart from the masks
        self.at = Position(lr=args.lr)
        self.grad_norm: Tensor | None = None  # of the last step, before clipping; still on the device
        self.unread: list[Tensor] = []  # losses, still on the device
        self.unwritten: dict[str, files.NotWrittenError] = {}  # files whose last attempt failed
        self.log = RunLog(None)
        self.deadline_s: float | None = None  # of time.monotonic, for --max_minutes
        self.start_clock()

    def first_hidden(self) -> list[Hidden]:
        """What an epoch begins with, of this rank's columns."""
        return self.model.init_hidden((self.columns.stop - self.columns.start) * self.args.samples)

    def start_epoch(self) -> None:
        """Nothing is carried into an epoch; its columns begin where the draw says."""
        self.model.train()
        self.criterion.train()
        if self.at.row == 0:
            self.hidden, columns = self.first_hidden(), self.args.batch_size
            rows = len(self.corpus.train) // columns
            shuffle = self.args.shuffle
            self.offsets = torch.randint(rows, (columns,), generator=self.lengths) if shuffle else None

    def rate(self) -> float:
        """The learning rate of the batch to come, if it is of `bptt` rows."""
        args, at = self.args, self.at
        last_row = max(1, len(self.corpus.train) // args.batch_size - 1)  # bench.py's text is empty
        return at.lr * annealed(at.epoch - 1 + at.row / last_row, args.anneal, args.epochs)

    def start_averaging(self) -> None:
        """From the next step on the weights enter a running mean; the descent goes on with the raw ones."""
        self.mean = Mean(self.weights)

    def evaluated(self) -> tuple[RNNModel, Criterion]:
        """The weights to evaluate with: the mean once it holds any, else the raw ones."""
        weights = self.mean.weights if self.mean and self.mean.count else self.weights
        return weights["model"], weights["criterion"]

    # Position, losses and time.

    def start_clock(self) -> None:
        """From here on time counts as the epoch's."""
        self.counted_until = time.perf_counter()

    def count_time(self) -> None:
        """Brings the epoch's seconds up to date."""
        now = time.perf_counter()
        self.at.epoch_s += now - self.counted_until
        self.counted_until = now

    def count(self, loss: Tensor, rows: int) -> None:
        """One step more, over so many rows of text."""
        self.at.row, self.at.batch, self.at.step = self.at.row + rows, self.at.batch + 1, self.at.step + 1
        self.unread.append(loss)
        if self.device.type == "cpu":  # elsewhere reading waits for the device: at the log interval only
            self.read_losses()

    def read_losses(self) -> None:
        """Adds up the last steps' losses, means over ranks: a synchronisation on CUDA.

        Raises:
            RunError: one of them is not finite.
        """
        if not self.unread:
            return
        at, losses = self.at, self.ranks.sum(torch.stack(self.unread).tolist())
        for i, loss in enumerate(losses, start=1):
            loss /= self.ranks.size
            if not -torch.inf < loss < torch.inf:
                raise at.not_finite(f"the loss is {loss}", at.step - len(losses) + i)
            at.loss_sum, at.loss_count = at.loss_sum + loss, at.loss_count + 1
        self.unread.clear()

    def mean_loss(self) -> float | None:
        """Since the last log line, as far as losses have been read."""
        return self.at.loss_sum / self.at.loss_count if self.at.loss_count else None

    def next_epoch(self) -> None:
        self.at.epoch += 1
        self.at.restart_epoch()

    # Files: rank 0 alone writes. A disk that does not take one costs a warning, and the one before is kept.

    def write(self, path: str, write: Callable[[], object]) -> bool:
        """Calls `write()`, which makes `path`; returns whether that went well."""
        try:
            write()
        except files.NotWrittenError as error:
            if path not in self.unwritten:
                kept = "what was there is kept; the run goes on, and tries again"
                warn(f"{path}: cannot be written ({error.reason}), {kept}")
            self.unwritten[path] = error
            return False
        self.unwritten.pop(path, None)
        return True

    def save_model(self, loss: float, partial: bool = False) -> bool:
        """Writes the weights to evaluate with; returns whether that went well. Collective.

        `partial`: of mid-epoch, so that any later best replaces them.
        """
        metrics = {
            **{"script": self.script, "fingerprint": self.corpus.digest, "valid_loss": loss, "partial": partial},
            **{"epoch": self.at.epoch, "step": self.at.step, "averaged": self.mean is not None},
            "valid_ppl": ppl(loss),
        }
        written = None
        if self.ranks.is_main:
            contents = files.model_contents(
                self.args, self.corpus.vocab, *self.evaluated(), metrics, self.corpus.tokenizer
            )
            written = self.write(self.args.save, lambda: files.save(self.args.save, contents))
        return self.ranks.from_rank_0(written)

    def copy_model(self, path: str) -> None:
        """Keeps a copy of the best model so far."""
        if self.ranks.is_main and os.path.exists(self.args.save):
            try:
                files.copy(self.args.save, path)
            except files.NotWrittenError as error:
                warn(f"{path}: cannot be written ({error.reason}), the run goes on without this copy")

    def save_state(self) -> None:
        """Writes the state.

        Raises:
            RunError: a loss or weight is not finite, so that no run could go on from it.
        """
        self.read_losses()
        if not all(parameter.isfinite().all() for parameter in self.parameters):
            raise self.at.not_finite("a weight is not finite", self.at.step)
        self.count_time()
        path, state = f"{self.args.save}.state", self.state()
        if self.ranks.is_main:
            self.write(path, lambda: files.save(path, state))

    def state(self) -> dict[str, Any]:
        """Plain data and CPU tensors. Of several ranks it holds all columns of what is carried, and the
        generators' states in a row each. Collective."""
        generators = {"cpu": self.ranks.each(torch.get_rng_state()), "lengths": self.lengths.get_state()}
        if self.device.type == "cuda":
            generators["cuda"] = self.ranks.each(torch.cuda.get_rng_state(self.device))
        mean = self.mean and {"count": self.mean.count, "weights": self.mean.weights.state_dict()}
        tensors = {
            **{"weights": self.weights.state_dict(), "mean": mean, "optimizer": self.optimizer.state_dict()},
            **{"scaler": self.scaler.state_dict(), "generators": generators, "offsets": self.offsets},
            "hidden": self.ranks.join_columns(detach(self.hidden)),
        }
        return {
            **{"format": files.STATE_FORMAT, "script": self.script, "args": vars(self.args)},
            **{"vocab": self.corpus.vocab, "tokenizer": self.corpus.tokenizer},
            **{"fingerprint": self.corpus.digest, "at": asdict(self.at)},
            **map_tensors(Tensor.cpu, tensors),
        }

    def load_state(self, state: dict[str, Any], given: dict[str, Any]) -> None:
        """Goes on from `state`; the flags `given` on the command line win over what it says.

        Raises:
            UserError: it was made on another text, or a part of it does not fit.
        """
        path = f"{self.args.resume}.state"
        hint = "remove the .state for a warm start from the model alone"
        if state["fingerprint"] != self.corpus.digest:
            raise UserError(
                f"--data {self.args.data}: is not the text that {path} was made on; give that text, or {hint}"
            )
        try:
            self.restore(state, given)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"--resume {path}: a part of it does not fit this run ({reason}); {hint}") from None
        best = self.find_best() if self.ranks.is_main else None
        self.at.best_loss = self.ranks.from_rank_0(best)
        say(f"| resumed at epoch {self.at.epoch}, batch {self.at.batch}")

    def restore(self, state: dict[str, Any], given: dict[str, Any]) -> None:
        """The parts of a state, each to its place."""
        stored, args = state["args"], self.args
        self.weights.load_state_dict(files.fit_names(state["weights"], self.weights))
        if state["mean"] is not None:
            self.start_averaging()
            self.mean.weights.load_state_dict(files.fit_names(state["mean"]["weights"], self.weights))
            self.mean.count = state["mean"]["count"]
        self.at = Position(**state["at"])
        if stored["optimizer"] == args.optimizer:
            now = [name for name, _ in self.weights.named_parameters()]
            self.optimizer.load_state_dict(files.fit_order(state["optimizer"], state["weights"], now))
        else:
            self.at.lr = args.lr
        if "lr" in given and given["lr"] != stored["lr"]:  # else it stays divided as --when did
            self.at.lr = given["lr"]
        for group in self.optimizer.param_groups:
            group["weight_decay"] = args.wdecay
            group |= {"betas": (args.beta1, 0.999)} if "betas" in group else {}
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        D = args.samples
        if (stored["batch_size"], stored.get("samples", 1)) == (args.batch_size, D):
            own = slice(self.columns.start * D, self.columns.stop * D)
            self.hidden = map_tensors(lambda x: x[:, own].to(self.device, torch.float32), state["hidden"])
        else:  # the columns are others, of the text or of what is carried: this epoch starts again
            self.at.restart_epoch()
        self.offsets = state["offsets"]
        generators, rank = state["generators"], self.ranks.rank
        self.lengths.set_state(generators["lengths"])
        masks = torch.atleast_2d(generators["cpu"])  # (ranks, ·)
        if len(masks) != self.ranks.size:
            say(f"| {len(masks)} processes before, {self.ranks.size} now: not bit for bit the same run")
            self.ranks.seed(args.seed, self.at.step)
            return
        torch.set_rng_state(masks[rank].clone())  # torch (2.13) reads the start of the storage, not of a view
        if "cuda" in generators and self.device.type == "cuda":
            torch.cuda.set_rng_state(torch.atleast_2d(generators["cuda"])[rank].clone(), self.device)

    def find_best(self) -> float | None:
        """The loss to beat: that of the best model of this run on the disk; for another --save it is copied.

        It may be of a later step than the state, which is from earlier: on the CPU, the run comes to it again.
        """
        path, save = self.args.resume, self.args.save
        if not os.path.exists(path):
            if self.at.best_loss is not None:
                say(f"| {path}: the best model is not there; the next validation saves one, better or not")
            return None
        metrics = {"valid_loss": torch.inf, **files.load_model(path, "--resume")["metrics"]}
        made = metrics.get("script"), metrics.get("fingerprint")
        of_another = made != (self.script, self.corpus.digest) or file_digest(path) == self.at.before
        if save != path:
            files.copy(path, save)
        if of_another:
            return self.at.best_loss  # that run's says nothing here
        if metrics.get("step", 0) > self.at.step:
            of = f"of step {metrics['step']}: kept until a better one"
            say(f"| {save} is {of} | {figures(metrics['valid_loss'])}")
        loss = metrics["valid_loss"]
        return loss if -torch.inf < loss < torch.inf and not metrics.get("partial") else None
