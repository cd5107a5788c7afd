"""Drawings as tensors: the same subjects in several styles, rendered from icon packages.

The packages are those of the npm registry (``@iconify-json/...``), unpacked into one folder each:

    npm pack @iconify-json/noto && mkdir noto && tar xzf iconify-json-noto-*.tgz \\
        -C noto --strip-components=1
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

#: Subject and style of a drawing.
Name = tuple[str, str]

PIXELS = 48

#: Factor of rendering larger and scaling down, which draws thin lines evenly.
_OVERSAMPLING = 3


@dataclass(frozen=True)
class Gallery:
    """Drawings with their names: those that judges learn from, or are measured on."""

    names: tuple[Name, ...]
    pictures: torch.Tensor
    """(drawings, 3, 48, 48) in [0, 1]."""


def gallery(packages: Path, subjects: Iterable[str], styles: Mapping[str, str]) -> Gallery:
    """Return every existing drawing of these subjects in these styles.

    Args:
        packages: the folder with the packages.
        subjects: names of drawings.
        styles: word -> package.
    """
    found = {
        (subject, style): picture
        for subject in subjects
        for style, package in styles.items()
        if (picture := drawing(packages, package, subject)) is not None
    }
    return Gallery(tuple(found), torch.stack(list(found.values())) / 2 + 0.5)


def drawing(packages: Path, package: str, name: str) -> torch.Tensor | None:
    """Return a drawing on white, (3, 48, 48) in [-1, 1]; None if the package lacks it."""
    import resvg_py

    svg = _svg(packages, package, name)
    if svg is None:
        return None
    size = _OVERSAMPLING * PIXELS
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture)
    small = paper.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    values = np.asarray(small, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def picture(drawn: torch.Tensor) -> Image.Image:
    """Return a drawing in [-1, 1] as a picture.

    Args:
        drawn: (3, height, width).
    """
    values = ((drawn + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(values))


@lru_cache
def icons(packages: Path, package: str) -> Any:
    """Return a package of drawings as it is: ``icons`` and ``aliases`` by name."""
    return json.loads((packages / package / "icons.json").read_text(encoding="utf-8"))


def _svg(packages: Path, package: str, name: str) -> str | None:
    pack = icons(packages, package)
    alias = pack.get("aliases", {}).get(name)
    icon = pack["icons"].get(name if alias is None else alias["parent"])
    if icon is None:
        return None
    width = icon.get("width", pack.get("width", 16))
    height = icon.get("height", pack.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{width}" height="{height}" color="black">{icon["body"]}</svg>'
    )
