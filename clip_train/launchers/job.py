"""One job of a sweep: its command line, its process, and what came of it."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from clip_train.training.signals import stop_requested

_CONFIG_FLAG = re.compile(r"(--config-(dir|name|path)|-c[dnp])(=.*)?")


@dataclass(frozen=True)
class Job:
    """A run of `clip-train`.

    Attributes:
        number: in its sweep.
        arguments: of `clip-train`.
        folder: the run's.
        cfg: composed, with Hydra's own part.
    """

    number: int
    arguments: list[str]
    folder: Path
    cfg: DictConfig


def prepare_job(context: HydraContext, sweep_cfg: DictConfig, overrides: Sequence[str], number: int) -> Job:
    """Compose a job's config; its run is called after the sweep, or after `run_name` if given, and its number."""
    setup_globals()
    cfg = context.config_loader.load_sweep_config(sweep_cfg, list(overrides))
    sweep = str(sweep_cfg.hydra.sweep.dir).rpartition("/")[2]
    run_name = f"{cfg.run_name or sweep}_{number}"
    arguments = [*_config_flags(sys.argv), *cfg.hydra.overrides.task, f"run_name={run_name}"]
    return Job(number, arguments, Path(str(cfg.output_dir)) / run_name, cfg)


def _config_flags(arguments: list[str]) -> list[str]:
    """Where Hydra was told to find the config."""
    flags: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if match := _CONFIG_FLAG.fullmatch(argument):
            flags += [argument] if match[3] else [argument, following]
    return flags


def run_job(arguments: Sequence[str], env: Mapping[str, str] | None = None, output: IO | None = None) -> int:
    """Run `clip-train` in a process of its own: nothing of one job is left when the next begins.

    A signal to this process is handed on.

    Returns:
        The exit code, 128 + N for one that died of signal N.
    """
    command = [sys.executable, "-m", "clip_train.commands.train", *arguments]
    process = subprocess.Popen(command, env=env, stdout=output, stderr=output and subprocess.STDOUT)
    told = False
    while True:
        try:
            code = process.wait(0.2)
        except subprocess.TimeoutExpired:
            if stop_requested() and not told:
                process.terminate()
                told = True
        else:
            return code if code >= 0 else 128 - code


def job_return(job: Job, code: int, log: Path | None = None) -> JobReturn:
    """What Hydra's sweepers want to know: the run's summary as the return value, or SystemExit(`code`) as the error."""
    overrides = OmegaConf.to_container(job.cfg.hydra.overrides.task)
    answer = JobReturn(overrides=overrides, hydra_cfg=OmegaConf.create({"hydra": job.cfg.hydra}))  # pyright: ignore[reportArgumentType]
    answer.cfg = OmegaConf.masked_copy(job.cfg, [str(key) for key in job.cfg if key != "hydra"])
    answer.status = JobStatus.FAILED if code else JobStatus.COMPLETED
    summary = job.folder / "summary.json"
    answer.return_value = SystemExit(code) if code else json.loads(summary.read_text()) if summary.exists() else None
    if code:
        where = f", see {log}" if log else ""
        print(f"clip-train: job {job.number} ended with {code}{where}: {' '.join(job.arguments)}", file=sys.stderr)
    return answer
