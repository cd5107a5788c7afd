"""A sheet of fusions beside the true drawings: what a reader sees of the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drawings.base.subjects import STYLES
from drawings.material import drawing
from drawings.table.pictures import first, folder_of
from drawings.table.rows import REFERENCE

_CELL, _GAP, _TEXT = 96, 6, 14
_PAPER, _INK = "white", "#222222"
_SUBJECT, _STYLE = (f"ceiling: {kind} LoRA alone, its own prompt" for kind in ("subject", "style"))


def draw_sheet(packages: Path, pictures: Path, best: str, count: int = 10) -> Image.Image:
    """Return a row of pictures per fusion: each LoRA alone, rules, and the true drawing.

    Args:
        packages: of the icons.
        pictures: of one run, ``OUT/pictures/REGIME-PART``.
        best: row to show beside the sum and K-LoRA.
        count: of fusions; the styles take turns.
    """
    shown = {"sum 1 : 1": REFERENCE, "K-LoRA s": "K-LoRA s", best: best}
    shared = sorted(path.stem for path in folder_of(pictures, REFERENCE).glob("*.png"))
    pairs = [tuple(stem.rsplit("-", 1)) for stem in shared]
    styles = sorted({style for _, style in pairs})
    subjects = sorted({subject for subject, _ in pairs})
    chosen = [(each, styles[turn % len(styles)]) for turn, each in enumerate(subjects)][:count]
    heads = ["subject alone", "style alone", *shown, "true drawing"]
    size = len(heads) * (_CELL + _GAP) + _GAP, len(chosen) * (_CELL + _GAP + _TEXT) + 3 * _TEXT
    paper = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(11)
    for column, head in enumerate(heads):
        pen.text((_GAP + column * (_CELL + _GAP), _GAP), head, fill=_INK, font=font)
    for row, (subject, style) in enumerate(chosen):
        top = 2 * _TEXT + row * (_CELL + _GAP + _TEXT)
        pen.text((_GAP, top), f"{subject}, {style}", fill=_INK, font=font)
        cells = [
            _any(folder_of(pictures, _SUBJECT), f"{subject}-*.png"),
            _any(folder_of(pictures, _STYLE), f"*-{style}.png"),
            *(_any(folder_of(pictures, name), f"{subject}-{style}.png") for name in shown.values()),
            _true(packages, subject, style),
        ]
        for column, picture in enumerate(cells):
            if picture is not None:
                large = picture.resize((_CELL, _CELL), Image.Resampling.BICUBIC)
                paper.paste(large, (_GAP + column * (_CELL + _GAP), top + _TEXT))
    return paper


def _any(folder: Path, pattern: str) -> Image.Image | None:
    """Return the first picture of a name, None where a row has none."""
    paths = sorted(folder.glob(pattern))
    return first(paths[0]) if paths else None


def _true(packages: Path, subject: str, style: str) -> Image.Image | None:
    true = drawing(packages, STYLES[style], subject)
    if true is None:
        return None
    values = ((true + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(values))
