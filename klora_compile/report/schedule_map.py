"""The schedule of a fusion as a text map: blocks of the denoiser over progress."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import click

from klora_runtime.artifact.blocks import Block, blocks
from klora_runtime.artifact.palette import Rgb, colours, mixed
from klora_runtime.artifact.schedule import Schedule
from klora_runtime.errors import shown

#: Characters for the share of a block's layers in which the content acts, from none to all.
_SHADES = "░▒▓█"

#: Letters of more than two slots, in their order; small if a slot acts in less than half a block.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ALIKE = "="
_ROUNDING = 1e-9


def text_map(fusion: Schedule, width: int) -> str:
    """Return the map as text: a line per block, progress from left to right.

    Args:
        width: length of the progress axis in characters.
    """
    rows = blocks(fusion)
    if not rows:
        return "no denoiser layers"
    label = max(len(shown(block.name)) for block in rows)
    palette = colours(fusion.slots)
    lines = [_line(block, label, width, palette) for block in rows]
    axis = f"{'':<{label}}  0{'progress':^{max(8, width - 2)}}1"
    return "\n".join([*lines, axis, f"{'':<{label}}  {_legend(fusion, palette)}"])


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
