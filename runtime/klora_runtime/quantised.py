"""Numbers of few bits: how factors lie in an artifact that was compressed (`FORMAT.md`, q).

A slot is a handful of *vectors*: one per rank for factors (a row of down, then a column of up), one
for a dense delta. Each has a width of its own, so that what matters less takes fewer bits. Every
64 numbers share a scale. A number is scale * an odd whole number; the product is exact in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

#: How many numbers share one scale.
BLOCK = 64

#: The most bits of a number: with those of a scale they fit into float32.
MAX_WIDTH = 15


@dataclass(frozen=True)
class Quantised:
    """How the numbers of one slot of one entry are stored."""

    widths: tuple[int, ...]
    """Bits per number of each vector, 1 to 15, none above the one before."""
    packed: torch.Tensor
    """(bytes,) uint8: the scales in bfloat16, then the numbers without gaps; see `FORMAT.md`."""
    error: float
    """What the compiler lost: relative Frobenius error of the delta, 0 to 1, float64."""


@dataclass(frozen=True)
class Vectors:
    """The size of the vectors of one slot.

    Args:
        parts: numbers of each part of a vector, the inputs and the outputs of factors; a block
            never spans two parts.
    """

    parts: tuple[int, ...]

    @property
    def length(self) -> int:
        """Numbers of a vector."""
        return sum(self.parts)

    @property
    def blocks(self) -> int:
        """Scales of a vector."""
        return sum(-(-part // BLOCK) for part in self.parts)

    def nbytes(self, widths: Sequence[int]) -> int:
        """Bytes of vectors of these widths, scales included."""
        numbers = sum(-(-self.length * count * width // 8) for width, count in _runs(widths))
        return 2 * self.blocks * len(widths) + numbers

    def block_of(self) -> torch.Tensor:
        """(length,) int64: the block of each number."""
        ends, begin = [], 0
        for part in self.parts:
            ends.append(begin + torch.arange(part) // BLOCK)
            begin += -(-part // BLOCK)
        return torch.cat(ends)


def pack(
    odds: torch.Tensor, scales: torch.Tensor, widths: Sequence[int], vectors: Vectors
) -> torch.Tensor:
    """Vectors as bytes.

    Args:
        odds: (len(widths), vectors.length), integers: odd numbers of [-(2^w - 1), 2^w - 1].
        scales: (len(widths), vectors.blocks), bfloat16.
        widths: see :attr:`Quantised.widths`.

    Returns:
        (bytes,) uint8.
    """
    parts, begin = [scales.contiguous().view(torch.uint8).flatten()], 0
    for width, count in _runs(widths):
        codes = (odds[begin : begin + count] + (2**width - 1)) // 2
        parts.append(_pack_bits(codes.flatten().to(torch.int32), width))
        begin += count
    assert sum(map(len, parts)) == vectors.nbytes(widths)
    return torch.cat(parts)


def unpack(packed: torch.Tensor, widths: Sequence[int], vectors: Vectors) -> torch.Tensor:
    """Bytes as vectors.

    Args:
        packed: as :func:`pack` gives them, of ``vectors.nbytes(widths)`` bytes.

    Returns:
        (len(widths), vectors.length), float32; NaN or infinity only where a scale is.
    """
    begin = 2 * len(widths) * vectors.blocks
    scales = packed[:begin].clone().view(torch.bfloat16).reshape(len(widths), -1)
    rows = []
    for width, count in _runs(widths):
        numbers = count * vectors.length
        size = -(-numbers * width // 8)
        codes = _unpack_bits(packed[begin : begin + size], width, numbers)
        rows.append((2 * codes - (2**width - 1)).reshape(count, -1))
        begin += size
    return torch.cat(rows).float().mul_(scales.float()[:, vectors.block_of()])


def _runs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours of one width: (width, how many)."""
    return [(width, sum(1 for _ in same)) for width, same in groupby(widths)]


def _places(width: int) -> list[tuple[int, int]]:
    """(byte, bit in it) at which each of the eight numbers of ``width`` bytes begins."""
    return [divmod(index * width, 8) for index in range(8)]


def _pack_bits(codes: torch.Tensor, width: int) -> torch.Tensor:
    """(numbers,) int32 of [0, 2^width) as bytes, the lowest bit first."""
    groups = -(-len(codes) // 8)
    padded = codes.new_zeros(groups * 8)
    padded[: len(codes)] = codes
    eights = padded.reshape(groups, 8).T
    found = codes.new_zeros(width, groups)
    for number, (first, bit) in enumerate(_places(width)):
        for byte in range(first, -(-(8 * first + bit + width) // 8)):
            found[byte] |= ((eights[number] << bit) >> 8 * (byte - first)) & 255
    return found.T.to(torch.uint8).flatten()[: -(-len(codes) * width // 8)]


def _unpack_bits(packed: torch.Tensor, width: int, numbers: int) -> torch.Tensor:
    """The inverse of :func:`_pack_bits`."""
    groups = -(-numbers // 8)
    padded = packed.new_zeros(groups * width)
    padded[: len(packed)] = packed
    held = packed.new_zeros(width + 2, groups, dtype=torch.int32)  # a number spans three bytes
    held[:width] = padded.reshape(groups, width).T
    places = torch.tensor(_places(width), dtype=torch.int32, device=packed.device)
    first, bit = places[:, 0], places[:, 1].unsqueeze(1)
    found = held[first]
    for further in range(1, 2 if width < 10 else 3):
        found |= held[first + further] << 8 * further
    found = (found >> bit).bitwise_and_(2**width - 1)
    return found.T.flatten()[:numbers]
