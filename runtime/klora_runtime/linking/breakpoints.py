"""Breakpoints: the smallest float64 progress at which a literally evaluated choice changes."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial

#: The last float64 below 1, the end of the progress range.
LAST_PROGRESS = math.nextafter(1.0, 0.0)

#: The whole range of progress as one piece.
WHOLE = ((0.0, LAST_PROGRESS),)

#: Distance below which two progress values, or a ratio and an end of S's range, are a near tie.
NEAR = 1e-6


def switches(
    chooses: Callable[[float], bool], pieces: Sequence[tuple[float, float]] = WHOLE
) -> list[tuple[float, bool]]:
    """Return each segment as (start, choice); the first start is 0.

    Args:
        chooses: returns the choice at a progress; it changes at most once within each piece.
        pieces: first and last progress of each piece.
    """

    def becomes(choice: bool, t: float) -> bool:
        return chooses(t) == choice

    segments: list[tuple[float, bool]] = []
    for start, last in pieces:
        begins = [start]
        if chooses(start) != chooses(last):
            begins.append(first_where(partial(becomes, chooses(last)), start, last))
        for begin in begins:
            choice = chooses(begin)
            if not segments or segments[-1][1] != choice:
                segments.append((begin, choice))
    return segments


def first_where(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the smallest float64 in [low, high] at which a monotone condition holds.

    Args:
        holds: the condition: false at first, then true up to and including ``high``.
        low: lower end, at least 0.
    """
    if holds(low):
        return low
    false_at, true_at = _bits(low), _bits(high)  # non-negative floats sort like their bits
    while true_at - false_at > 1:
        middle = (false_at + true_at) // 2
        if holds(_float(middle)):
            true_at = middle
        else:
            false_at = middle
    return _float(true_at)


def near_range_end(ratio: float, ends: Iterable[float]) -> float | None:
    """Return the end of S's range within 1e-6 of a layer's ratio S_c / (gamma * S_s), or None."""
    return next((end for end in ends if abs(ratio - end) <= NEAR), None)


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    assert isinstance(bits, int)
    return bits


def _float(bits: int) -> float:
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    assert isinstance(value, float)
    return value
