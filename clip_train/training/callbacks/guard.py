"""What follows when steps go wrong: they are counted; too many in a row send the run back to a checkpoint or end it."""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.distributed import gather_objects
from clip_train.errors import DivergedError
from clip_train.training.callbacks.health import Health
from clip_train.training.module import ClipModule
from clip_train.training.rollback import RollBack

log = logging.getLogger(__name__)

T = TypeVar("T")

_NAMED = 20  # skipped steps in the log
_KEPT_STEPS = 200  # for the report


class StepRecord(NamedTuple):
    """A step and what was measured in it; `samples_seen` as of its end."""

    step: int
    samples_seen: int
    metrics: Mapping[str, float]

    @property
    def is_bad(self) -> bool:
        return not (math.isfinite(self.metrics["train/loss"]) and math.isfinite(self.metrics["train/grad_norm"]))


class Guard(Callback):
    """Judges every step, on every rank alike, as loss and gradient norm are the same on all.

    A bad step has changed nothing (`bad_step.py`). `max_bad_steps` of them in a row show that weights or data are
    spoilt: the run goes back to its last checkpoint, or to its start, and leaves out the data from there to the end of
    the row, as the same data would lead to the same place. No checkpoint is written while the last step was bad.

    Args:
        max_bad_steps: so many in a row are too many.
        max_rollbacks: in the whole run; after that it ends.
        health: warns of what is odd but finite.
        last_checkpoint: the newest valid one, and the samples it has seen; called on the first rank.
        report: writes about the last steps, and the bad ones among them, and returns where; called on the first rank.
        undone: the roll-back that led here.

    Attributes:
        skipped_steps: steps that changed nothing.
    """

    def __init__(
        self,
        *,
        max_bad_steps: int,
        max_rollbacks: int,
        health: Health,
        last_checkpoint: Callable[[], tuple[Path, int] | None],
        report: Callable[[Sequence[StepRecord], int], Path],
        undone: RollBack | None = None,
    ) -> None:
        self.max_bad_steps, self.max_rollbacks, self.health = max_bad_steps, max_rollbacks, health
        self.last_checkpoint, self.report, self.undone = last_checkpoint, report, undone
        self.skipped_steps = 0
        self.rollbacks = undone.count if undone else 0
        self._bad_in_row = 0
        self._fault: StepRecord | None = None  # the last step of a row that is too long
        self._last_steps: deque[StepRecord] = deque(maxlen=max(_KEPT_STEPS, 2 * max_bad_steps))

    @property
    def in_bad_row(self) -> bool:
        """Whether the last step that was read was bad: what comes next may show that the state before it is spoilt."""
        return self._bad_in_row > 0

    def setup(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        self._leave_out(pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: ClipModule, checkpoint: dict) -> None:
        self._leave_out(pl_module)  # the module has just read the checkpoint's own number

    def _leave_out(self, module: ClipModule) -> None:
        if self.undone:
            module.skipped_samples = self.undone.skipped_samples

    def note(self, step: int, samples_seen: int, metrics: dict[str, float]) -> None:
        """Judge a step; adds `train/skipped_steps` to its metrics."""
        record = StepRecord(step, samples_seen, metrics)
        self._bad_in_row = self._bad_in_row + 1 if record.is_bad else 0
        self.skipped_steps += record.is_bad
        metrics["train/skipped_steps"] = float(self.skipped_steps)
        if self._fault is None:
            self._last_steps.append(record)
        if record.is_bad:
            self._log_skipped(record)
        else:
            self.health.note(step, metrics)
        if self._bad_in_row >= self.max_bad_steps:
            self._fault = self._fault or record

    def _log_skipped(self, record: StepRecord) -> None:
        if self.skipped_steps <= _NAMED:
            loss, norm = record.metrics["train/loss"], record.metrics["train/grad_norm"]
            log.warning("step %d is skipped: loss %g, gradient norm %g", record.step, loss, norm)
        if self.skipped_steps == _NAMED:
            log.warning("further skipped steps are only counted, in train/skipped_steps")

    def act(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        """Go back or end the run, if the steps noted so far call for it.

        Raises:
            RollBack: on all ranks, at the same step.
            DivergedError: likewise.
        """
        if self._fault is None:
            return
        end = self._fault.samples_seen + pl_module.skipped_samples
        said = f"{self.max_bad_steps} steps in a row, up to step {self._fault.step}, had no finite loss or gradient"
        if self.rollbacks >= self.max_rollbacks:
            raise DivergedError(self._last_words(trainer, pl_module, said))
        checkpoint, samples_seen = _from_first_rank(trainer, self.last_checkpoint) or (None, 0)
        back_to = checkpoint.name if checkpoint else "the start of the run, as there is no checkpoint"
        log.warning("%s: going back to %s, and leaving out the samples up to position %d", said, back_to, end)
        raise RollBack(checkpoint, end - samples_seen, self.rollbacks + 1)

    def _last_words(self, trainer: L.Trainer, pl_module: ClipModule, said: str) -> str:
        batch_size, skipped = pl_module.clock.batch_size, pl_module.skipped_samples
        first = self._fault.samples_seen - self.max_bad_steps * batch_size if self._fault else 0
        report = _from_first_rank(trainer, lambda: self.report(list(self._last_steps), skipped))
        again = f", after going back {self.rollbacks} time(s) already" if self.rollbacks else ""
        return (
            f"training has diverged after {first} samples: {said}{again}; {report or 'the log'} names the samples and"
            " the last losses; as a rule a lower optim.lr, a longer optim.warmup or a higher guard.max_rollbacks helps"
        )

    def state_dict(self) -> dict[str, int]:
        return {"skipped_steps": self.skipped_steps, "rollbacks": self.rollbacks}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]
        self.rollbacks = self.undone.count if self.undone else state_dict["rollbacks"]


def _from_first_rank(trainer: L.Trainer, ask: Callable[[], T | None]) -> T | None:
    """What the first rank answers, on every rank, which wait for it; None if it failed."""
    answer = None
    if trainer.is_global_zero:
        try:
            answer = ask()
        except Exception as error:  # the others must not wait for ever
            log.error("%s: %s", type(error).__name__, error)
    return gather_objects([answer] if trainer.is_global_zero else [])[0]
