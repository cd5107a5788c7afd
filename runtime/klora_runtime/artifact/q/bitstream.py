"""Whole numbers as bytes (`FORMAT.md`, q): one Huffman code per class of similar rows.

The level and the length of a row determine how large its numbers are, so classes need not be
stored: rows of one *class*, a quarter of an octave wide, share a code. The lowest bits of large
numbers are nearly random; they are stored uncoded, and only the rest is coded.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from klora_runtime.artifact.q.form import MAX_CLASS, TOP_CLASS, class_offset
from klora_runtime.artifact.tensor_file import bytes_of, memory_of

_LENGTH_BYTES = 4

#: The positions of the bits in a byte.
_EIGHT = torch.arange(8, dtype=torch.uint8)

#: A selection of rows: (index of a group, (rows,) bool mask) for each group concerned.
_Where = list[tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Rows:
    """Rows of equal length that are coded together, in the order of the file."""

    length: int
    """Numbers per row, 1 or more."""
    levels: torch.Tensor
    """(rows,) int64."""

    @property
    def classes(self) -> torch.Tensor:
        """(rows,) int64: the class of each row."""
        return self.levels - class_offset(self.length)

    @property
    def bits(self) -> torch.Tensor:
        """(rows,) int64: how many lowest bits are stored uncoded."""
        return ((self.classes - TOP_CLASS + 3) // 4).clamp_min(0)

    @property
    def codes(self) -> torch.Tensor:
        """(rows,) int64: the class of the numbers without those bits."""
        return self.classes - 4 * self.bits

    @property
    def limits(self) -> torch.Tensor:
        """(rows,) int64: the numbers of a row are in [-limit, limit)."""
        return 128 << self.bits

    def hold(self, numbers: torch.Tensor) -> bool:
        """Return whether all numbers, (rows, length) int32, are within the limits."""
        limits = self.limits.unsqueeze(1)
        fit = (self.classes <= MAX_CLASS).unsqueeze(1) & (-limits <= numbers) & (numbers < limits)
        return bool(fit.all())


def pack(groups: Sequence[Rows], indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Encode numbers as bytes.

    Args:
        groups: groups of rows in ascending order of length.
        indices: for each group (rows, length), int32, within its limits.

    Returns:
        (bytes,) uint8.
    """
    parts = []
    for _, stream in _streams(groups, indices):
        parts += [len(stream).to_bytes(_LENGTH_BYTES, "little"), stream]
    for width, where in _alike(rows.bits for rows in groups):
        if width:
            chosen = [indices[index][mask] & (2**width - 1) for index, mask in where]
            parts.append(bytes_of(_pack_bits(_flat(chosen), width)))
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def unpack(packed: torch.Tensor, groups: Sequence[Rows]) -> list[torch.Tensor]:
    """Decode numbers from bytes.

    Args:
        packed: (bytes,) uint8, on the CPU.
        groups: groups of rows in ascending order of length.

    Returns:
        For each group (rows, length), int32.

    Raises:
        ValueError: the bytes do not encode such numbers.
    """
    spare = 0
    found = [torch.empty(len(rows.levels), rows.length, dtype=torch.int32) for rows in groups]
    data, begin = memory_of(packed), 0
    for _, where in _alike(rows.codes for rows in groups):
        end = begin + _LENGTH_BYTES
        begin = end + int.from_bytes(data[begin:end], "little")
        numbers = _inflated(data[end:begin], _count(groups, where))
        for (index, mask), part in zip(where, _cut(numbers, groups, where), strict=True):
            found[index][mask] = part.int()
    for width, where in _alike(rows.bits for rows in groups):
        if width:
            count = _count(groups, where)
            end, begin = begin, begin + -(-count * width // 8)
            if count * width % 8 and begin <= len(packed):
                spare |= int(packed[begin - 1]) >> count * width % 8
            numbers = _unpack_bits(packed[end:begin], width, count)
            for (index, mask), part in zip(where, _cut(numbers, groups, where), strict=True):
                found[index][mask] = found[index][mask] << width | part
    if begin != len(packed):
        raise ValueError(f"it has {len(packed)} bytes, its numbers need {begin}")
    if spare:
        raise ValueError("the bits after its numbers are not 0")
    return found


def sizes(groups: Sequence[Rows], indices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the size of each row in the result of :func:`pack`, in bits per number.

    Returns:
        For each group (rows,) float64.
    """
    found = [rows.bits.double() for rows in groups]
    for where, stream in _streams(groups, indices):
        mean = 8 * (len(stream) + _LENGTH_BYTES) / _count(groups, where)
        for index, mask in where:
            found[index][mask] += mean
    return found


def _streams(
    groups: Sequence[Rows], indices: Sequence[torch.Tensor]
) -> Iterator[tuple[_Where, bytes]]:
    """Yield, for each code in use, its rows and the deflated numbers without their lowest bits."""
    for _, where in _alike(rows.codes for rows in groups):
        chosen = [
            (indices[index][mask] >> groups[index].bits[mask].unsqueeze(1).int()).to(torch.int8)
            for index, mask in where
        ]
        yield where, _deflated(bytes_of(_flat(chosen)))


def _alike(values: Iterable[torch.Tensor]) -> list[tuple[int, _Where]]:
    """Return the distinct values in ascending order, each with the rows that have it."""
    found: dict[int, _Where] = defaultdict(list)
    for index, each in enumerate(values):
        for value in set(each.tolist()):
            found[value].append((index, each == value))
    return sorted(found.items())


def _flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def _count(groups: Sequence[Rows], where: _Where) -> int:
    """Return how many numbers the chosen rows have."""
    return sum(groups[index].length * int(mask.sum()) for index, mask in where)


def _cut(numbers: torch.Tensor, groups: Sequence[Rows], where: _Where) -> list[torch.Tensor]:
    """Invert :func:`_flat`: return (chosen rows, length) for each group that has chosen rows."""
    counts = [groups[index].length * int(mask.sum()) for index, mask in where]
    parts = zip(where, torch.split(numbers, counts), strict=True)
    return [part.reshape(-1, groups[index].length) for (index, _), part in parts]


def _deflated(raw: bytes) -> bytes:
    """Return a raw deflate stream that uses Huffman codes only."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(raw) + coder.flush()


def _inflated(stream: memoryview, count: int) -> torch.Tensor:
    """Inflate a stream to (count,) int8.

    Raises:
        ValueError: the stream is damaged or has another length.
    """
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw = coder.decompress(stream, count + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != count or not coder.eof or coder.unused_data:
        raise ValueError(f"a stream in it is not one of {count} numbers")
    return torch.frombuffer(bytearray(raw), dtype=torch.int8)


def _pack_bits(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Pack (numbers,) int32 in [0, 2^width) into bytes, lowest bit first."""
    bits = ((codes.unsqueeze(1) >> torch.arange(width, dtype=torch.int32)) & 1).flatten()
    padded = torch.zeros(-(-len(bits) // 8), 8, dtype=torch.uint8)
    padded.view(-1)[: len(bits)] = bits
    return (padded << _EIGHT).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: torch.Tensor, width: int, numbers: int) -> torch.Tensor:
    """Invert :func:`_pack_bits`; missing bytes count as 0."""
    padded = torch.zeros(-(-numbers * width // 8), dtype=torch.uint8)
    padded[: len(packed)] = packed
    bits = ((padded.unsqueeze(1) >> _EIGHT) & 1).flatten()[: numbers * width]
    bits = bits.reshape(numbers, width)
    found = bits[:, 0].int()
    for place in range(1, width):
        found |= bits[:, place].int() << place
    return found
