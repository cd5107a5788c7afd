"""The schedule of a fusion as a map: blocks of the denoiser by progress."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import click

from klora_runtime.errors import shown
from klora_runtime.fusion import TEXT_ENCODERS, Entry, Fusion

#: Colours of the two roles, here and in the plot: a blue and an orange that stay apart in print
#: and for colour-blind readers.
CONTENT_RGB = (38, 103, 168)
STYLE_RGB = (232, 133, 44)

#: Share of the layers of a block that are on content, from none to all, in characters.
_SHADES = "░▒▓█"

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

    def content_share(self, progress: float) -> float | None:
        """Of the layers that act here, the share on content; None where none acts."""
        acting = [entry.timeline.at(progress) for entry in self.entries if entry.acts]
        content = sum(bool(row.get("content")) for row in acting)
        both = content + sum(bool(row.get("style")) for row in acting)
        return content / both if both else None


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
    lines = [_line(block, label, width) for block in rows]
    axis = f"{'':<{label}}  0{'progress':^{max(8, width - 2)}}1"
    content = click.style("█ content", fg=CONTENT_RGB)
    style = click.style("░ style", fg=STYLE_RGB)
    legend = f"{'':<{label}}  {content}  {style}   shades: part of the block's layers"
    return "\n".join([*lines, axis, legend])


def _line(block: Block, label: int, width: int) -> str:
    cells = []
    for column in range(width):
        share = block.content_share((column + 0.5) / width)
        if share is None:
            cells.append(" ")
            continue
        colour = tuple(
            round(s + share * (c - s)) for c, s in zip(CONTENT_RGB, STYLE_RGB, strict=True)
        )
        shade = _SHADES[min(len(_SHADES) - 1, int(share * len(_SHADES)))]
        cells.append(click.style(shade, fg=(colour[0], colour[1], colour[2])))
    return f"{shown(block.name):<{label}}  {''.join(cells)}"


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
