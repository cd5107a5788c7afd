"""Numbers from their coded bits and planes, in memory that is used again and again.

Fresh memory costs more than the arithmetic here: the system has to clear each page of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klora_runtime.artifact.q.planes import PARTS, plane_widths, second_grid

#: Shifts of the numbers that share a byte, by bits per number.
_SHIFTS = {
    bits: torch.arange(0, PARTS, bits, dtype=torch.uint8).view(1, -1, 1) for bits in (1, 2, 4)
}


class Decoder:
    """Decodes rows of numbers; what it returns is valid until it decodes the next ones.

    Args:
        most: most numbers at a time, padding included.
    """

    def __init__(self, most: int) -> None:
        self._bytes = torch.empty(2, most, dtype=torch.uint8)
        self._floats = torch.empty(2, most)

    def large(
        self, high: torch.Tensor, grids: torch.Tensor, planes: Sequence[torch.Tensor], width: int
    ) -> torch.Tensor:
        """Return the values, in half steps, of numbers with a width above 0: 2 q + g.

        Args:
            high: (rows, 4 part) uint8, the coded bits.
            grids: (rows, part) uint8, which numbers are on the second grid.
            planes: the planes of the lowest ``width`` bits; see :func:`plane_widths`.
            width: how many lowest bits are in planes.

        Returns:
            (rows, 8 part), float32.
        """
        shape, half = (len(high), 2 * high.shape[1]), high.shape[1]
        low, own = (each[: shape[0] * shape[1]].view(shape) for each in self._bytes)
        found, added = (each[: shape[0] * shape[1]].view(shape) for each in self._floats)
        _unpack(grids, 1, low)
        bits, whole = 1, list[torch.Tensor]()
        for plane, count in zip(planes, plane_widths(width), strict=True):
            if count == 4:
                whole.append(plane)
                continue
            _unpack(plane, count, own)
            low.add_(own, alpha=2**bits)
            bits += count
        torch.bitwise_left_shift(high, 4, out=own[:, :half])
        torch.bitwise_and(high, 0xF0, out=own[:, half:])
        factor = 2**bits
        if whole:
            plane = whole.pop()
            own[:, :half] |= plane & 15
            own[:, half:] |= plane >> 4
        else:
            factor /= 16
        found.copy_(own.view(torch.int8))
        for plane in reversed(whole):
            _unpack(plane, 4, own)
            torch.add(added.copy_(own), found, alpha=16, out=found)
        return torch.add(added.copy_(low), found, alpha=factor, out=found)

    def small(self, high: torch.Tensor, terms: torch.Tensor | None) -> torch.Tensor:
        """Return the values, in half steps, of numbers without planes: 2 q - g sign(q).

        Args:
            high: (rows, 4 part) uint8, the numbers.
            terms: (rows, 8 part) int32, even numbers to be added; None for zeros.

        Returns:
            (rows, 8 part), float32.
        """
        shape = len(high), 2 * high.shape[1]
        found = self._floats[0, : shape[0] * shape[1]].view(shape)
        grids = second_grid((high & 0x11).view(len(high), 4, -1)).view(len(high), -1)
        second = torch.cat([grids & 1, grids >> 4], 1).view(torch.int8)
        numbers = torch.cat([high << 4, high & 0xF0], 1).view(torch.int8) >> 4
        if terms is not None:
            numbers = numbers + terms
        return found.copy_(2 * numbers - second * numbers.sign())


def _unpack(plane: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Write the ``bits`` bits of each number, (rows, 8 part) uint8."""
    parts = out.view(len(out), PARTS // bits, -1)
    torch.bitwise_right_shift(plane.unsqueeze(1), _SHIFTS[bits], out=parts)
    out &= 2**bits - 1
