"""Quantisation of factors to whole numbers (`FORMAT.md`, q).

A slot is a list of *rows*: one per rank of down, then one per rank of up (transposed), or the rows
of a dense delta. Each row has a *level*, which gives its step and the class of its code
(`bitstream`), and is cut into eight parts. The value of a number depends on the parities before it
in its part: they choose one of two grids that are half a step apart. Together, the grids of all
dimensions pack points more densely than any grid of a single dimension with the same distance of
points. This is *trellis-coded quantisation* (Marcellin and Fischer 1990), in the form of VVC's
dependent quantisation (Schwarz et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klora_runtime.artifact.q.form import MOST
from klora_runtime.artifact.q.planes import PARTS, padded, second_grid

#: The error text for factors that differ from the values of their numbers.
CHANGED = "compressed factors were changed; compress them again"

#: Numbers that are computed at a time, so that intermediate results stay in the cache.
_IN_CACHE = 2**17

#: 2^(-i / 8): a level is an eighth of an octave of steps. Literals, so that all machines use the
#: same values.
_EIGHTHS = torch.tensor(
    [
        *(1.0, 0.9170040432046712, 0.8408964152537145, 0.7711054127039704),
        *(0.7071067811865476, 0.6484197773255048, 0.5946035575013605, 0.5452538663326288),
    ],
    dtype=torch.float64,
)


def steps_of(step: torch.Tensor | float, levels: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Return the step at each level: step * 2^(-level / 8).

    Args:
        step: the step at level 0 of all rows, or (rows,) float64.
        levels: (rows,) int64.

    Returns:
        (rows, 1), float32.
    """
    whole = torch.as_tensor(levels, dtype=torch.int64)
    exact = step * torch.ldexp(_EIGHTHS[whole % 8], -(whole // 8))
    return exact.float().unsqueeze(1)


def shifted(parities: torch.Tensor) -> torch.Tensor:
    """Return which numbers of rows are on the second grid.

    Args:
        parities: (rows, numbers), uint8, 0 or 1.

    Returns:
        (rows, numbers), uint8, 0 or 1.
    """
    whole = padded(parities)
    found = second_grid(whole.view(len(whole), PARTS, -1)).view(whole.shape)
    return found[:, : parities.shape[1]]


def values_of(indices: torch.Tensor, steps: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
    """Return the values of stored numbers q, in half steps 2 q + g or 2 q - g sign(q).

    The first grid has all multiples of the step. The second grid has those moved by half a step: of
    large numbers all of them up; of small numbers, where zeros save bits, all but zero, towards it.

    Args:
        indices: (rows, numbers), int32, within ±2^22.
        steps: (rows, 1), float32.
        large: (rows,), bool: the rows of large numbers, those with a width above 0.

    Returns:
        (rows, numbers), float32: whole multiples, within ±2^23, of half the step.
    """
    found = torch.empty(indices.shape, device=indices.device)
    size = max(1, _IN_CACHE // indices.shape[1])
    parts = (torch.split(tensor, size) for tensor in (indices, steps / 2, large, found))
    for some, half, many, values in zip(*parts, strict=True):
        second = shifted((some & 1).to(torch.uint8))
        moves = torch.where(many.unsqueeze(1), 1, -some.sign())
        torch.mul(2 * some + moves.mul_(second), half, out=values)
    return found


def indices_of(values: torch.Tensor, steps: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
    """Invert :func:`values_of`.

    Raises:
        ValueError: some values are on neither grid.
    """
    found = torch.empty(values.shape, dtype=torch.int32)
    size = max(1, _IN_CACHE // values.shape[1])
    parts = (torch.split(tensor, size) for tensor in (values, steps / 2, large, found))
    for some, half, many, indices in zip(*parts, strict=True):
        halves = (some / half).round_()
        if not torch.equal(halves * half, some):  # float32 rounds the quotient of large numbers
            halves = (some.double() / half.double()).round_()
            if not torch.equal(halves.float() * half, some):
                raise ValueError(CHANGED)
        if not float(halves.abs().max()) <= 2 * MOST + 1:  # NaN as well
            raise ValueError(CHANGED)
        exact = halves.int()
        torch.bitwise_right_shift(exact, 1, out=indices)
        if not bool(many.all()):
            away = (exact.abs() + 1 >> 1) * exact.sign()
            indices.copy_(torch.where(many.unsqueeze(1), indices, away))
        second = shifted(indices.to(torch.uint8) & 1)
        shows = (exact.to(torch.uint8) & 1) == second
        if not bool((shows if bool(many.all()) else shows | (exact == 0)).all()):
            raise ValueError(CHANGED)
    return found
