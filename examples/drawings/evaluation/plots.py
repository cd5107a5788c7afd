"""Plots of the measurement: curves of each setting, and subject against style."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from drawings.evaluation.results import Verdicts, interval
from drawings.evaluation.rules import SWEEPS

_INK, _BAND = "#222222", "#4c78a8"
#: Curves over factors, whose axis is logarithmic.
_FACTORS = ("gamma x", ", K")


def plot_curves(tuning: Mapping[str, Verdicts], path: Path) -> None:
    """Plot a panel per curve: harmonic mean, subject and style by setting, on tuning subjects."""
    curves = _curves(tuning)
    figure = Figure(figsize=(12, 6), dpi=120, layout="constrained")
    axes = figure.subplots(2, -(-len(curves) // 2), sharey=True, squeeze=False)
    for panel, (name, points) in zip(axes.flat, curves.items(), strict=False):
        settings = list(points)
        for key, colour, style in (
            ("subject", "#1f77b4", "--"),
            ("style", "#ff7f0e", "--"),
            ("both", _INK, "-"),
        ):
            found = [interval(verdicts, key) for verdicts in points.values()]
            panel.plot(settings, [each.mean for each in found], style, color=colour, label=key)
            if key == "both":
                low, high = [each.low for each in found], [each.high for each in found]
                panel.fill_between(settings, low, high, color=_BAND, alpha=0.2)
        panel.set_title(name, fontsize=9)
        if any(word in name for word in _FACTORS):
            panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    _save(figure, path)


def plot_plane(
    reported: Mapping[str, Verdicts], tuning: Mapping[str, Verdicts], path: Path
) -> None:
    """Plot subject against style: a point per rule (reported), a line per sweep (tuning)."""
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    panel = figure.subplots()
    for name, points in _curves(tuning).items():
        if not any(word in name for word in ("gamma", "share", "from")):
            continue
        where = [[interval(v, key).mean for v in points.values()] for key in ("style", "subject")]
        panel.plot(*where, "-", lw=1, alpha=0.6, label=f"{name}: tuning subjects")
    for name, verdicts in reported.items():
        style, subject = interval(verdicts, "style").mean, interval(verdicts, "subject").mean
        panel.plot(style, subject, "o", color=_INK, markersize=4)
        panel.annotate(
            name, (style, subject), fontsize=6, xytext=(4, 3), textcoords="offset points"
        )
    panel.set_xlabel("similarity of style to the true drawing")
    panel.set_ylabel("similarity of subject to the true drawing")
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)
    _save(figure, path)


def _curves(tuning: Mapping[str, Verdicts]) -> dict[str, dict[float, Verdicts]]:
    """Return curve -> setting -> verdicts."""
    curves: dict[str, dict[float, Verdicts]] = {}
    for rule in SWEEPS:
        if rule.sweep is not None and rule.name in tuning:
            curves.setdefault(rule.sweep, {})[rule.setting] = tuning[rule.name]
    return curves


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, facecolor="white")
