"""The schedule of a fusion as a map: blocks of the denoiser by progress."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle

import click

from klora_compile.report.palette import Rgb, colours, mixed, parts_of
from klora_runtime.artifact.fusion import TEXT_ENCODERS, Entry, Fusion, Slot
from klora_runtime.errors import shown

#: Share of the layers of a block that are on content, from none to all, in characters.
_SHADES = "░▒▓█"

#: More than two slots are letters in their order; small where less than half of a block is on one.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ALIKE = "="
_ROUNDING = 1e-9

#: Data flows through a model's blocks in this order; other names follow by name.
_FLOW = (
    "down_blocks",
    "mid_block",
    "up_blocks",
    "transformer_blocks",
    "single_transformer_blocks",
)
_INNER_LISTS = ("attentions", "resnets", "downsamplers", "upsamplers")


@dataclass(frozen=True)
class Block:
    """Layers of a model that belong together, in the order data flows."""

    name: str
    entries: tuple[Entry, ...]

    def acting(self) -> Block:
        """The block without the layers that never act."""
        return Block(self.name, tuple(entry for entry in self.entries if entry.acts))

    def parts(self, progress: float) -> dict[str, float]:
        """Slot -> its mean part in the layers that act here; empty where none acts."""
        rows = (entry.timeline.at(progress) for entry in self.entries if entry.acts)
        acting = [parts for row in rows if (parts := parts_of(row))]
        slots = {slot for parts in acting for slot in parts}
        return {slot: sum(parts.get(slot, 0.0) for parts in acting) / len(acting) for slot in slots}


def blocks(fusion: Fusion) -> list[Block]:
    """The denoiser's layers by block, in the order data flows."""
    groups: dict[str, list[Entry]] = {}
    for entry in sorted(_with_steps(fusion.entries), key=_flow_key):
        groups.setdefault(f"{entry.component}.{_block_name(entry.module)}", []).append(entry)
    return [Block(name, tuple(entries)) for name, entries in groups.items()]


def text_map(fusion: Fusion, width: int) -> str:
    """The map in characters: a line per block, progress from left to right.

    Args:
        width: characters for the progress axis.
    """
    rows = blocks(fusion)
    if not rows:
        return "no denoiser layers"
    label = max(len(shown(block.name)) for block in rows)
    palette = colours(fusion.slots)
    lines = [_line(block, label, width, palette) for block in rows]
    axis = f"{'':<{label}}  0{'progress':^{max(8, width - 2)}}1"
    return "\n".join([*lines, axis, f"{'':<{label}}  {_legend(fusion, palette)}"])


def slot_label(slot: Slot) -> str:
    """The name of a slot in a legend; one that is computed says so."""
    return slot.name if slot.derived is None else f"{slot.name} (derived)"


def _legend(fusion: Fusion, palette: Mapping[str, Rgb]) -> str:
    marks = (_SHADES[-1], _SHADES[0]) if len(palette) == 2 else cycle(_LETTERS)
    names = [
        click.style(f"{mark} {slot_label(fusion.slots[slot])}", fg=colour)
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
    """The character of a cell."""
    if len(slots) == 2:
        share = parts.get(slots[0], 0.0)
        return _SHADES[min(len(_SHADES) - 1, int((share + _ROUNDING) * len(_SHADES)))]
    shares = [parts.get(slot, 0.0) for slot in slots]
    if max(shares) - min(shares) < _ROUNDING:
        return _ALIKE
    letter = _LETTERS[shares.index(max(shares)) % len(_LETTERS)]
    return letter if max(shares) >= 0.5 - _ROUNDING else letter.lower()


def _with_steps(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.component not in TEXT_ENCODERS]


def _block_name(module: str) -> str:
    parts = module.split(".")
    for position, part in enumerate(parts):
        following = parts[position + 1 : position + 2]
        if part.isdigit() and following and following[0] not in _INNER_LISTS:
            return ".".join(parts[: position + 1])
    return parts[0]


def _flow_key(entry: Entry) -> tuple[object, ...]:
    first = entry.module.split(".")[0]
    place = _FLOW.index(first) if first in _FLOW else len(_FLOW)
    natural = tuple(
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", entry.module)
    )
    return entry.component, place, natural
