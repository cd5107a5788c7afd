"""Encoding q as the JSON of a file tells it (`FORMAT.md`): what is stored, and within which limits.

Needs no torch; `codec` reads and writes the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: The highest level.
MAX_LEVEL = 255

#: The least and the largest step at level 0, so that every number at every level is a normal
#: float32.
LEAST_STEP, MOST_STEP = 1e-28, 1e28

#: The class of numbers, about 4 in root mean square, above which lowest bits are kept apart.
TOP_CLASS = 8

#: How many lowest bits may be kept apart.
MOST_BITS = 15

#: The highest class.
MAX_CLASS = TOP_CLASS + 4 * MOST_BITS


@dataclass(frozen=True)
class Quantised:
    """How the numbers of one slot of one entry are stored."""

    step: float
    """The distance of two points of a grid at level 0, 1e-28 to 1e28."""
    levels: tuple[int, ...]
    """Of each rank, 0 to 255, none above the one before; of a dense delta a single one."""
    error: float
    """What the compiler lost: relative Frobenius error of the delta, 0 to 1."""


def class_offset(length: int) -> int:
    """What a row's length takes from its level: 2 log2(length), rounded down."""
    return (length * length).bit_length() - 1


def matrices_of(shape: Sequence[int], rank: int, *, dense: bool) -> tuple[tuple[int, int], ...]:
    """Rows and numbers of a row of what is stored of one slot.

    Args:
        shape: of the parameter.
        rank: of the factors; of no meaning for a dense delta.
    """
    if not dense:
        return (rank, math.prod(shape[1:])), (rank, shape[0])
    return ((1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:])),)
