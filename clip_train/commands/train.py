"""clip-train: train a model; without arguments, the built-in demo."""

import re
import signal
import subprocess
import sys

from omegaconf import DictConfig

from clip_train.commands.program import EXIT_DONE, EXIT_RESUMABLE, run_program
from clip_train.errors import ConfigError

_NAMES_THE_DATA = re.compile(r"\+*(data|data\.train|data\.train\.shards|experiment)=|--config-name|-cn")
_CONFIG_FLAG = re.compile(r"(--config-(dir|name|path)|-c[dnp])(=.*)?")
_RUN_LENGTHS = ("max_samples", "max_steps", "max_epochs")


def main() -> None:
    """Entry point."""
    if not any(_NAMES_THE_DATA.match(argument) for argument in sys.argv[1:]):
        overrides = [place for place, argument in enumerate(sys.argv) if place and _is_override(argument)]
        sys.argv.insert(min(overrides, default=len(sys.argv)), "experiment=demo")  # overrides must stand together
    run_program("clip-train", "train", _train)


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _train(cfg: DictConfig) -> int:
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if hydra.mode and hydra.mode.name == "MULTIRUN":
        run_name = f"{cfg.run_name or hydra.sweep.dir.rpartition('/')[2]}_{hydra.job.num}"
        return _run_alone([*_config_flags(sys.argv), *hydra.overrides.task, f"run_name={run_name}"])
    _choose_run_length(cfg, list(hydra.overrides.task))
    console = _console()  # imports stay in here: see program.py
    from clip_train.training.run import train

    summary = train(cfg, console)
    return EXIT_RESUMABLE if summary["stopped_by_signal"] and not summary["complete"] else EXIT_DONE


def _config_flags(arguments: list[str]) -> list[str]:
    """Where Hydra was told to find the config."""
    flags: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if match := _CONFIG_FLAG.fullmatch(argument):
            flags += [argument] if match[3] else [argument, following]
    return flags


def _run_alone(arguments: list[str]) -> int:
    """One job of a sweep, in a process of its own: nothing of one job is left when the next begins.

    Raises:
        SystemExit: the job failed or was stopped, and so ends the sweep.
    """
    process = subprocess.Popen([sys.executable, "-m", "clip_train.commands.train", *arguments])
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: process.send_signal(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the job as well
    code = process.wait()
    for number, handler in old.items():
        signal.signal(number, handler)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return EXIT_DONE


def _choose_run_length(cfg: DictConfig, overrides: list[str]) -> None:
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


def _console():
    import logging

    from rich.console import Console
    from rich.logging import RichHandler

    console = Console()
    if console.is_terminal:  # print above the progress bar
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%X"))
    logger = logging.getLogger("clip_train")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return console


if __name__ == "__main__":
    main()
