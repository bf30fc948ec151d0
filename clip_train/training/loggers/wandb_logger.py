"""Weights & Biases: one W&B run per run folder, each step in it once, however often the run is killed and resumed."""

import logging
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from wandb.errors import CommError, UsageError

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError
from clip_train.training.loggers.csv_logger import read_metrics
from clip_train.training.loggers.run_logger import RunLogger
from clip_train.training.loggers.wandb_files import last_step, waits_for_sync, wandb_files
from clip_train.training.run_folder import WANDB_RUN_ID, RunFolder, environment
from clip_train.training.signals import stop_requested

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0  # wandb's own 15 are lost by a SIGKILL
# How long uploads may keep a run from ending that a scheduler, or a user, is about to kill.
_FINISH_SECONDS_STOPPED, _FINISH_SECONDS_FAILED = 20.0, 5.0


class WandbLogger(RunLogger):
    """Logs to W&B, or to `wandb/` of the run folder, for `wandb sync`, where nobody is logged in. Never asks.

    W&B cannot take a step back. So steps that it has are not sent again when a resumed run takes them again, and steps
    that it lacks, as a kill took them with it, are sent from metrics.csv. Trouble with W&B does not end the run.

    Args:
        save_dir: the run folder; the run's id is kept in `wandb_run_id` there.
        project: and `entity`, `name`, `group`, `tags`, as W&B knows them.
        log_checkpoints: which checkpoints become artifacts: `False`, `True`, or `best`.
        upload_checkpoints: their files; else only where they are.
        finish_timeout: seconds to wait for uploads when the run ends, at most 20 of them after a signal and 5 after an
            error; `wandb sync` sends the rest.

    Raises:
        ConfigError: `log_checkpoints` is something else.
    """

    def __init__(
        self,
        save_dir: str,
        *,
        project: str,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        log_checkpoints: bool | Literal["best"] = False,
        upload_checkpoints: bool = True,
        finish_timeout: float = 300,
    ) -> None:
        super().__init__(save_dir)
        if log_checkpoints not in (False, True, "best"):
            raise ConfigError(f"logger.wandb.log_checkpoints={log_checkpoints} is none of false, true, best")
        self._init = {"project": project, "entity": entity, "name": name, "group": group, "tags": list(tags)}
        self.log_checkpoints, self.upload_checkpoints = log_checkpoints, upload_checkpoints
        self.finish_timeout = finish_timeout
        self._config: dict[str, Any] = {}
        self._run: wandb.Run | None = None
        self._next_step = 0
        self._artifacts: set[Path] = set()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args, **kwargs) -> None:
        self._config = params

    @rank_zero_only
    def resume_after(self, step: int, samples_seen: int) -> None:
        run_id = _keep_run_id(self.folder)
        earlier = wandb_files(self.folder, run_id)
        self._run = run = self._start(run_id, earlier)
        run.define_metric("samples_seen")
        run.define_metric("*", step_metric="samples_seen")  # steps are W&B's own axis
        run.config.update({**self._config, "environment": environment()}, allow_val_change=True)
        last = last_step(earlier) if run.offline else run.starting_step - 1
        self._next_step = last + 1
        if last > step:
            log.info("W&B has steps %d to %d already: they are not sent again", step + 1, last)
        self._catch_up(step)

    def _start(self, run_id: str, earlier: list[Path]) -> "wandb.Run":
        mode = None if "WANDB_MODE" in os.environ or _logged_in() else "offline"
        if mode is None and "WANDB_MODE" not in os.environ and any(map(waits_for_sync, earlier)):
            mode = "offline"  # W&B could not put the earlier steps before those of now
            log.warning("W&B: offline, as earlier parts are: `wandb sync %s` sends all", self.folder / "wandb")
        settings = wandb.Settings(x_transaction_log_flush_interval=_FLUSH_SECONDS, finish_timeout=self.finish_timeout)
        init = {**self._init, "id": run_id, "resume": "allow", "dir": str(self.folder), "settings": settings}
        try:
            return wandb.init(**init, mode=mode)
        except CommError as error:
            log.error("W&B cannot be reached (%s): offline, to be sent with `wandb sync`", error)
            wandb.teardown()  # else the id is in use
            return wandb.init(**init, mode="offline")

    def _catch_up(self, step: int) -> None:
        """Send the rows up to `step` that W&B lacks."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return
        for row in read_metrics(path)[1]:
            if self._next_step <= int(row["step"]) <= step:
                numbers = {name: float(value) for name, value in row.items() if value and name != "step"}
                self.log_metrics({**numbers, "samples_seen": int(row["samples_seen"])}, int(row["step"]))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._run is None or step is None or step < self._next_step:
            return
        try:
            self._run.log(metrics, step=step)
        except Exception as error:  # whatever it is, training does not need W&B
            self._give_up(error)
        self._next_step = step  # more of the same step may follow

    @rank_zero_only
    def checkpoint_saved(self, path: Path, best: bool) -> None:
        wanted = self.log_checkpoints is True or (self.log_checkpoints == "best" and best)
        if self._run is None or not wanted or path in self._artifacts:
            return
        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"path": str(path.resolve())})
        try:
            if self.upload_checkpoints:
                artifact.add_dir(str(path), skip_cache=True)  # copies it: the run may remove it before it is uploaded
            else:
                artifact.add_reference(path.resolve().as_uri(), checksum=False)
            self._run.log_artifact(artifact, aliases=["latest", path.stem, *(["best"] if best else [])])
        except Exception as error:
            self._give_up(error)
        self._artifacts.add(path)

    def _give_up(self, error: Exception) -> None:
        log.error("W&B FAILED (%s: %s): nothing more is sent; metrics.csv goes on", type(error).__name__, error)
        self._run = None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is None:
            return
        failed = status != "success"
        seconds = _FINISH_SECONDS_FAILED if failed else _FINISH_SECONDS_STOPPED if stop_requested() else None
        finishing = threading.Thread(target=self._finish, args=(self._run, int(failed)), daemon=True)
        finishing.start()
        finishing.join(seconds)  # W&B was told its time-out when the run began, and hears of no other
        if finishing.is_alive():
            log.warning("W&B: not all is sent: `wandb sync %s` sends the rest", self.folder / "wandb")
            _kill_service()
            finishing.join(_FINISH_SECONDS_FAILED)
        self._run = None

    def _finish(self, run: "wandb.Run", exit_code: int) -> None:
        try:
            run.finish(exit_code=exit_code)
            wandb.teardown()  # waits for the file: the process may end by os._exit
        except Exception as error:
            self._give_up(error)


def _keep_run_id(folder: Path) -> str:
    """The id, made when the run first asks for it; an agent of a W&B sweep gives it."""
    run_id = RunFolder(folder).wandb_run_id
    if run_id is None:
        run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(6)
        write_atomic(folder / WANDB_RUN_ID, f"{run_id}\n".encode())
    return run_id


def _kill_service() -> None:
    """End the process of W&B's that uploads, as Python would wait for it at exit. Its file lacks a second at most."""
    service = wandb.setup()._connection
    if service and service._proc:
        service._proc._process.kill()


def _logged_in() -> bool:
    try:
        return wandb.login(prompt=False, verify=False)
    except (CommError, UsageError, ValueError) as error:
        log.error("W&B: %s: offline", error)
        return False
