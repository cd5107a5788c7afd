"""Bits of whole numbers in bytes, so that whole tensors of bytes are taken apart at once.

A row of n numbers is cut into eight *parts* of ceil(n / 8) numbers; the last ones may lack
numbers, which are then 0. A *plane* of b bits (1, 2 or 4) holds b bits of each number: a byte takes
them from 8 / b numbers that lie b parts apart, the first in its lowest bits.
"""

from __future__ import annotations

import torch

#: Parts of a row.
PARTS = 8


def part_of(length: int) -> int:
    """Return the numbers of a part of a row of ``length`` numbers."""
    return -(-length // PARTS)


def padded(numbers: torch.Tensor) -> torch.Tensor:
    """Return rows of numbers with zeros up to whole parts: (rows, 8 part)."""
    rows, length = numbers.shape
    if length % PARTS == 0:
        return numbers.contiguous()
    found = numbers.new_zeros(rows, PARTS * part_of(length))
    found[:, :length] = numbers
    return found


def plane_widths(width: int) -> list[int]:
    """Return the bits of the planes that hold ``width`` low bits, from the lowest bit on.

    The lowest bit has a plane of its own, because it decides on the grids.
    """
    rest = width - 1
    singles = [1] * (width > 0) + [1] * (rest > 0 and rest % 2) + [2] * (rest > 0 and rest // 2 % 2)
    return singles + [4] * max(0, rest // 4)


def packed_plane(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the plane of the lowest ``bits`` bits.

    Args:
        numbers: (rows, 8 part) integers.
        bits: 1, 2 or 4.

    Returns:
        (rows, bits * part) uint8.
    """
    rows, count = numbers.shape
    low = (numbers.to(torch.uint8) & (2**bits - 1)).view(rows, PARTS // bits, bits * count // PARTS)
    found: torch.Tensor = low[:, 0].clone()
    for place in range(1, PARTS // bits):
        found |= low[:, place] << (place * bits)
    return found


def second_grid(parities: torch.Tensor) -> torch.Tensor:
    """Return which numbers are on the second grid, for all bits of the bytes at once.

    A number is on the second grid if, among every second number before it in its part, starting
    with its neighbour, an odd number of them are odd.

    Args:
        parities: (..., part), uint8: each bit is the parity of a number of another sequence.

    Returns:
        (..., part), uint8: each bit is 1 on the second grid.
    """
    part = parities.shape[-1]
    found = torch.zeros_like(parities)
    found[..., 1:] = parities[..., :-1]
    other = torch.empty_like(found)
    reach = 2
    while reach < part:  # each round doubles how many numbers before are counted
        other[..., :reach] = found[..., :reach]
        torch.bitwise_xor(found[..., reach:], found[..., :-reach], out=other[..., reach:])
        found, other = other, found
        reach *= 2
    return found
