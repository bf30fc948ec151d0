"""Programs with commands of their own, such as `clip-shards make`, each with its config `PREFIX_COMMAND.yaml`."""

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from clip_train.commands.program import EXIT_DONE, EXIT_USER_ERROR, run_program
from clip_train.errors import ConfigError

EXIT_INTERRUPTED = 130
Task = Callable[[DictConfig], int]


def run_commands(name: str, prefix: str, usage: str, commands: Mapping[str, Task]) -> NoReturn:
    """Run the command that the command line names, or print the usage; exit with its code."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("--help", "-h"):
        print(usage, end="")
        sys.exit(EXIT_DONE)
    if command == "-sc":
        command = _command_to_complete(commands)
        sys.argv.insert(1, command)
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
        print(f"{name}: error: {command}: no such command; {hint}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    del sys.argv[1]
    run_program(f"{name} {command}", f"{prefix}_{command}", _in_one_line(name, commands[command]))


def _command_to_complete(commands: Mapping[str, Task]) -> str:
    """Hydra's completion asks with the whole line (`clip-shards make out`) and knows nothing of commands."""
    line = os.environ.get("COMP_LINE")
    if line is None:
        return next(iter(commands))  # it is being installed, which is the same for all
    words = line.split()
    if len(words) < 2 or words[1] not in commands:
        print(" ".join(commands))
        sys.exit(EXIT_DONE)
    os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    return words[1]


def _in_one_line(name: str, task: Task) -> Task:
    """What may go wrong inside, as errors that `run_program` prints, or as an exit code."""

    def run(cfg: DictConfig) -> int:
        try:
            return task(cfg)
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key} has no value: give {error.full_key}=...") from error
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED

    return run
