"""The schedule of a fusion for notebooks: a map of layers over progress, as HTML with an SVG.

The HTML needs no other files. Names come from strangers' files, so every text is escaped and cut.
The picture stays within a few hundred kilobytes, however many layers and breakpoints there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise

from klora_runtime.artifact.blocks import Block, blocks
from klora_runtime.artifact.palette import Rgb, colours, mixed, parts_of, shown_slots
from klora_runtime.artifact.schedule import Schedule, ScheduledEntry
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import shown

#: Widths of the map and of the names beside it, and height of a line of text, in pixels.
_WIDTH, _LABELS, _LINE = 480, 200, 12
#: Greatest heights of the map and of a layer, in pixels.
_HEIGHT, _ROW = 480, 8

#: Greatest number of drawn layers; of more layers, every second, third, … is drawn.
_MAX_ROWS = 1_000
#: Numbers of columns on the axis of progress: the largest with few enough pieces is used.
_COLUMNS = (480, 96, 16)
_MAX_PIECES = 20_000

_NAME = 34

#: First column, end column (excluded) and colour.
_Piece = tuple[int, int, str]


def schedule_html(
    fusion: Schedule,
    text: str,
    weights: Mapping[str, float] | None = None,
    progress: float | None = None,
    *,
    about: Callable[[ScheduledEntry], str] | None = None,
) -> str:
    """Return the map of a schedule with a text above it.

    Rows are the denoiser's layers that act, from input to output; columns are progress. Each slot
    has a colour; the colours of slots that act together are mixed by |coefficient|.

    Args:
        fusion: the schedule to draw.
        text: plain text of one or more lines.
        weights: slot -> factor on its coefficients; a missing slot has 1.
        progress: a progress to mark in the map.
        about: returns the tooltip of a layer, of one or more lines; None for one per block.
    """
    palette = colours(shown_slots(fusion))
    acting = [block.acting() for block in blocks(fusion)]
    every = -(-sum(len(block.entries) for block in acting) // _MAX_ROWS)
    drawn = _thinned(acting, every)
    parts = [f'<pre style="margin:0 0 6px">{escape(text)}</pre>', _legend(palette)]
    if drawn:
        title = "Which LoRA acts in which layer of the denoiser"
        if every > 1:
            title += f" (one layer in {every} is drawn)"
        parts.insert(1, f"<strong>{title}</strong>")
        axis = "progress of sampling" + (" by noise" if fusion.clock == "noise" else "")
        parts.append(_svg(drawn, palette, weights or {}, progress, title, axis, about))
    else:
        parts.append("<em>No layer of the denoiser acts.</em>")
    return f'<div style="font-size:12px">{"".join(parts)}</div>'


def _thinned(acting: Sequence[Block], every: int) -> list[Block]:
    """Return the blocks reduced to one layer in ``every``; drop blocks that become empty."""
    thinned, skipped = [], 0
    for block in acting:
        kept = block.entries[-skipped % every :: every] if every else ()
        skipped += len(block.entries)
        if kept:
            thinned.append(Block(block.name, kept))
    return thinned


def _legend(palette: Mapping[str, Rgb]) -> str:
    marks = (
        f'<span style="display:inline-block;width:10px;height:10px;background:{_hex(colour)}">'
        f"</span> {escape(shown(slot, _NAME))}&#8195;"
        for slot, colour in palette.items()
    )
    return f"<div>{''.join(marks)}</div>"


def _svg(
    drawn: Sequence[Block],
    palette: Mapping[str, Rgb],
    weights: Mapping[str, float],
    progress: float | None,
    title: str,
    axis: str,
    about: Callable[[ScheduledEntry], str] | None,
) -> str:
    rows = sum(len(block.entries) for block in drawn)
    height = min(_HEIGHT, rows * _ROW)
    step = height / rows
    if progress is None:
        now = ""
    else:
        now = (
            f'<path d="M{progress * _WIDTH:.1f} 0v{height}" stroke="currentColor" '
            f'stroke-dasharray="4 3"><title>progress now: {progress:.3g}</title></path>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" '
        f'style="display:block;max-width:100%" width="{_LABELS + _WIDTH + 10}" '
        f'height="{height + 2 * _LINE}" viewBox="{-_LABELS} 0 {_LABELS + _WIDTH + 10} '
        f'{height + 2 * _LINE}" font-size="10" fill="currentColor">'
        f"{_heat(drawn, palette, weights, rows, height)}{_block_names(drawn, step)}"
        f"{'' if about is None else _tooltips(drawn, step, about)}{now}"
        f"{_axis(height, axis)}</svg>"
    )


def _heat(
    drawn: Sequence[Block],
    palette: Mapping[str, Rgb],
    weights: Mapping[str, float],
    rows: int,
    height: float,
) -> str:
    """Draw one path per colour, of rectangles that join equal pieces of neighbouring rows."""
    timelines = [entry.timeline for block in drawn for entry in block.entries]
    bands = [(timeline, len(list(alike))) for timeline, alike in groupby(timelines)]
    for columns in _COLUMNS:
        if sum(min(len(timeline.starts), columns) for timeline, _ in bands) <= _MAX_PIECES:
            break
    shapes: dict[str, list[str]] = {}
    top = 0
    for timeline, count in bands:
        for begin, end, colour in _pieces(timeline, palette, weights, columns):
            width = end - begin
            shapes.setdefault(colour, []).append(f"M{begin} {top}h{width}v{count}h-{width}z")
        top += count
    paths = (f'<path fill="{colour}" d="{"".join(each)}"/>' for colour, each in shapes.items())
    return (
        f'<svg width="{_WIDTH}" height="{height}" viewBox="0 0 {columns} {rows}" '
        f'preserveAspectRatio="none" shape-rendering="crispEdges">{"".join(paths)}</svg>'
    )


def _pieces(
    timeline: Timeline, palette: Mapping[str, Rgb], weights: Mapping[str, float], columns: int
) -> list[_Piece]:
    """Return a layer's row, neighbours of one colour joined; no piece covers what does not act."""
    begins = [round(start * columns) for start in timeline.starts]
    rows = [row for _, row in timeline.rows()] if len(begins) <= columns else []
    if not rows:  # too many to see
        begins = list(range(columns))
        rows = [timeline.at((begin + 0.5) / columns) for begin in begins]
    pieces: list[_Piece] = []
    for (begin, end), row in zip(pairwise([*begins, columns]), rows, strict=True):
        weighted = {slot: part * weights.get(slot, 1.0) for slot, part in parts_of(row).items()}
        parts = parts_of(weighted)
        if not parts or begin == end:
            continue
        colour = _hex(mixed([(palette[slot], part) for slot, part in parts.items()]))
        if pieces and pieces[-1][1:] == (begin, colour):
            pieces[-1] = (pieces[-1][0], end, colour)
        else:
            pieces.append((begin, end, colour))
    return pieces


def _block_names(drawn: Sequence[Block], step: float) -> str:
    """Draw lines between blocks, names where there is room, and a tooltip for every name."""
    parts, top, free = [], 0.0, 0.0
    for block in drawn:
        height = step * len(block.entries)
        middle = top + height / 2
        name = escape(shown(block.name, _NAME))
        parts.append(
            f'<rect y="{top:.1f}" width="{_WIDTH}" height="{height:.1f}" fill="transparent" '
            f'stroke="white" stroke-width=".5">'
            f"<title>{name}: {len(block.entries)} layers</title></rect>"
        )
        if middle - _LINE / 2 >= free or not free:
            parts.append(f'<text x="-6" y="{middle + 3:.1f}" text-anchor="end">{name}</text>')
            free = middle + _LINE / 2
        top += height
    return "".join(parts)


def _tooltips(drawn: Sequence[Block], step: float, about: Callable[[ScheduledEntry], str]) -> str:
    """Draw a transparent row over each layer, with its tooltip."""
    entries = [entry for block in drawn for entry in block.entries]
    rows = (
        f'<rect y="{row * step:.2f}" width="{_WIDTH}" height="{step:.2f}">'
        f"<title>{escape(about(entry))}</title></rect>"
        for row, entry in enumerate(entries)
    )
    return f'<g class="klora-layers" fill="transparent">{"".join(rows)}</g>'


def _axis(height: float, text: str) -> str:
    y = height + _LINE
    return (
        f'<text y="{y}">0</text><text x="{_WIDTH}" y="{y}" text-anchor="end">1</text>'
        f'<text x="{_WIDTH / 2}" y="{y}" text-anchor="middle">{text}</text>'
    )


def _hex(colour: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
