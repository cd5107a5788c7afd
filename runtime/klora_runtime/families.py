"""Which base model family a set of layers belongs to, told by the shapes that differ.

A row names a layer by a pattern and the value of its input width. A new family is a new row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: (family, component, pattern of a module path, input width of that layer's weight)
_MARKS: tuple[tuple[str, str, re.Pattern[str], int], ...] = (
    ("sd1", "unet", re.compile(r"\.attn2\.to_[kv]$"), 768),
    ("sd2", "unet", re.compile(r"\.attn2\.to_[kv]$"), 1024),
    ("sdxl-refiner", "unet", re.compile(r"\.attn2\.to_[kv]$"), 1280),
    ("sdxl", "unet", re.compile(r"\.attn2\.to_[kv]$"), 2048),
)

FAMILY_NAMES: Mapping[str, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
}


def family_of(shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> str | None:
    """The one family whose marks the layers carry.

    Args:
        shapes: (component, module path) -> shape of its weight.

    Returns:
        A key of :data:`FAMILY_NAMES`, or None where no mark or marks of several families match.
    """
    found = {
        family
        for (component, module), shape in shapes.items()
        for family, where, pattern, width in _MARKS
        if component == where and len(shape) > 1 and shape[1] == width and pattern.search(module)
    }
    return found.pop() if len(found) == 1 else None


def family_name(family: str | None) -> str:
    """Words for an error or a report."""
    return "an unknown family" if family is None else FAMILY_NAMES.get(family, family)
