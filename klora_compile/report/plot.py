"""The schedule of a fusion as a picture: layers over progress, with their ratios."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from klora_compile.extras import missing_library
from klora_compile.report.plot_labels import fit_blocks, fit_ticks, legend_columns, legend_label
from klora_compile.report.plot_theme import THEMES, Theme
from klora_compile.report.schedule_map import MARKED_STEPS
from klora_compile.report.scores import number_of
from klora_compile.report.summary import gamma_of, rule_of
from klora_compile.runs import Run, runs_of
from klora_runtime.artifact.blocks import Block, blocks
from klora_runtime.artifact.palette import (
    CONTENT_RGB,
    STYLE_RGB,
    Rgb,
    colours,
    mixed,
    parts_of,
    shown_slots,
)
from klora_runtime.artifact.replacing import replacing
from klora_runtime.artifact.schedule import Schedule, ScheduledEntry
from klora_runtime.errors import KloraError, shown

_COLUMNS = 1200
_RATIO_TICKS = (0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0, 100.0, 1000.0)
_WIDTH = 11.0
#: Characters of a line of the name, of the title, and of the text below the axis.
_NAME, _TITLE = 90, 105
#: In SVG, letters stay text; equal fusions give equal files.
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "schedule"}
#: Styles of the lines that mark the steps of runs.
_LINES = ("dotted", "dashed")


def plot_schedule(
    fusion: Schedule,
    path: Path,
    *,
    overwrite: bool = False,
    shift: float | None = None,
    theme: str = "light",
) -> None:
    """Draw the schedule as a heat map into an image file.

    Rows are the denoiser's layers that act, from input to output, grouped by block; columns are
    progress. Each LoRA has a colour. If the rule compares a ratio, a second panel shows each
    layer's ratio against the range in which layers switch.

    Args:
        path: the file; its suffix chooses the format (``.png``, ``.pdf``, ``.svg``).
        overwrite: replace an existing file.
        shift: see :func:`~klora_compile.runs.runs_of`; by the clock of the noise, lines mark the
            steps of each run that is assumed.
        theme: ``light`` or ``dark``.

    Raises:
        ConfigError: see :func:`~klora_compile.runs.runs_of`.
        KloraError: matplotlib is not installed, the file exists and ``overwrite`` is false, or it
            cannot be written; an old file is unchanged.
    """
    figure = schedule_figure(fusion, shift, THEMES[theme])
    from matplotlib import rc_context

    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with replacing(path, overwrite=overwrite) as temporary, rc_context(_SVG):
        try:
            figure.savefig(temporary, metadata=dated.get(path.suffix.lower()))
        except (OSError, ValueError) as error:
            raise KloraError(f"{shown(path)} cannot be written: {shown(error)}") from error


def schedule_figure(fusion: Schedule, shift: float | None, theme: Theme) -> Any:
    """Return the picture of :func:`plot_schedule` as a figure of matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_library("the plot", error) from error
    runs = [run for run in runs_of(fusion.clock, shift) if run.shift is not None]
    rows = [acting for block in blocks(fusion) if (acting := block.acting()).entries]
    if not rows:
        raise KloraError("there is nothing to plot: no denoiser layer of the fusion acts.")
    layers = [entry for block in rows for entry in block.entries]
    height = min(14.0, max(4.5, 2.0 + 0.055 * len(layers)))
    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained", facecolor=theme.paper)
    ratios, ticks = None, list[float]()
    if any(_ratio(fusion, entry) for entry in layers):
        heat, ratios = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        ticks = _draw_ratios(ratios, fusion, layers, theme)
    else:
        heat = figure.subplots()
    draw_heat(heat, fusion, layers, theme)
    _draw_steps(heat, runs, theme)
    _draw_lines(heat, ratios, rows, theme)
    _draw_titles(figure, heat, fusion, rows, theme)
    _draw_legend(figure, fusion, theme)
    for axes in filter(None, (heat, ratios)):
        theme.apply(axes)
    fit_blocks(figure, heat, [(_literal(block.name), len(block.entries)) for block in rows])
    if ratios is not None:
        fit_ticks(figure, ratios, ticks)
    return figure


def draw_heat(
    axes: Any, fusion: Schedule, layers: list[ScheduledEntry], theme: Theme = THEMES["light"]
) -> None:
    """Draw layers over progress into matplotlib axes, one row each."""
    palette = colours(shown_slots(fusion))
    progress = (np.arange(_COLUMNS) + 0.5) / _COLUMNS
    image = np.empty((len(layers), _COLUMNS, 3), dtype=np.uint8)
    for row, entry in enumerate(layers):
        for start, coefficients in entry.timeline.rows():
            parts = parts_of(coefficients)
            colour = mixed([(palette[slot], part) for slot, part in parts.items()])
            image[row, progress >= start] = colour if parts else theme.blank
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0.0, 1.0, len(layers), 0.0))
    by = " by noise" if fusion.clock == "noise" else ""
    axes.set_xlabel(f"progress of sampling{by}", color=theme.ink)
    axes.set_xlim(0.0, 1.0)


def _draw_steps(heat: Any, runs: Sequence[Run], theme: Theme) -> None:
    """Mark the steps of runs, each with lines of its own, and say so below the axis."""
    for run, style in zip(runs, _LINES, strict=False):
        for moment in run.progress(MARKED_STEPS):
            heat.axvline(moment, color=theme.ink, linewidth=0.8, linestyle=style)
    marks = ", ".join(f"{run.text} {style}" for run, style in zip(runs, _LINES, strict=False))
    if marks:
        heat.set_xlabel(f"{heat.get_xlabel()}; lines: {MARKED_STEPS} steps, {marks}")


def _ratio(fusion: Schedule, entry: ScheduledEntry) -> float:
    """Return a layer's ratio; 0 if there is none."""
    return number_of(fusion, entry, "ratio") or 0.0


def _draw_lines(heat: Any, ratios: Any, rows: list[Block], theme: Theme) -> None:
    """Draw lines between the blocks."""
    for end in np.cumsum([len(block.entries) for block in rows])[:-1]:
        heat.axhline(end, color=theme.paper, linewidth=2.0)
        if ratios is not None:
            ratios.axhline(end, color=theme.faint, linewidth=0.8)


def _draw_ratios(
    axes: Any, fusion: Schedule, layers: list[ScheduledEntry], theme: Theme
) -> list[float]:
    """Draw the ratio of each layer; return the ticks that its axis may have."""
    points = [
        (row + 0.5, ratio)
        for row, entry in enumerate(layers)
        if (ratio := _ratio(fusion, entry)) > 0
    ]
    rule = rule_of(fusion)
    formula = "" if rule is None else rule.ratio_formula
    axes.set_xlabel(f"ratio  {formula}".rstrip(), color=theme.ink)
    axes.tick_params(axis="y", length=0, labelleft=False)
    ends = None if rule is None else rule.range()
    if ends is not None:
        axes.axvspan(max(ends[0], 1e-3), ends[1], color=theme.band, zorder=0)
    if not points:
        return []
    heights, values = zip(*points, strict=True)
    colours = [_rgb(CONTENT_RGB if value >= 1 else STYLE_RGB) for value in values]
    axes.scatter(values, heights, s=9, c=colours, linewidths=0, zorder=2)
    left, right = min(0.3, 0.8 * min(values)), max(3.5, 1.25 * max(values))
    ticks = [tick for tick in _RATIO_TICKS if left <= tick <= right]
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.axvline(1.0, color=theme.line, linewidth=0.8, zorder=1)
    axes.set_xlim(left, right)
    axes.set_xticks([])
    return ticks


def _draw_titles(figure: Any, heat: Any, fusion: Schedule, rows: list[Block], theme: Theme) -> None:
    names = " × ".join(shown(source.file.split(".")[0]) for source in fusion.sources.values())
    shown_layers = sum(len(block.entries) for block in rows)
    switching = sum(entry.timeline.switches for block in rows for entry in block.entries)
    silent = sum(len(block.entries) for block in blocks(fusion)) - shown_layers
    gamma = gamma_of(fusion)
    gamma_text = f", γ = {gamma:.4g}" if isinstance(gamma, float) else ""
    rule = rule_of(fusion)
    words = [fusion.rule.name, *([] if rule is None else [rule.text()])]
    title = (
        f"{shown(', '.join(words))}{gamma_text}: {switching} of {shown_layers} layers switch"
        + (f" ({silent} that never act are left out)" if silent else "")
    )
    figure.suptitle(_lines(names, _NAME), fontsize=14, color=theme.ink)
    heat.set_title(_lines(title, _TITLE), fontsize=9, color=theme.ink, loc="left")


def _draw_legend(figure: Any, fusion: Schedule, theme: Theme) -> None:
    """Name the colours below everything, each with the file of its LoRA."""
    from matplotlib.patches import Patch

    palette = colours(shown_slots(fusion))
    labels = {slot: legend_label(fusion, slot) for slot in palette}
    figure.legend(
        handles=[
            Patch(color=_rgb(colour), label=_literal(labels[slot]))
            for slot, colour in palette.items()
        ],
        loc="outside lower center",
        ncols=legend_columns(list(labels.values()), _WIDTH),
        fontsize=9,
        frameon=False,
        labelcolor=theme.ink,
    )


def _lines(text: str, width: int) -> str:
    return "\n".join(map(_literal, wrap(text, width)))


def _literal(text: object) -> str:
    """Return text with dollar signs escaped, which matplotlib takes for mathematics."""
    return shown(text).replace("$", r"\$")


def _rgb(colour: Rgb) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
