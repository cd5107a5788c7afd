"""The table's pictures, kept as PNG files: one per row and cell, its seeds side by side."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def folder_of(pictures: Path, row: str) -> Path:
    """Return the folder of a row in the folder of all pictures."""
    return pictures / re.sub(r"[^A-Za-z0-9.-]+", "_", row.replace("*", "-star"))


def keep(drawn: Tensor, path: Path) -> None:
    """Write pictures side by side.

    Args:
        drawn: (seeds, 3, height, width) in [0, 1].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    strip = torch.cat(list(drawn.clamp(0, 1)), dim=2)
    values = (strip * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(values)).save(path)


def first(path: Path) -> Image.Image:
    """Return the picture of the first seed, which is square."""
    strip = Image.open(path).convert("RGB")
    return strip.crop((0, 0, strip.height, strip.height))
