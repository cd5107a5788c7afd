"""Encoding q in the JSON of a file (`FORMAT.md`): stored values and their limits.

This module needs no torch; `codec` reads and writes the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: The highest level.
MAX_LEVEL = 255

#: The smallest and the largest step at level 0: every number at every level is then a normal
#: float32.
LEAST_STEP, MOST_STEP = 1e-28, 1e28

#: The highest class whose numbers (about 2 in root mean square) are coded with all their bits.
TOP_CLASS = 4

#: The greatest number of lowest bits that are stored uncoded.
MOST_BITS = 16

#: The highest class.
MAX_CLASS = TOP_CLASS + 4 * MOST_BITS

#: Numbers are within ±this.
MOST = 2**22

#: A tensor of 1 byte holds at most this many numbers: two share a code of one bit or more.
NUMBERS_PER_BYTE = 16


@dataclass(frozen=True)
class Quantised:
    """The parameters of encoding q for one slot of one entry."""

    step: float
    """Distance of two points of a grid at level 0, 1e-28 to 1e28."""
    levels: tuple[int, ...]
    """One level per rank, 0 to 255, in descending order; a dense delta has a single one."""
    error: float
    """Relative Frobenius error of the delta, 0 to 1, as the compiler measured it."""


def width_of(number: int) -> int:
    """Return how many lowest bits of the numbers of a class are stored uncoded."""
    return max(0, (number - TOP_CLASS + 3) // 4)


def class_offset(length: int) -> int:
    """Return 2 log2(length) rounded down: a row's class is its level minus this."""
    return (length * length).bit_length() - 1


def matrices_of(shape: Sequence[int], rank: int, *, dense: bool) -> tuple[tuple[int, int], ...]:
    """Return (rows, numbers per row) of each stored matrix of one slot.

    Args:
        shape: shape of the parameter.
        rank: rank of the factors; ignored for a dense delta.
    """
    if not dense:
        return (rank, math.prod(shape[1:])), (rank, shape[0])
    return ((1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:])),)
