"""A sheet of pictures: labelled rows and columns, at a size where one sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _TEXT = 144, 8, 15
_PAPER, _INK = "white", "#222222"


def draw_sheet(
    title: str, columns: Sequence[str], rows: Mapping[str, Sequence[Image.Image | None]]
) -> Image.Image:
    """Return the rows below the names of the columns.

    Args:
        title: stands above all.
        columns: their names; ``\\n`` begins a line.
        rows: name -> a picture or None per column; ``\\n`` in a name begins a line.
    """
    font = ImageFont.load_default(_TEXT)
    beside = _GAP + max(math.ceil(_width(font, name)) for name in rows) + _GAP
    widths = [max(_CELL, math.ceil(_width(font, name))) + _GAP for name in columns]
    above = 2 * _GAP + (2 + max(name.count("\n") + 1 for name in columns)) * (_TEXT + 4)
    high = _CELL + _GAP
    wide = max(beside + sum(widths), 2 * _GAP + math.ceil(_width(font, title)))
    paper = Image.new("RGB", (wide, above + len(rows) * high), _PAPER)
    pen = ImageDraw.Draw(paper)
    pen.text((_GAP, _GAP), title, fill=_INK, font=font)
    lefts = [beside + sum(widths[:index]) for index in range(len(widths))]
    for left, name in zip(lefts, columns, strict=True):
        pen.text((left, above - _GAP), name, fill=_INK, font=font, anchor="ld")
    for index, (name, pictures) in enumerate(rows.items()):
        top = above + index * high
        pen.text((_GAP, top + _CELL // 2), name, fill=_INK, font=font, anchor="lm")
        for left, picture in zip(lefts, pictures, strict=True):
            if picture is not None:
                large = picture.resize((_CELL, _CELL), Image.Resampling.BICUBIC)
                paper.paste(large, (left, top))
    return paper


def _width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> float:
    return max(font.getlength(line) for line in text.split("\n"))
