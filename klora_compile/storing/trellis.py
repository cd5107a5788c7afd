"""The choice of whole numbers: those of the two grids whose values are nearest to a row.

The parities before a number leave four states: its grid, and the grid of the number before it. One
pass over a part of a row keeps the best path into each state (Viterbi 1967; for source coding,
Marcellin and Fischer 1990). All parts of one length go side by side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from klora_runtime.artifact.q.planes import PARTS, padded, part_of

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]

#: Parts that go side by side, so that what a step needs stays in the cache.
_SIDE_BY_SIDE = 4096


class Trellis:
    """Finds nearest points, in memory that is used again and again."""

    def __init__(self) -> None:
        self._came = np.empty(0, np.uint8)
        self._floats = np.empty(0, np.float32)

    def nearest(self, targets: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
        """Return the points of the grids that have the least squared distance to each row.

        Args:
            targets: (rows, numbers), float32, in half steps.
            large: (rows,), bool: rows of large numbers; see
                :func:`klora_runtime.artifact.q.values.values_of`.

        Returns:
            (rows, numbers), float32, whole numbers: values in half steps.
        """
        found = torch.empty_like(targets)
        part = part_of(targets.shape[1])
        for kind in (False, True):
            chosen = (large == kind).nonzero().flatten()
            for begin in range(0, len(chosen), _SIDE_BY_SIDE // PARTS):
                some = chosen[begin : begin + _SIDE_BY_SIDE // PARTS]
                sequences = padded(targets[some]).view(-1, part).T.contiguous().numpy()
                points = torch.from_numpy(self._points(sequences, kind))
                found[some] = points.T.reshape(len(some), PARTS * part)[:, : targets.shape[1]]
        return found

    def _points(self, targets: _Floats, large: bool) -> _Floats:
        """Return the nearest points of sequences, (numbers, sequences)."""
        numbers, count = targets.shape
        if self._came.size < numbers * 4 * count:
            self._came = np.empty(numbers * 4 * count, np.uint8)
            self._floats = np.empty(numbers * count, np.float32)
        came = self._came[: numbers * 4 * count].reshape(numbers, 2, 2, count)
        found = self._floats[: numbers * count].reshape(numbers, count)
        grid, before = _walk(targets, large, came)
        flags, halved = np.empty((4, count), np.uint8), np.empty((2, count), np.uint8)
        for number in range(numbers - 1, -1, -1):
            # The state after a number is the next grid and its own; `came` tells the one before it.
            ways = came[number]
            np.bitwise_xor(ways[:, 0], ways[:, 1], out=halved)
            np.bitwise_and(halved, before, out=halved)
            np.bitwise_xor(halved, ways[:, 0], out=halved)
            earlier, parity, other, _ = flags
            np.bitwise_xor(halved[0], halved[1], out=earlier)
            np.bitwise_and(earlier, grid, out=earlier)
            np.bitwise_xor(earlier, halved[0], out=earlier)
            np.bitwise_xor(grid, earlier, out=parity)
            _point(targets[number], before, parity, large, found[number])
            np.copyto(other, before)
            np.copyto(before, earlier)
            np.copyto(grid, other)
        return found


def _walk(targets: _Floats, large: bool, came: _Bytes) -> tuple[_Bytes, _Bytes]:
    """Walk all sequences forwards.

    Args:
        came: (numbers, 2, 2, sequences), is filled: whether the best path into the state (next
            grid, grid) comes from the state (grid, grid before) whose second part is 1.

    Returns:
        The best last state: next grid and grid, each (sequences,).
    """
    count = targets.shape[1]
    cost = np.full((2, 2, count), np.inf, np.float32)
    cost[0, 0] = 0.0
    lost = np.empty((2, 2, count), np.float32)  # parity, grid
    first, second = np.empty_like(lost), np.empty_like(lost)
    for number, target in enumerate(targets):
        _losses(target, large, lost)
        np.add(cost[:, 0], lost, out=first)
        np.add(cost[:, 1], lost[::-1], out=second)
        np.less(second, first, out=came[number].view(np.bool_))
        np.minimum(first, second, out=cost)
    state = cost.reshape(4, count).argmin(0).astype(np.uint8)
    return state >> 1, state & 1


def _losses(target: _Floats, large: bool, out: _Floats) -> None:
    """Write the squared distance to the nearest point of each parity and grid, in units of 16.

    The points of a parity and grid are 4 half steps apart. For large numbers the first one is 0, 2
    (first grid: even, odd), 1, 3 (second grid); for small ones it is 0, 2, 3, 1 on the side of the
    target, and zero itself is also an even number of the second grid.
    """
    even, odd = out
    quarter = np.multiply(target, 0.25)
    if not large:
        np.abs(quarter, out=quarter)
    rest = np.rint(quarter)
    np.subtract(quarter, rest, out=rest)
    np.abs(rest, out=even[0])
    np.subtract(0.5, even[0], out=odd[0])
    one, three = (even[1], odd[1]) if large else (odd[1], even[1])
    np.add(rest, 0.25, out=rest)
    np.abs(rest, out=rest)
    np.subtract(0.5, rest, out=one)
    np.abs(one, out=one)
    np.subtract(0.5, one, out=three)
    if not large:
        np.minimum(three, quarter, out=three)
    np.square(out, out=out)


def _point(target: _Floats, grid: _Bytes, parity: _Bytes, large: bool, out: _Floats) -> None:
    """Write the nearest points of given grids and parities."""
    if large:
        offset = (2 * parity + grid).astype(np.float32)
        np.subtract(target, offset, out=out)
        np.multiply(out, 0.25, out=out)
        np.rint(out, out=out)
        np.multiply(out, 4.0, out=out)
        np.add(out, offset, out=out)
        return
    size = np.abs(target)
    offset = (2 * (parity ^ grid) + grid).astype(np.float32)  # 0, 2; 3, 1
    np.subtract(size, offset, out=out)
    np.multiply(out, 0.25, out=out)
    np.rint(out, out=out)
    np.maximum(out, 0.0, out=out)
    np.multiply(out, 4.0, out=out)
    np.add(out, offset, out=out)
    near = (grid > parity) & (size < 1.5)  # of an even number of the second grid: 0 or 3
    out[near] = 0.0
    np.copysign(out, target, out=out)
