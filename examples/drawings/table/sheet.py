"""A sheet of fusions beside the true drawings: what a reader sees of the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from drawings.base.subjects import STYLES
from drawings.material import drawing, picture
from drawings.sheet import draw_sheet
from drawings.table.pictures import first, folder_of
from drawings.table.rows import REFERENCE

_SUBJECT, _STYLE = (f"ceiling: {kind} LoRA alone, its own prompt" for kind in ("subject", "style"))


def table_sheet(
    packages: Path, pictures: Sequence[Path], best: str, count: int = 10
) -> Image.Image:
    """Return a row of pictures per fusion: each LoRA alone, rules, and the true drawing.

    Args:
        packages: of the icons.
        pictures: of runs on the same subjects, ``OUT/pictures/REGIME-PART``; the first one has
            the sum.
        best: row to show beside the sum and K-LoRA.
        count: of fusions; the styles take turns.
    """
    shown = {"plain sum": REFERENCE, "K-LoRA s": "K-LoRA s", best: best}
    shared = sorted(path.stem for path in folder_of(pictures[0], REFERENCE).glob("*.png"))
    pairs = [tuple(stem.rsplit("-", 1)) for stem in shared]
    styles = sorted({style for _, style in pairs})
    subjects = sorted({subject for subject, _ in pairs})
    chosen = [(each, styles[turn % len(styles)]) for turn, each in enumerate(subjects)][:count]
    rows = {
        f"{subject}\n+ {style}": [
            _any(pictures, _SUBJECT, f"{subject}-*.png"),
            _any(pictures, _STYLE, f"*-{style}.png"),
            *(_any(pictures, name, f"{subject}-{style}.png") for name in shown.values()),
            _true(packages, subject, style),
        ]
        for subject, style in chosen
    }
    columns = ["subject LoRA\nalone", "style LoRA\nalone", *shown, "true drawing"]
    return draw_sheet("Each LoRA alone, both fused, and the true drawing", columns, rows)


def _any(pictures: Sequence[Path], row: str, pattern: str) -> Image.Image | None:
    """Return the first picture of a name, None where a row has none."""
    for folder in pictures:
        for path in sorted(folder_of(folder, row).glob(pattern)):
            return first(path)
    return None


def _true(packages: Path, subject: str, style: str) -> Image.Image | None:
    true = drawing(packages, STYLES[style], subject)
    return None if true is None else picture(true)
