"""The drawing of a sheet: labels around pictures, and named blanks where there is none."""

from __future__ import annotations

from PIL import Image, ImageDraw

from klora_compile.sampling.labels import font_for, wrapped
from klora_compile.sampling.sheet import Row, contact_sheet
from klora_compile.sweeping.result import Sweep, SweptCell
from klora_runtime.errors import shown

#: Pixels to which small pictures are enlarged, by a whole factor.
_LEAST = 144

_TEXT = 12
_BLANK, _INK = "#eeeeee", "#555555"


def drawn(sweep: Sweep, number: int) -> Image.Image:
    """Return a sheet; see :meth:`Sweep.sheet`.

    Args:
        sweep: the sweep.
        number: which sheet, from 0.
    """
    cells = [cell for cell in sweep.cells if cell.sheet == number]
    size = _size(sweep)
    rows = [
        Row(label, [_image(cell, size) for cell in cells if cell.row == row])
        for row, label in enumerate(sweep.grid.rows)
    ]
    title = "\n".join(filter(None, [sweep.title, sweep.grid.sheets[number]]))
    return contact_sheet(rows, sweep.grid.columns, title)


def _size(sweep: Sweep) -> tuple[int, int]:
    """Return width and height of all cells."""
    pictures = [cell.picture for cell in sweep.cells if cell.picture is not None]
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    times = max(1, -(-_LEAST // min(width, height)))
    return width * times, height * times


def _image(cell: SweptCell, size: tuple[int, int]) -> Image.Image:
    if cell.picture is None or cell.repeats:
        return _blank(_reason(cell), size)
    times = min(size[0] // cell.picture.width, size[1] // cell.picture.height)
    width, height = cell.picture.width * times, cell.picture.height * times
    return cell.picture.resize((width, height), Image.Resampling.NEAREST)


def _reason(cell: SweptCell) -> str:
    if cell.picture is None:
        return f"failed: {shown(cell.error, limit=120)}"
    rule = cell.settings.get("rule", "this rule")
    names = ", ".join(name.replace("_", " ") for name in cell.idle)
    return f"as at the left: {rule} has no {names}"


def _blank(text: str, size: tuple[int, int]) -> Image.Image:
    """Return a grey picture with a text in its middle."""
    image = Image.new("RGB", size, _BLANK)
    font = font_for(text, _TEXT)
    width, height = size
    lines = wrapped(text, font, width - _TEXT).splitlines()
    most = max(1, height // (_TEXT + _TEXT // 3) - 1)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1][:-1]}…"]
    place = (width / 2, height / 2)
    ImageDraw.Draw(image).multiline_text(
        place, "\n".join(lines), fill=_INK, font=font, anchor="mm", align="center"
    )
    return image
