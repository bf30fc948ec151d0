"""A contact sheet: what was found as one picture, each result with its score, key and caption."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from clip_train.data.decoding import UnusableImage, decode_rgb
from clip_train.data.files import utf8
from clip_train.errors import ConfigError
from clip_train.search.pictures import read_picture

if TYPE_CHECKING:  # which imports this
    from clip_train.search.results import Answer
    from clip_train.search.search import Hit

_COLUMNS, _TILE, _GAP = 5, 200, 12  # pixels, as the others
_LINE, _LETTERS, _LINES, _TITLE = 16, 30, 3, 64
_SIZE, _TITLE_SIZE = 12, 16
_PAPER, _EMPTY, _INK, _FAINT = "white", "#f6f8fa", "#24292f", "#57606a"
_WIDTH = _GAP + _COLUMNS * (_TILE + _GAP)
_CELL = _TILE + (1 + _LINES) * _LINE + _GAP
_TALLEST = 30_000


def draw_sheet(answers: Sequence["Answer"]) -> bytes:
    """A PNG: for each query its text or picture, and a grid of what was found, best first.

    Raises:
        ConfigError: there is more than one picture should hold.
    """
    heights = [_TITLE + max(1, -(-len(answer.hits) // _COLUMNS)) * _CELL for answer in answers]
    if sum(heights) > _TALLEST:
        raise ConfigError(
            f"output: {sum(len(answer.hits) for answer in answers):,} results are too many for one picture: ask for"
            " fewer, or give a .html"
        )
    sheet, top = Image.new("RGB", (_WIDTH, sum(heights)), _PAPER), 0
    for answer, height in zip(answers, heights):
        _draw_query(sheet, answer, top)
        for place, hit in enumerate(answer.hits):
            row, column = divmod(place, _COLUMNS)
            sheet.paste(_cell(hit), (_GAP + column * (_TILE + _GAP), top + _TITLE + row * _CELL))
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _draw_query(sheet: Image.Image, answer: "Answer", top: int) -> None:
    left = _GAP
    if answer.picture is not None:
        side = _TITLE - 2 * _GAP
        sheet.paste(_contained(answer.picture, side), (left, top + _GAP))
        left += side + _GAP
    title = textwrap.shorten(_drawable(answer.query), 100, placeholder=" …")
    draw = ImageDraw.Draw(sheet)
    draw.text((left, top + _TITLE // 2), title, _INK, _font(_TITLE_SIZE), anchor="lm")
    if not answer.hits:
        draw.text((_GAP, top + _TITLE), "nothing found", _FAINT, _font(_SIZE))


def _cell(hit: "Hit") -> Image.Image:
    """A result's picture, and below it the score, the key and the first lines of the caption."""
    cell = Image.new("RGB", (_TILE, _CELL - _GAP), _PAPER)
    cell.paste(_contained(read_picture(hit.row), _TILE), (0, 0))
    key = _drawable(hit.row.get("key") or hit.row.get("image_path") or "")
    caption = _drawable(hit.row.get("caption") or "")
    lines = [f"{hit.score:.4f} · {key}", *textwrap.wrap(caption, _LETTERS, max_lines=_LINES, placeholder=" …")]
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):  # what is too long ends at the edge of the cell
        draw.text((0, _TILE + 2 + number * _LINE), line, _INK if number else _FAINT, _font(_SIZE))
    return cell


def _contained(encoded: bytes | None, side: int) -> Image.Image:
    """A square with the picture in its middle, or with nothing if there is none that can be read."""
    tile = Image.new("RGB", (side, side), _EMPTY)
    try:
        picture = decode_rgb(encoded or b"")
    except UnusableImage:
        return tile
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return tile


def _drawable(text: object) -> str:
    """On one line; without halves of letters, which fonts refuse."""
    return " ".join(utf8(str(text)).decode().split())


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's, as Pillow's own has Latin letters only."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
