"""The plane of the table: similarity of the subject against similarity of the style."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from drawings.table.intervals import interval
from drawings.table.kept import Results
from drawings.table.rows import REFERENCE

_INK, _REFERENCE_INK = "#222222", "#d62728"


def plot_plane(results: Results, path: Path) -> None:
    """Plot a point per row with its name, and the reference in red."""
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    panel = figure.subplots()
    for name, cells in results.items():
        place = interval(cells, "style").mean, interval(cells, "subject").mean
        panel.plot(*place, "o", color=_REFERENCE_INK if name == REFERENCE else _INK, markersize=4)
        panel.annotate(name, place, fontsize=6, xytext=(4, 3), textcoords="offset points")
    panel.set_xlabel("similarity of style to that of the true drawing")
    panel.set_ylabel("similarity of subject to the true drawing")
    panel.grid(alpha=0.3)
    figure.savefig(path, facecolor="white")
