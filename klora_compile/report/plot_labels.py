"""Labels of a map that do not overlap, whatever the number of blocks and LoRAs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from klora_compile.report.schedule_map import slot_label
from klora_runtime.artifact.schedule import Schedule
from klora_runtime.errors import shown

#: Sizes of the labels of blocks and of ticks, in points; a line needs a quarter more.
_BLOCK_SIZE, _TICK_SIZE, _LINE = 7.0, 8.0, 1.25
#: Width of a character for its size, at most.
_CHARACTER = 0.75
_LONGEST_FILE = 60
_POINTS = 72.0

#: Inches of a legend's character, and of what stands before a label.
_LEGEND_CHARACTER, _LEGEND_PATCH = 0.085, 0.6


def fit_blocks(figure: Any, axes: Any, blocks: Sequence[tuple[str, int]]) -> None:
    """Write the names of blocks beside their rows; small blocks give way to large ones.

    Args:
        figure: the figure, whose other parts are drawn.
        axes: the map, one row for each layer.
        blocks: name and number of layers of each block, from above.
    """
    row = _length(figure, axes, "height") / sum(count for _, count in blocks)
    places, top = [], 0
    for _, count in blocks:
        places.append((top + count / 2) * row)
        top += count
    size = [_LINE * _BLOCK_SIZE] * len(blocks)
    kept = _apart(places, size, [-count for _, count in blocks])
    axes.set_yticks([places[i] / row for i in kept], [blocks[i][0] for i in kept])
    axes.tick_params(axis="y", labelsize=_BLOCK_SIZE, length=0)


def fit_ticks(figure: Any, axes: Any, ticks: Sequence[float]) -> None:
    """Write ticks below a logarithmic axis; those nearest to 1 come first.

    Args:
        figure: the figure, whose other parts are drawn.
        axes: the panel, whose limits are set.
        ticks: values inside the limits, all above 0.
    """
    low, high = map(math.log, axes.get_xlim())
    width = _length(figure, axes, "width") / (high - low)
    places = [(math.log(tick) - low) * width for tick in ticks]
    texts = [f"{tick:g}" for tick in ticks]
    sizes = [(len(text) + 1) * _CHARACTER * _TICK_SIZE for text in texts]
    kept = _apart(places, sizes, [abs(math.log(tick)) for tick in ticks])
    axes.set_xticks([ticks[i] for i in kept], [texts[i] for i in kept])
    axes.tick_params(axis="x", labelsize=_TICK_SIZE)


def legend_label(fusion: Schedule, slot: str) -> str:
    """Return the name of a slot and of the files of its LoRAs."""
    sources = fusion.slots[slot].sources
    files = dict.fromkeys(fusion.sources[name].file for name in sources if name in fusion.sources)
    named = " + ".join(map(_short, files))
    return ": ".join(filter(None, (slot_label(fusion, slot), named)))


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many labels fit beside each other into a width in inches."""
    longest = max(map(len, labels)) * _LEGEND_CHARACTER + _LEGEND_PATCH
    return max(1, min(len(labels), int(width / longest)))


def _short(file: str) -> str:
    """Return the name of a file, without its middle if it is long."""
    name = shown(file)
    half = _LONGEST_FILE // 2
    return name if len(name) <= _LONGEST_FILE else f"{name[:half]}…{name[-half:]}"


def _length(figure: Any, axes: Any, side: str) -> float:
    """Return the width or height of axes in points, as the layout makes it."""
    figure.draw_without_rendering()
    return float(getattr(axes.get_window_extent(), side) / figure.dpi * _POINTS)


def _apart(places: Sequence[float], sizes: Sequence[float], order: Sequence[float]) -> list[int]:
    """Return which labels can stay so that none overlaps another, in the order of their places.

    Args:
        places: middle of each label.
        sizes: extent of each label.
        order: rank of each label; lower ones are placed first.
    """
    kept: list[int] = []
    for i in sorted(range(len(places)), key=lambda index: (order[index], index)):
        if all(abs(places[i] - places[j]) >= (sizes[i] + sizes[j]) / 2 for j in kept):
            kept.append(i)
    return sorted(kept)
