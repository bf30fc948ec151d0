"""The pages of the documentation: their links, their index, and the settings in their commands."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from clip_train.commands.program import config_dir, quote_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in PAGES if page.parent == ROOT / "docs"}
    assert pages - set(re.findall(r"\((\w+\.md)\)", index)) == {"README.md"}


def commands(page: Path) -> list[list[str]]:
    """The settings of each `clip-train` in the page's code; placeholders such as NAME left out."""
    text = page.read_text().replace("\\\n", " ")
    code = re.findall(r"^(?: {4})?clip-train (.*)$", text, re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in code if "`" not in line and "--config-dir" not in line]
    return [[word for word in line if re.match(r"[\w.+/]+=(?!\.\.\.|NAME)", word)] for line in words]


def test_the_settings_in_commands_are_settings():
    """Their names and choices; values are checked where a run begins."""
    found = [(page.name, words) for page in PAGES for words in commands(page) if words]
    assert len(found) > 25
    with initialize_config_dir(config_dir(), version_base="1.3"):
        for name, words in found:
            words = [quote_text(word.replace("resume=", "resume.from=")) for word in words]
            parsed = OverridesParser.create().parse_overrides(words)
            settings = [word for word, override in zip(words, parsed) if not override.is_sweep_override()]
            try:
                compose("train", ["model_name=any", *settings], return_hydra_config=True)
            except Exception as error:
                pytest.fail(f"{name}: {' '.join(words)}: {error}")
