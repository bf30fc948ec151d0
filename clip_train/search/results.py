"""What was found, for people and programs: a table, JSON, a page and a sheet with pictures."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clip_train.data.files import utf8, write_atomic
from clip_train.errors import ConfigError, DataError
from clip_train.search.pictures import read_picture, thumbnail
from clip_train.search.search import Hit
from clip_train.search.sheet import draw_sheet

_THUMBNAIL = 200  # pixels
_PLACE = ("image_path", "shard", "offset", "size")


class Answer(NamedTuple):
    """A query and what was found.

    Attributes:
        query: the text, or the path of the picture.
        picture: that was asked for, encoded; None for a text.
    """

    query: str
    picture: bytes | None
    hits: list[Hit]


def print_table(answers: Sequence[Answer], console: Console) -> None:
    """A table for each query."""
    for answer in answers:
        query = escape(utf8(answer.query).decode())  # terminals take no halves of letters
        fields = list(extra_columns(answer.hits[0].row)) if answer.hits else []
        table = Table("", "score", "key", "caption", *fields, title=query, title_justify="left")
        for place, hit in enumerate(answer.hits, 1):
            texts = [hit.row.get(name) for name in ("key", "caption", *fields)]
            cells = ["" if text is None else escape(str(text)) for text in texts]
            table.add_row(str(place), f"{hit.score:.4f}", *cells)
        console.print(table if answer.hits else f"{query}: nothing found")


def check_output(output: str) -> None:
    """Raises ConfigError if no such file can be written."""
    if Path(output).suffix not in _WRITERS:
        raise ConfigError(f"output={output} is none of {', '.join(_WRITERS)}")


def write_results(output: str, answers: Sequence[Answer]) -> None:
    """A file in the format that its name says.

    Raises:
        DataError: it cannot be written.
        ConfigError: there is too much for a picture.
    """
    path = Path(output).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[path.suffix](path, answers)
    except OSError as error:
        raise DataError(f"output={path} cannot be written: {error.strerror or error}") from error


def extra_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row of metadata, what was asked for beside key, caption and place."""
    return {name: value for name, value in row.items() if name not in ("key", "caption", *_PLACE)}


def _write_json(path: Path, answers: Sequence[Answer]) -> None:
    found = [
        {"query": answer.query, "results": [{"score": hit.score, **hit.row} for hit in answer.hits]}
        for answer in answers
    ]
    write_atomic(path, utf8(json.dumps(found, indent=1, ensure_ascii=False, default=str)))


def _write_html(path: Path, answers: Sequence[Answer]) -> None:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("clip_train.search"), autoescape=True)
    environment.filters["picture"] = _data_url
    page = environment.get_template("results.html")
    write_atomic(path, utf8(page.render(answers=answers, read=read_picture, extra=extra_columns)))


def _write_png(path: Path, answers: Sequence[Answer]) -> None:
    write_atomic(path, draw_sheet(answers))


def _data_url(encoded: bytes | None) -> str | None:
    small = thumbnail(encoded, _THUMBNAIL)
    return None if small is None else f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"


_WRITERS: dict[str, Callable[[Path, Sequence[Answer]], None]] = {
    ".html": _write_html,
    ".json": _write_json,
    ".png": _write_png,
}
