"""The map of a schedule as an image: rows are layers, columns are progress, colours are LoRAs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw, ImageFont

from klora_runtime.artifact.blocks import Block, blocks
from klora_runtime.artifact.palette import Rgb, colours, mixed, parts_of, shown_slots
from klora_runtime.artifact.schedule import Schedule
from klora_runtime.errors import ConfigError, shown

#: Sizes in pixels: the map, the names beside it, a line of text, and the margins.
_WIDTH, _NAMES, _LINE, _MARGIN = 720, 230, 16, 12
#: Height of a layer, and the greatest height of the map.
_ROW, _HEIGHT = 8, 880
_NAME = 34

_PAPER: Rgb = (255, 255, 255)
_INK: Rgb = (40, 40, 40)
_RULE: Rgb = (225, 225, 225)


def schedule_picture(fusion: Schedule, weights: Mapping[str, float] | None = None) -> torch.Tensor:
    """Return the map of a schedule.

    Args:
        fusion: the schedule to draw.
        weights: slot -> factor on its coefficients; a missing slot has 1.

    Returns:
        (1, height, width, 3) in float32 from 0 to 1, as ComfyUI has images.

    Raises:
        ConfigError: no layer of the denoiser acts.
    """
    drawn = [block for each in blocks(fusion) if (block := each.acting()).entries]
    if not drawn:
        raise ConfigError("no layer of the denoiser acts, so there is no map.")
    palette = colours(shown_slots(fusion))
    grid = _grid(drawn, palette, weights or {})
    height = min(_HEIGHT, _ROW * grid.height)
    top = _MARGIN + 2 * _LINE
    size = (_NAMES + _WIDTH + 2 * _MARGIN, top + height + 2 * _LINE)
    picture = Image.new("RGB", size, _PAPER)
    picture.paste(grid.resize((_WIDTH, height), Image.Resampling.NEAREST), (_NAMES, top))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    _legend(draw, font, palette)
    _block_names(draw, font, drawn, top, height)
    axis = "progress of sampling" + (" by noise" if fusion.clock == "noise" else "")
    below = top + height + 2
    for x, text, anchor in ((0, "0", "la"), (_WIDTH // 2, axis, "ma"), (_WIDTH, "1", "ra")):
        draw.text((_NAMES + x, below), text, _INK, font, anchor)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, size[1], size[0], 3).to(torch.float32) / 255


def _grid(
    drawn: list[Block], palette: Mapping[str, Rgb], weights: Mapping[str, float]
) -> Image.Image:
    """Return one row of pixels per layer and one column per pixel of the map's width."""
    timelines = [entry.timeline for block in drawn for entry in block.entries]
    grid = Image.new("RGB", (_WIDTH, len(timelines)), _PAPER)
    draw = ImageDraw.Draw(grid)
    for y, timeline in enumerate(timelines):
        ends = (*timeline.starts[1:], 1.0)
        for (start, row), end in zip(timeline.rows(), ends, strict=True):
            parts = parts_of({slot: value * weights.get(slot, 1.0) for slot, value in row.items()})
            if parts:
                colour = mixed([(palette[slot], part) for slot, part in parts.items()])
                draw.line((round(start * _WIDTH), y, round(end * _WIDTH) - 1, y), colour)
    return grid


def _legend(draw: ImageDraw.ImageDraw, font: object, palette: Mapping[str, Rgb]) -> None:
    x = _NAMES
    for slot, colour in palette.items():
        draw.rectangle((x, _MARGIN + 2, x + 10, _MARGIN + 12), colour)
        text = shown(slot, _NAME)
        draw.text((x + 16, _MARGIN), text, _INK, font)  # type: ignore[arg-type]
        x += 32 + round(draw.textlength(text, font))  # type: ignore[arg-type]


def _block_names(
    draw: ImageDraw.ImageDraw, font: object, drawn: list[Block], top: int, height: int
) -> None:
    """Draw a line between blocks, and each name for which there is room."""
    rows = sum(len(block.entries) for block in drawn)
    begin, free = 0, -_LINE
    for block in drawn:
        end = begin + len(block.entries)
        y = top + height * begin // rows
        if begin:
            draw.line((_NAMES, y, _NAMES + _WIDTH, y), _RULE)
        middle = top + height * (begin + end) // (2 * rows)
        if middle - free >= _LINE:
            text = shown(block.name, _NAME)
            draw.text((_NAMES - 6, middle), text, _INK, font, "rm")  # type: ignore[arg-type]
            free = middle
        begin = end
