"""Quantisation of factors to whole numbers (`FORMAT.md`, q).

A slot is a list of *rows*: one per rank of down, then one per rank of up (transposed), or the rows
of a dense delta. Each row has a *level*, which gives its step and the class of its code
(`bitstream`). The value of a number depends on the parities before it in its row: they choose one
of two grids that are half a step apart. Together, the grids of all dimensions pack points more
densely than any grid of a single dimension with the same distance of points. This is *trellis-coded
quantisation* (Marcellin and Fischer 1990), in the form of VVC's dependent quantisation (Schwarz et
al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: The error text for factors that differ from the values of their numbers.
CHANGED = "compressed factors were changed; compress them again"

#: Numbers that are computed at a time, so that intermediate results stay in the cache.
_IN_CACHE = 2**15

#: 2^(-i / 8): a level is an eighth of an octave of steps. Literals, so that all machines use the
#: same values.
_EIGHTHS = torch.tensor(
    [
        *(1.0, 0.9170040432046712, 0.8408964152537145, 0.7711054127039704),
        *(0.7071067811865476, 0.6484197773255048, 0.5946035575013605, 0.5452538663326288),
    ],
    dtype=torch.float64,
)


def steps_of(step: float, levels: Sequence[int]) -> torch.Tensor:
    """Return the step at each level: step * 2^(-level / 8).

    Returns:
        (levels, 1), float32.
    """
    whole = torch.tensor(levels, dtype=torch.int64)
    exact = step * torch.ldexp(_EIGHTHS[whole % 8], -(whole // 8))
    return exact.float().unsqueeze(1)


def shifted(parities: torch.Tensor) -> torch.Tensor:
    """Return which numbers are on the second grid.

    A number is on the second grid if, among every second number before it in its row, starting with
    its neighbour, an odd number of them are odd.

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
    """Return the values of stored numbers.

    The first grid has all multiples of the step. The second grid has zero, and the other multiples
    moved half a step towards zero.

    Args:
        indices: (rows, numbers), int32, within ±2^22.
        steps: (rows, 1), float32.

    Returns:
        (rows, numbers), float32: whole multiples, below 2^24, of half the step.
    """
    found = torch.empty(indices.shape, device=indices.device)
    size = max(1, _IN_CACHE // indices.shape[1])
    parts = (torch.split(tensor, size) for tensor in (indices, steps / 2, found))
    for some, half, values in zip(*parts, strict=True):
        second = shifted((some & 1).to(torch.uint8))
        torch.mul(2 * some - second * some.sign(), half, out=values)
    return found


def indices_of(values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Invert :func:`values_of`.

    Raises:
        ValueError: some values are on neither grid.
    """
    halves = (values.double() / (steps.double() / 2)).round_()
    indices = ((halves.abs() + 1) / 2).floor_().mul_(halves.sign()).to(torch.int32)
    if not torch.equal(values_of(indices, steps), values):
        raise ValueError(CHANGED)
    return indices
