"""The schedule of a fusion as a text map: blocks of the denoiser over progress."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import click

from klora_compile.runs import Run, runs_of
from klora_runtime.artifact.blocks import Block, blocks
from klora_runtime.artifact.palette import Rgb, colours, mixed
from klora_runtime.artifact.schedule import Schedule
from klora_runtime.errors import shown

#: Characters for the share of a block's layers in which the content acts, from none to all.
_SHADES = "░▒▓█"

#: Letters of more than two slots, in their order; small if a slot acts in less than half a block.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ALIKE = "="
_STEP = "|"

#: Number of steps of the runs that maps mark by the clock of the noise.
MARKED_STEPS = 8
_ROUNDING = 1e-9


def text_map(fusion: Schedule, width: int, shift: float | None = None) -> str:
    """Return the map as text: a line per block, progress from left to right.

    By the clock of the noise, a line below marks the steps of each run that is assumed.

    Args:
        fusion: the fusion.
        width: length of the progress axis in characters.
        shift: see :func:`~klora_compile.runs.runs_of`.

    Raises:
        ConfigError: see :func:`~klora_compile.runs.runs_of`.
    """
    runs = [run for run in runs_of(fusion.clock, shift) if run.shift is not None]
    rows = blocks(fusion)
    if not rows:
        return "no denoiser layers"
    names = [*(shown(block.name) for block in rows), *map(_run_label, runs)]
    label = max(map(len, names))
    palette = colours(fusion.slots)
    lines = [_line(block, label, width, palette) for block in rows]
    words = "progress by noise" if runs else "progress"
    axis = f"{'':<{label}}  0{words:^{max(len(words), width - 2)}}1"
    rulers = [f"{_run_label(run):<{label}}  {_ruler(run, width)}" for run in runs]
    return "\n".join([*lines, axis, *rulers, f"{'':<{label}}  {_legend(fusion, palette)}"])


def _run_label(run: Run) -> str:
    return f"{MARKED_STEPS} steps, {run.text}"


def _ruler(run: Run, width: int) -> str:
    """Return a mark at the progress of each step of a run."""
    marked = {int(moment * width) for moment in run.progress(MARKED_STEPS)}
    return "".join(_STEP if column in marked else " " for column in range(width)).rstrip()


def slot_label(fusion: Schedule, slot: str) -> str:
    """Return the name of a slot in a legend, marked if the slot is derived."""
    return slot if fusion.slots[slot].derived is None else f"{slot} (derived)"


def _legend(fusion: Schedule, palette: Mapping[str, Rgb]) -> str:
    marks = (_SHADES[-1], _SHADES[0]) if len(palette) == 2 else cycle(_LETTERS)
    names = [
        click.style(f"{mark} {slot_label(fusion, slot)}", fg=colour)
        for mark, (slot, colour) in zip(marks, palette.items(), strict=False)
    ]
    words = "shades: part of the block's layers"
    if len(palette) != 2:
        words = f"small: less than half of the block, {_ALIKE} all alike"
    return f"{'  '.join(names)}   {words}"


def _line(block: Block, label: int, width: int, palette: Mapping[str, Rgb]) -> str:
    cells = []
    for column in range(width):
        parts = block.parts((column + 0.5) / width)
        if not parts:
            cells.append(" ")
            continue
        colour = mixed([(palette[slot], part) for slot, part in parts.items()])
        cells.append(click.style(_mark(parts, tuple(palette)), fg=colour))
    return f"{shown(block.name):<{label}}  {''.join(cells)}"


def _mark(parts: Mapping[str, float], slots: tuple[str, ...]) -> str:
    """Return the character of a cell."""
    if len(slots) == 2:
        share = parts.get(slots[0], 0.0)
        return _SHADES[min(len(_SHADES) - 1, int((share + _ROUNDING) * len(_SHADES)))]
    shares = [parts.get(slot, 0.0) for slot in slots]
    if max(shares) - min(shares) < _ROUNDING:
        return _ALIKE
    letter = _LETTERS[shares.index(max(shares)) % len(_LETTERS)]
    return letter if max(shares) >= 0.5 - _ROUNDING else letter.lower()
