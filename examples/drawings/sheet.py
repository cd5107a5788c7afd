"""A contact sheet like a multiplication table: subjects down, styles across, fusions inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Pictures = Sequence[Image.Image]

_CELL, _GAP, _RULE, _TEXT = 96, 4, 14, 15
_PAPER, _INK, _PALE = "white", "#222222", "#bbbbbb"


@dataclass(frozen=True)
class Table:
    """The contents of the sheet; all cells hold the same number of pictures."""

    styles: Mapping[str, Pictures]
    """Style -> its LoRA alone, the sheet's first row."""
    subjects: Mapping[str, Pictures]
    """Subject -> its LoRA alone, the sheet's first column."""
    fused: Mapping[tuple[str, str], Pictures]
    """Subject and style -> both LoRAs, fused."""


def draw_sheet(table: Table, title: str) -> Image.Image:
    """Return the table as one picture."""
    count = len(next(iter(table.fused.values())))
    font = ImageFont.load_default(_TEXT)
    labels = [
        *map(_alone, (*table.styles, *table.subjects)),
        *(_both(*pair) for pair in table.fused),
    ]
    longest = math.ceil(max(map(font.getlength, labels)))
    width, height = max(count * (_CELL + _GAP) - _GAP, longest), _CELL + _TEXT + 2 * _GAP
    columns = _places(_RULE, width, 1 + len(table.styles))
    rows = _places(2 * _TEXT + _RULE, height, 1 + len(table.subjects))
    paper = Image.new("RGB", (columns[-1], rows[-1]), _PAPER)
    pen = ImageDraw.Draw(paper)
    pen.text((_RULE, _RULE), title, fill=_INK, font=font)

    def cell(row: int, column: int, label: str, pictures: Pictures) -> None:
        left, top = columns[column], rows[row]
        pen.text((left, top), label, fill=_INK, font=font)
        for index, picture in enumerate(pictures):
            large = picture.resize((_CELL, _CELL), Image.Resampling.BICUBIC)
            paper.paste(large, (left + index * (_CELL + _GAP), top + _TEXT + 2 * _GAP))

    for column, (style, pictures) in enumerate(table.styles.items(), 1):
        cell(0, column, _alone(style), pictures)
    for row, (subject, pictures) in enumerate(table.subjects.items(), 1):
        cell(row, 0, _alone(subject), pictures)
        for column, style in enumerate(table.styles, 1):
            cell(row, column, _both(subject, style), table.fused[subject, style])
    beside, below = columns[1] - _RULE // 2, rows[1] - _RULE // 2
    pen.line([(beside, rows[0]), (beside, rows[-1])], fill=_PALE, width=2)
    pen.line([(columns[0], below), (columns[-1] - _RULE, below)], fill=_PALE, width=2)
    return paper


def _alone(name: str) -> str:
    return f"{name}: LoRA alone"


def _both(subject: str, style: str) -> str:
    return f"{subject} + {style}, fused"


def _places(start: int, size: int, count: int) -> list[int]:
    """Return the starts of ``count`` cells, and the end of the last one."""
    return [start + index * (size + _RULE) for index in range(count + 1)]
