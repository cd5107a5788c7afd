"""The schedule of a fusion as a text map: blocks of the denoiser over progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import click

from klora_compile.runs import Run, runs_of
from klora_runtime.artifact.blocks import Block, blocks
from klora_runtime.artifact.palette import Rgb, colours, mixed, shown_slots
from klora_runtime.artifact.schedule import ALWAYS, Schedule
from klora_runtime.errors import shown

#: Characters for the share of a block's layers in which the content acts, from none to all.
_SHADES = "░▒▓█"

#: Letters of more than two slots, in their order; small if a slot acts in less than half a block.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ALIKE = "="
_STEP = "|"

#: Number of steps of the runs that maps mark by the clock of the noise.
MARKED_STEPS = 8
#: Of layers where only LoRAs of role ``always`` act.
_BESIDE = "+"
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
    palette = colours(shown_slots(fusion))
    beside = [name for name, slot in fusion.slots.items() if slot.role == ALWAYS]
    lines = [_line(block, label, width, palette, beside) for block in rows]
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
    """Return the name of a slot in a legend, marked if the slot is derived or always acts."""
    found = fusion.slots[slot]
    if found.role == ALWAYS:
        return f"{slot} (at every step)"
    return slot if found.derived is None else f"{slot} (derived)"


def _legend(fusion: Schedule, palette: Mapping[str, Rgb]) -> str:
    chosen = [slot for slot in palette if fusion.slots[slot].role != ALWAYS]
    marks = (_SHADES[-1], _SHADES[0]) if len(chosen) == 2 else cycle(_LETTERS)
    marked = [*zip(chosen, marks, strict=False)]
    marked += [(slot, _BESIDE) for slot in palette if slot not in chosen]
    names = [
        click.style(f"{mark} {slot_label(fusion, slot)}", fg=palette[slot]) for slot, mark in marked
    ]
    words = "shades: part of the block's layers"
    if len(chosen) < 2:
        words = "small: less than half of the block"
    elif len(chosen) != 2:
        words = f"small: less than half of the block, {_ALIKE} all alike"
    return f"{'  '.join(names)}   {words}"


def _line(
    block: Block, label: int, width: int, palette: Mapping[str, Rgb], beside: Sequence[str]
) -> str:
    cells = []
    for column in range(width):
        parts = block.parts((column + 0.5) / width)
        if not parts:
            cells.append(" ")
            continue
        colour = mixed([(palette[slot], part) for slot, part in parts.items()])
        chosen = tuple(slot for slot in palette if slot not in beside)
        mark = _mark(parts, chosen) if any(map(parts.get, chosen)) else _BESIDE
        cells.append(click.style(mark, fg=colour))
    return f"{shown(block.name):<{label}}  {''.join(cells)}"


def _mark(parts: Mapping[str, float], slots: tuple[str, ...]) -> str:
    """Return the character of a cell."""
    if len(slots) == 2:
        share = parts.get(slots[0], 0.0)
        return _SHADES[min(len(_SHADES) - 1, int((share + _ROUNDING) * len(_SHADES)))]
    shares = [parts.get(slot, 0.0) for slot in slots]
    if len(slots) > 1 and max(shares) - min(shares) < _ROUNDING:
        return _ALIKE
    letter = _LETTERS[shares.index(max(shares)) % len(_LETTERS)]
    return letter if max(shares) >= 0.5 - _ROUNDING else letter.lower()
