"""The choice of whole numbers: those of the two grids whose values are nearest to a row.

The parities before a number leave four states. One pass over a row keeps the best path into each
state (Viterbi 1967; for source coding, Marcellin and Fischer 1990).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from klora_runtime.artifact.q.values import shifted

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]

#: Number of distances in memory at once, 4 bytes each.
_HELD = 2**23


def nearest(targets: torch.Tensor) -> torch.Tensor:
    """Return the whole numbers of each row whose values have the least squared distance to it.

    Args:
        targets: (rows, numbers), float32, in steps.

    Returns:
        (rows, numbers), int32: see :func:`klora_runtime.artifact.q.values.values_of`.
    """
    size = max(1, _HELD // (6 * targets.shape[1]))
    return torch.cat([_nearest(part) for part in torch.split(targets, size)])


def _nearest(targets: torch.Tensor) -> torch.Tensor:
    halves = (2 * targets).abs()
    parities = _best_parities(halves)
    second = shifted(parities)
    found = torch.empty_like(halves)
    for grid in (0, 1):
        for parity in (0, 1):
            mask = (second == grid) & (parities == parity)
            found[mask] = _point(halves[mask], grid, parity)
    return ((found + 1) / 2).floor_().mul_(targets.sign()).to(torch.int32)


def _point(halves: torch.Tensor, grid: int, parity: int) -> torch.Tensor:
    """Return the nearest value, in half steps, of a number with ``parity`` on ``grid``.

    ``halves`` >= 0. Modulo four half steps, the first grid has 0 for even and 2 for odd numbers;
    the second has 1 for odd and 3 for even numbers, and the value 0 itself.
    """
    offset = (2 * parity, 3 - 2 * parity)[grid]
    found = ((halves - offset) / 4).round_().clamp_min_(0).mul_(4).add_(offset)
    if grid == 1 and parity == 0:
        found.mul_(halves > (found - halves).abs())
    return found


def _best_parities(halves: torch.Tensor) -> torch.Tensor:
    """Return (rows, numbers) uint8: the parities on the cheapest path."""
    lost = [
        (_point(halves, grid, parity) - halves).square_().T
        for grid, parity in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    numbers, rows = lost[0].shape
    # The next state is (next grid, present grid). Two paths lead to it, from the states whose
    # second part is 0 and 1. The parity is the next grid, flipped by that second part.
    steps = torch.stack([*lost, *lost[:2]], 1).numpy()
    turned = _turns(
        steps[:, :4].reshape(numbers, 2, 2, rows), steps[:, 2:].reshape(numbers, 2, 2, rows)
    )
    return torch.from_numpy(turned)


def _turns(plain: _Floats, other: _Floats) -> _Bytes:
    """Walk all rows forwards, then trace the cheapest paths back.

    Args:
        plain: (numbers, 2, 2, rows): the cost of each next state from the states whose second part
            is 0.
        other: the same from the states whose second part is 1.

    Returns:
        (rows, numbers): the parities on the cheapest path.
    """
    numbers, rows = len(plain), plain.shape[-1]
    cost = np.full((2, 2, rows), np.inf, np.float32)
    cost[0, 0] = 0.0
    came = np.empty((numbers, 2, 2, rows), np.bool_)
    first, second = np.empty_like(cost), np.empty_like(cost)
    for number in range(numbers):
        np.add(cost[:, 0], plain[number], out=first)
        np.add(cost[:, 1], other[number], out=second)
        np.less(second, first, out=came[number])
        np.minimum(first, second, out=cost)
    state = cost.reshape(4, rows).argmin(0)
    parities = np.empty((numbers, rows), np.uint8)
    places = np.arange(rows)
    ways = came.reshape(numbers, 4 * rows)
    for number in range(numbers - 1, -1, -1):
        part = ways[number].take(state * rows + places)
        np.not_equal(state >= 2, part, out=parities[number].view(np.bool_))
        state = 2 * (state & 1) + part
    return np.ascontiguousarray(parities.T)
