"""The plane of the table: similarity of the subject against similarity of the style."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from drawings.table.intervals import interval
from drawings.table.kept import Results
from drawings.table.rows import CEILINGS, REFERENCE, ROWS

_INK, _REFERENCE_INK = "#222222", "#d62728"


def plot_plane(results: Results, path: Path) -> None:
    """Plot a numbered point per row, the names beside the plane, and the reference in red.

    Ceilings are left out: they are so far away that all rules would be one point.
    """
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    panel = figure.subplots()
    ceilings = {row.name for row in CEILINGS}
    names = [row.name for row in ROWS if row.name in results and row.name not in ceilings]
    for number, name in enumerate(names, 1):
        cells = results[name]
        place = interval(cells, "style").mean, interval(cells, "subject").mean
        colour = _REFERENCE_INK if name == REFERENCE else _INK
        label = f"{number}  {name}"
        panel.plot(*place, "o", color=colour, markersize=4, label=label)
        panel.annotate(
            str(number), place, fontsize=8, xytext=(4, 3), textcoords="offset points", color=colour
        )
    panel.set_xlabel("similarity of style to that of the true drawing")
    panel.set_ylabel("similarity of subject to the true drawing")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=0)
    figure.savefig(path, facecolor="white")
