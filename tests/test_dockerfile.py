"""What of the Dockerfile can be wrong without building it; scripts/container_test.sh builds and runs it."""

import re
import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def copied() -> list[str]:
    """What the Dockerfile takes from the tree."""
    words = [shlex.split(line)[1:] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    return [source for line in words if not line[0].startswith("--from") for source in line[:-1]]


def default(argument: str) -> str:
    return re.search(rf'^ARG {argument}="?([^"\n]+)', DOCKERFILE, re.MULTILINE)[1]  # pyright: ignore[reportOptionalSubscript]


def test_the_context_is_what_is_copied_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"  # runs, data and .venv stay out
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == set(copied())
    assert all((ROOT / path).exists() for path in allowed)


def test_all_that_the_wheel_is_made_of_is_copied():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], *wheel["packages"]]
    needed += wheel["force-include"]
    assert {path.split("/")[0] for path in needed} <= set(copied())


def test_what_it_names_is_in_the_project():
    assert set(default("EXTRAS").split()) <= PROJECT["project"]["optional-dependencies"].keys()
    locked = {package["name"] for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    left_out = re.findall(r"--no-emit-package (\S+)", DOCKERFILE)
    assert left_out
    assert set(left_out) <= locked
    command = re.search(r'ENTRYPOINT \[.*"([^"]+)"\]', DOCKERFILE)
    assert command
    assert command[1] in PROJECT["project"]["scripts"]


def test_dependencies_come_from_the_lock_file_with_hashes_and_without_those_for_development():
    export, sync = (re.search(rf"uv {command} .*", DOCKERFILE) for command in ("export", "pip sync"))
    assert export
    assert {"--locked", "--no-dev"} <= set(export[0].split())
    assert sync
    assert "--require-hashes" in sync[0].split()
