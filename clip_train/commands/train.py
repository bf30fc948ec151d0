"""clip-train: train a model; without arguments, the built-in demo."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.errors import ConfigError
from clip_train.training.signals import ignore_signals, install_handlers

if TYPE_CHECKING:
    from omegaconf import DictConfig

_NAMES_THE_DATA = re.compile(r"\+*(data|data\.train|data\.train\.shards|experiment)=|--config-name|-cn")
_ONLY_SHOWS = re.compile(r"(--cfg|--info|--help|--hydra-help|-c|-i|-h)(=.*)?")  # of the defaults, not of the demo
_RUN_LENGTHS = ("max_samples", "max_steps", "max_epochs")


def main() -> None:
    """Entry point."""
    install_handlers()  # before anything that takes time: an early signal must not kill a job
    from clip_train.commands.program import run_program

    arguments = sys.argv[1:]
    if not any(_NAMES_THE_DATA.match(argument) or _ONLY_SHOWS.fullmatch(argument) for argument in arguments):
        overrides = [place for place, argument in enumerate(sys.argv) if place and _is_override(argument)]
        sys.argv.insert(min(overrides, default=len(sys.argv)), "experiment=demo")  # overrides must stand together
    run_program("clip-train", "train", _train, short={"resume": "resume.from"})


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _train(cfg: DictConfig) -> int:
    """One run. The jobs of a sweep come here too, each in a process that `launchers/` started."""
    from hydra.core.hydra_config import HydraConfig

    from clip_train.commands.program import EXIT_DONE, EXIT_RESUMABLE

    choose_run_length(cfg, list(HydraConfig.get().overrides.task))
    name_to_config(cfg, "distill.model")
    from clip_train.commands.console import log_to_terminal  # imports stay in here: see program.py
    from clip_train.training.run import train

    summary = train(cfg, log_to_terminal())
    if cfg.eval.report and summary["trained"]:
        _report(Path(str(cfg.output_dir)) / cfg.run_name)
    ignore_signals()
    return EXIT_RESUMABLE if summary["stopped_by_signal"] and not summary["complete"] else EXIT_DONE


def _report(folder: Path) -> None:
    """Write the page that shows the run, which is over: where that cannot be, the log says so."""
    import logging

    from clip_train.distributed import group_rank
    from clip_train.errors import DataError

    if group_rank() > 0:
        return
    from clip_train.report.run_report import write_report  # matplotlib takes a second

    log = logging.getLogger("clip_train.commands.train")  # under `python -m` this module has another name
    try:
        log.info("wrote %s", write_report(folder))
    except (DataError, OSError, ValueError, MemoryError) as error:
        log.error("NO REPORT: %s", error)


def choose_run_length(cfg: DictConfig, overrides: list[str]) -> None:
    """A length on the command line replaces the config's own.

    Raises:
        ConfigError: the command line gives two.
    """
    given = [key for key in _RUN_LENGTHS if any(override.startswith(f"{key}=") for override in overrides)]
    given = [key for key in given if cfg[key] is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both given: the length of a run is said once")
    for key in _RUN_LENGTHS:
        if given and key not in given:
            cfg[key] = None


def name_to_config(cfg: DictConfig, key: str) -> None:
    """Where a choice of the group `model` is named, put its config, so that the run's own has all of it."""
    from hydra import compose
    from omegaconf import OmegaConf

    name = OmegaConf.select(cfg, key)
    if isinstance(name, str):
        model = compose("train", [f"model={name}"]).model
        OmegaConf.update(cfg, key, OmegaConf.to_container(model, resolve=True), force_add=True)


if __name__ == "__main__":
    main()
