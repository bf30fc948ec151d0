"""Records of benchmarks: Markdown files with a section per machine, or per part, each of which is measured alone.

What is measured again replaces what it was; everything else in the file stays, whatever program wrote it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from clip_train.data.files import write_atomic

Row = Mapping[str, str]
_MEASURED = "measured"  # the column that says when and how, always the last


def write_section(path: Path, head: str, title: str, body: str) -> None:
    """Put a section in the place of the one of that title, or behind the others.

    Args:
        path: of the record, which need not exist.
        head: of a new record.
        body: in which no line begins with `## `.
    """
    sections = _sections(path, head)
    sections[title] = body
    lead, *others = sections.items()
    text = "\n\n".join([lead[1].strip(), *(f"## {name}\n\n{content.strip()}" for name, content in others)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f"{text}\n".encode())


def add_rows(path: Path, head: str, title: str, about: str, rows: Sequence[Row], key: Sequence[str]) -> None:
    """Add rows to the table of a section, each in the place of one with the same key; what is below the table stays.

    Args:
        path, head, title: as of `write_section`.
        about: what goes above the table.
        rows: cells by column. A column that another row has not is empty there.
        key: columns that tell rows apart, and by which they are sorted.
    """
    old, below = _table(_sections(path, head).get(title, ""))
    found = {tuple(row.get(column, "") for column in key): row for row in (*old, *rows)}
    joined = [found[name] for name in sorted(found, key=lambda cells: [(_number(cell), cell) for cell in cells])]
    columns = dict.fromkeys(column for row in (*old, *rows) for column, cell in row.items() if cell)
    header = [*(column for column in columns if column != _MEASURED), *([_MEASURED] if _MEASURED in columns else [])]
    table = markdown_table(header, [[row.get(column, "") for column in header] for row in joined])
    write_section(path, head, title, f"{about.strip()}\n\n{table}\n{below.strip()}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows)) + "\n"


def section_title(machine: Mapping[str, str], device: str, precision: str) -> str:
    """What has to be the same for rows to stand in one table: `describe_machine`'s hardware and versions, precision."""
    where = machine["processor"] if device == "cpu" else machine["gpu"]
    return f"{where}, {precision}: torch {machine['torch']}, open_clip {machine['open-clip-torch']}"


def about(machine: Mapping[str, str]) -> str:
    """The list above a table whose rows say themselves when they were measured."""
    return "".join(f"- {key}: {value}\n" for key, value in machine.items() if key not in ("date", "commit"))


def measured(machine: Mapping[str, str], rounds: int) -> Row:
    """The cell that says so."""
    commit = f", commit {machine['commit']}" if "commit" in machine else ""
    return {_MEASURED: f"{machine['date']}, {rounds} round{'s' * (rounds > 1)}{commit}"}


def _sections(path: Path, head: str) -> dict[str, str]:
    """Bodies by title; what stands before the first title has none."""
    lead, *others = re.split(r"^## ", path.read_text() if path.exists() else head, flags=re.MULTILINE)
    return {"": lead} | {name: body for name, _, body in (part.partition("\n") for part in others)}


def _table(body: str) -> tuple[list[dict[str, str]], str]:
    """The rows of a section's first table, and what is below it."""
    lines = body.splitlines()
    above = list(takewhile(lambda line: not line.startswith("|"), lines))
    table = list(takewhile(lambda line: line.startswith("|"), lines[len(above) :]))
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table] or [[], []]
    return [dict(zip(header, row)) for row in rows], "\n".join(lines[len(above) + len(table) :])


def _number(cell: str) -> int:
    return int(cell) if cell.isdigit() else 0
