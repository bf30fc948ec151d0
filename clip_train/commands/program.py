"""What every command shares: Hydra, the one-line errors, the exit codes.

This module and the commands import neither torch nor Lightning at the top, so that `--help` and `--cfg` answer at once.
"""

import difflib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clip_train.errors import ClipTrainError, DivergedError, FaultError, OutOfMemoryError, first_line

EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_RESUMABLE = 0, 1, 2, 70, 75
_LESS_MEMORY = "take a smaller batch_size or model, or a device or machine with more memory"
_EXIT_OF = {FaultError: EXIT_FAULT, DivergedError: EXIT_DIVERGED}


def config_dir() -> str:
    """The configs: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return str(inside if inside.is_dir() else package.parent / "configs")


def run_program(
    name: str, config_name: str, task: Callable[[DictConfig], int], short: Mapping[str, str] | None = None
) -> NoReturn:
    """Compose the config from the command line, run `task` on it (once per job of a sweep), exit with its code.

    Args:
        short: keys that may be given for others, as `data` for `data.path`: to Hydra, a group's name is a choice of it.
    """
    # torchao, which transformers imports where it is installed, uses something that torch 2.15 warns of.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    codes: list[int] = []

    def job(cfg: DictConfig) -> None:
        try:
            codes.append(task(cfg))
        except ClipTrainError as error:
            code = _EXIT_OF.get(type(error), EXIT_USER_ERROR)
            _fail(name, str(error), code, alone=isinstance(error, OutOfMemoryError))
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            _fail(name, f"out of memory: {_LESS_MEMORY} ({first_line(error)})", alone=True)

    sys.argv[1:] = [quote_text(_spell_out(argument, short or {})) for argument in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise instead of printing and exiting with 1
    try:
        hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(name, _explain(error, config_name))
    except ValueError as error:
        if (choice := _wrong_choice()) is None:
            raise
        _fail(name, f"{choice}: the config of a group is chosen by its name ({first_line(error)})")
    except ClipTrainError as error:  # a sweep's, before its first job
        _fail(name, str(error))
    _exit(max(codes, default=EXIT_DONE))


def _is_out_of_memory(error: Exception) -> bool:
    from clip_train.out_of_memory import is_out_of_memory

    return is_out_of_memory(error)


def _spell_out(argument: str, short: Mapping[str, str]) -> str:
    key, equals, value = argument.partition("=")
    return f"{short[key]}={value}" if equals and key in short else argument


def quote_text(argument: str) -> str:
    """Quote a value that Hydra's grammar rejects, such as the braces in `shards/{00000..00099}.tar`.

    A value that begins as a list, a dictionary or a quoted text is left to Hydra, so that its slips are still found.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.startswith("-") or value.startswith(("[", "{", "'", '"')):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        escaped = value.replace("'", r"\'")
        return f"{key}='{escaped}'"
    return argument


def _wrong_choice() -> str | None:
    """The argument that gives a group something else than a name, of which Hydra only says that there is one."""
    for argument in sys.argv[1:]:
        if "=" in argument and not argument.startswith("-"):
            override = OverridesParser.create().parse_override(argument)
            is_group = (Path(config_dir()) / override.key_or_group).is_dir()
            if is_group and not override.is_sweep_override() and not isinstance(override.value(), str | list):
                return argument
    return None


def _fail(name: str, message: str, code: int = EXIT_USER_ERROR, alone: bool = False) -> NoReturn:
    """Print the message once per node, or here if only this process may know of it, and exit."""
    if alone or int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0:
        print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    _exit(code, wait=not alone)


def _exit(code: int, wait: bool = True) -> NoReturn:
    if "lightning" in sys.modules:
        from clip_train.distributed import group_size
        from clip_train.training.launch import started_by_lightning

        if code and wait and started_by_lightning():
            _wait_for_parent()
        if code and group_size() > 1:
            sys.stdout.flush()
            os._exit(code)  # at once: leaving the process group in good order would wait for the other ranks
    sys.exit(code)


def _wait_for_parent(seconds: float = 30) -> None:
    """Let the first process leave first: Lightning kills it when a child ends with an error, and its code is lost."""
    parent, end = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.05)


def _explain(error: Exception, config_name: str) -> str:
    """Hydra's error in one line, with near misses for a name that does not exist."""
    text = str(error)
    if isinstance(error, MissingConfigException) and (match := re.search(r"Could not find '([^']+)'", text)):
        group, _, choice = match[1].rpartition("/")
        options = re.findall(r"^\t(.+)$", text, re.MULTILINE)
        return f"{group}={choice}: no such config; {_near(choice, options)}"
    if match := re.search(r"Could not override '([^'@]+)", text):
        key = max(match[1], str(getattr(error.__cause__, "full_key", "")), key=len)  # inside a dictionary: its entry
        return f"{key}: no such key; {_near(key, _known_keys(config_name))} (a new key is written +{key}=...)"
    return " ".join(text.split())


def _near(name: str, known: list[str]) -> str:
    last_part = {key.rpartition(".")[2]: key for key in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    close += [
        last_part[key] for key in difflib.get_close_matches(name.rpartition(".")[2], list(last_part), n=3, cutoff=0.8)
    ]
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(close))}?"
    return f"there are {', '.join(sorted(known))}" if len(known) <= 20 else "--cfg job prints all keys"


def _known_keys(config_name: str) -> list[str]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose(config_name, return_hydra_config=True)
    groups = [group for group in config.hydra.runtime.choices if not group.startswith("hydra/")]
    del config.hydra
    return groups + list(_leaves(OmegaConf.to_container(config, resolve=False), ""))


def _leaves(value: object, path: str):
    if isinstance(value, dict):
        for key, entry in value.items():
            yield f"{path}{key}"
            yield from _leaves(entry, f"{path}{key}.")
