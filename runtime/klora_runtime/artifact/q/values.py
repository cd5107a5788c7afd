"""Whole numbers for real ones: how factors lie in an artifact that was compressed (`FORMAT.md`, q).

A slot is a handful of *rows*: one per rank of down, then one per rank of up, turned; of a dense
delta its rows. Each has a *level*, which gives both its step and the class of numbers that it is
coded with (`bitstream`). What a number stands for depends on the parities before it in its row: of
two grids that lie half a step apart they choose one. So the grids in all dimensions together are
denser, at the same distance of points, than any grid in one: *trellis-coded quantisation*
(Marcellin and Fischer 1990), in the form of VVC's dependent quantisation (Schwarz et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: What is wrong with factors that are not what their numbers stand for.
CHANGED = "compressed factors were changed; compress them again"

#: Numbers that are computed at a time: what is made of them on the way stays in the cache.
_IN_CACHE = 2**15

#: 2^(-i / 8): levels are eighths of an octave of steps. As literals, for every machine to have the
#: same.
_EIGHTHS = torch.tensor(
    [
        *(1.0, 0.9170040432046712, 0.8408964152537145, 0.7711054127039704),
        *(0.7071067811865476, 0.6484197773255048, 0.5946035575013605, 0.5452538663326288),
    ],
    dtype=torch.float64,
)


def steps_of(step: float, levels: Sequence[int]) -> torch.Tensor:
    """The step at each level: step * 2^(-level / 8).

    Returns:
        (levels, 1), float32.
    """
    whole = torch.tensor(levels, dtype=torch.int64)
    exact = step * torch.ldexp(_EIGHTHS[whole % 8], -(whole // 8))
    return exact.float().unsqueeze(1)


def shifted(parities: torch.Tensor) -> torch.Tensor:
    """Which numbers lie on the second grid.

    Of the numbers before one, every second counts, from the nearest on: where an odd number of
    those is odd, the second grid holds.

    Args:
        parities: (rows, numbers), uint8, 0 or 1.

    Returns:
        (rows, numbers), uint8, 0 or 1.
    """
    found = torch.zeros_like(parities)
    for first in (0, 1):
        later = found[:, first + 1 :: 2]
        before = parities[:, first::2][:, : later.shape[1]]
        later.copy_(torch.cumsum(before, 1, dtype=torch.uint8) & 1)
    return found


def values_of(indices: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """What stored numbers stand for: on the first grid all multiples of the step; on the second
    zero, and those half a step nearer to it.

    Args:
        indices: (rows, numbers), int32, within ±2^22.
        steps: (rows, 1), float32.

    Returns:
        (rows, numbers), float32: a whole number, below 2^24, of half steps, times that half step.
    """
    found = torch.empty(indices.shape, device=indices.device)
    size = max(1, _IN_CACHE // indices.shape[1])
    parts = (torch.split(tensor, size) for tensor in (indices, steps / 2, found))
    for some, half, values in zip(*parts, strict=True):
        second = shifted((some & 1).to(torch.uint8))
        torch.mul(2 * some - second * some.sign(), half, out=values)
    return found


def indices_of(values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`values_of`.

    Raises:
        ValueError: the values are not what numbers stand for.
    """
    halves = (values.double() / (steps.double() / 2)).round_()
    indices = ((halves.abs() + 1) / 2).floor_().mul_(halves.sign()).to(torch.int32)
    if not torch.equal(values_of(indices, steps), values):
        raise ValueError(CHANGED)
    return indices
