"""Sheets of pictures, to look at while a model is trained."""

from __future__ import annotations

import torch
from PIL import Image

_ENLARGED, _GAP = 2, 4


def pasted(pictures: torch.Tensor) -> Image.Image:
    """Paste rows of pictures on one sheet, twice as large.

    Args:
        pictures: (rows, columns, 3, height, width) in [0, 1].
    """
    rows, columns, _, height, width = pictures.shape
    high, wide = _ENLARGED * height + _GAP, _ENLARGED * width + _GAP
    paper = Image.new("RGB", (columns * wide, rows * high), "white")
    values = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    for row in range(rows):
        for column in range(columns):
            picture = Image.fromarray(values[row, column])
            size = (_ENLARGED * width, _ENLARGED * height)
            large = picture.resize(size, Image.Resampling.BICUBIC)
            paper.paste(large, (column * wide, row * high))
    return paper
