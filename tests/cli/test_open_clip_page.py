"""The tables of docs/open_clip.md: flags that open_clip has, and settings that clip-train takes."""

import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch.plugins.environments import LightningEnvironment

from clip_train.commands.program import config_dir, quote_text
from clip_train.training import config_check
from clip_train.training.launch import World


def rows() -> list[tuple[str, str]]:
    """What stands in the first two columns of each row."""
    page = (Path(__file__).parents[2] / "docs" / "open_clip.md").read_text()
    found = [re.split(r"(?<!\\)\|", line)[1:3] for line in page.splitlines() if line.startswith("| `")]
    return [(flags.strip(), settings.strip()) for flags, settings in found]


def settings_of(cell: str) -> list[str]:
    return [word for code in re.findall(r"`([^`]+)`", cell) for word in shlex.split(code)]


@cache
def open_clip_flags() -> set[str]:
    """As its parser spells them out; read, as the parser is made and used in one function."""
    package = find_spec("open_clip_train")
    assert package is not None and package.submodule_search_locations is not None
    source = (Path(package.submodule_search_locations[0]) / "params.py").read_text()
    return set(re.findall(r"""["'](--[a-z0-9-]+)["']""", source))


def test_the_flags_are_open_clips():
    named = {flag for cell, _ in rows() for flag in re.findall(r"--[a-z0-9-]+", cell)}
    assert len(named) > 50
    assert named <= open_clip_flags()


@pytest.mark.parametrize(("flags", "cell"), [row for row in rows() if row[1]])
def test_the_settings_can_be_used(flags, cell, monkeypatch):
    monkeypatch.setattr(config_check, "check_compiler", lambda *_: None)  # whether there is one is the machine's
    settings = [word.replace("resume=", "resume.from=") for word in settings_of(cell)]  # as commands/train.py has it
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", ["model_name=any", "data.train.shards=any", *map(quote_text, settings)])
    config_check.check_config(cfg, World("cpu", devices=8, num_nodes=1, rank=0, environment=LightningEnvironment()))
