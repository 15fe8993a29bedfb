"""The files of a run, written so that a full disk costs no more than the newest checkpoint.

That a file cannot be written during training is said once; the run goes on with the one before, and tries
again at every checkpoint and epoch's end. Models wait in memory until they are written; a state is simply out
of date. Only what is still missing when the run ends fails it.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkpoint
from utils import RunError, sync_folder
from watch import warn


class RunFiles:
    """`save` and what lies beside it: the best model, its copies, the state, the numbered states.

    Args:
        save: where the model goes; the state goes to `save` + ".state".
        keep_last: so many states stay, as `save` + ".state.STEP", the newest among them; 0: none.
    """

    def __init__(self, save: str, keep_last: int) -> None:
        self.save, self.keep_last = save, keep_last
        self.state = str(checkpoint.state_path(save))
        self.written_step: int | None = None  # of the state on the disk, once this run has written one
        self.waiting: dict[str, bytes] = {}  # models that could not be written yet, by path
        self.failing: dict[str, RunError] = {}  # the files that could not be written the last time, and why
        self.in_state = False  # the state on the disk holds the model that waits
        self.said = False
        self.said_copy = False  # that a numbered state could not be written
        self.at_end = False  # of the run: from now on `require_written` says what is missing

    def save_model(self, contents: dict[str, Any]) -> None:
        """Writes the best model, or keeps it in memory until it can be written."""
        self.waiting.pop(self.save, None)  # one that waits is the best no more
        if not self.attempt(self.save, lambda: checkpoint.save(self.save, contents)):
            buffer = io.BytesIO()
            torch.save(contents, buffer)
            self.waiting[self.save], self.in_state = buffer.getvalue(), False

    def copy_model(self, path: str) -> None:
        """Copies the best model to `path`, now or once it can be written."""
        data = self.waiting.get(self.save) or Path(self.save).read_bytes()
        self.waiting[path] = data
        self.retry()

    def best_model(self) -> dict[str, Any]:
        """The contents of the best model: of the one that waits, or of the file."""
        if self.save in self.waiting:
            return torch.load(io.BytesIO(self.waiting[self.save]), weights_only=True)
        return checkpoint.load_model(self.save, "--save")

    def save_state(self, contents: dict[str, Any]) -> bool:
        """Writes the state, and what waits before it; False when the state could not be written.

        A model that still has to wait travels in the state, as the one that a resumed run puts in place.
        """
        self.retry()
        waits = self.save in self.waiting and contents["displaced"] is None
        if waits:
            contents = contents | {"displaced": self.best_model()}
        if not self.attempt(self.state, lambda: checkpoint.save(self.state, contents)):
            return False
        self.written_step, self.in_state = contents["progress"]["step"], waits
        if self.keep_last:
            self.keep_copy(f"{self.state}.{self.written_step}")
        return True

    def keep_copy(self, copy: str) -> None:
        """Gives the state that was just written a numbered name too, and drops the oldest such ones."""

        def link() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(copy)
            try:
                os.link(self.state, copy)  # one file of two names: whole, at no cost
                sync_folder(Path(copy))
            except OSError:  # a file system without links
                data = Path(self.state).read_bytes()
                checkpoint.save_bytes(copy, lambda file: file.write(data))

        try:
            link()
        except (checkpoint.NotWrittenError, OSError) as error:
            if not self.said_copy:  # apart from `said`: the state itself has been written
                self.said_copy = True
                reason = getattr(error, "reason", None) or error.strerror
                warn(f"{copy}: cannot be written ({reason}); the run goes on, without copies that do not fit")
            return
        with contextlib.suppress(OSError):
            folder, name = os.path.split(self.state)
            numbered = re.compile(re.escape(name) + r"\.\d+").fullmatch
            copies = [entry.path for entry in os.scandir(folder or ".") if numbered(entry.name)]
            # By time, not by step: a run that went back to an older state has its newest at smaller steps.
            for old in sorted(copies, key=lambda path: -os.stat(path).st_mtime_ns)[self.keep_last :]:
                os.unlink(old)

    def retry(self) -> None:
        """Tries once more to write the models that wait."""
        for path in list(self.waiting):
            if self.attempt(path, partial(self.write_waiting, path)):
                del self.waiting[path]

    def write_waiting(self, path: str) -> None:
        checkpoint.save_bytes(path, lambda file: file.write(self.waiting[path]))

    def attempt(self, path: str, write: Callable[[], None]) -> bool:
        """Calls `write`, and says so when that fails for the first time, or succeeds again."""
        try:
            write()
        except (checkpoint.NotWrittenError, OSError) as error:
            if isinstance(error, OSError):
                error = checkpoint.NotWrittenError(path, error.strerror or str(error))
            self.failing[path] = error
            if not (self.said or self.at_end):
                self.said = True
                warn(f"{path}: cannot be written ({error.reason}); {self.kept(path)}")
            return False
        self.failing.pop(path, None)
        if self.said and not self.failing:
            self.said = False
            warn(f"{path}: written; saving works again")
        return True

    def kept(self, path: str) -> str:
        """What a warning about this file says of what is left."""
        kept = "what was there is kept"
        if path == self.state and self.written_step is not None:
            kept = f"the one of step {self.written_step} is kept"
        elif path in self.waiting or path == self.save:
            kept += ", the new one waits in memory"
        return f"{kept}; the run goes on and tries again at every checkpoint and epoch's end"

    @contextlib.contextmanager
    def last_try(self) -> Iterator[None]:
        """Inside, an error that ends the run does not take along, without a word, the models that wait."""
        try:
            yield
        except BaseException:
            self.at_end = True
            self.retry()
            for path in self.waiting:
                end = f"is in {self.state}" if self.is_in_state(path) else "is lost"
                reason = self.failing[path].reason
                warn(f"{path}: cannot be written ({reason}); what was there is kept, the new one {end}")
            raise

    def is_in_state(self, path: str) -> bool:
        """Whether this model waits, and the state on the disk holds it: a resumed run puts it in place."""
        return path == self.save and self.in_state

    def require_written(self, models_only: bool = False) -> None:
        """At the end of a run: tries what waits once more.

        Raises:
            RunError: the best model, a copy of it or (unless `models_only`) the state is not on the disk.
        """
        self.at_end = True
        self.retry()
        missing = [path for path in self.failing if path in self.waiting or not models_only]
        if not missing:
            return
        error = self.failing[missing[0]]
        if self.is_in_state(missing[0]):
            error = RunError(
                f"{self.save}: cannot be written ({error.reason}); the best model is in {self.state}: "
                f"free some space, then --resume {self.save} puts it in place"
            )
        raise error
