"""True drawings with their names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Subject and style of a drawing.
Name = tuple[str, str]


@dataclass(frozen=True)
class Gallery:
    """Drawings that pictures are compared with, or that judges learn from."""

    names: tuple[Name, ...]
    pictures: Tensor
    """(drawings, 3, 48, 48) in [0, 1]."""
