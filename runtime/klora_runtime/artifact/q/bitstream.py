"""Whole numbers as bytes (`FORMAT.md`, q): one Huffman code per class of similar rows.

The level and the length of a row determine how large its numbers are, so classes need not be
stored: rows of one *class*, a quarter of an octave wide, share a code. The lowest bits of large
numbers are nearly random; they are stored uncoded in planes (`planes`), and only the rest is coded,
two numbers in one symbol. The few numbers that are too large for that have an extra term.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch

from klora_runtime.artifact.memory import empty
from klora_runtime.artifact.q.decoding import Decoder
from klora_runtime.artifact.q.extras import MOST_PLACES, Extras
from klora_runtime.artifact.q.form import MAX_CLASS, MOST, TOP_CLASS, class_offset, width_of
from klora_runtime.artifact.q.planes import (
    PARTS,
    packed_plane,
    padded,
    part_of,
    plane_widths,
    second_grid,
)
from klora_runtime.artifact.tensor_file import bytes_of, memory_of

_LENGTH_BYTES = 4

#: Bytes that a deflate stream holds; the last of a code holds the rest.
_BLOCK = 2**17

#: Numbers that are decoded at a time, at least one row, so that they stay in the cache.
_TOGETHER = 2**19

#: Takes the index of a group; (rows,) int64, some of its rows; and (rows, length) float32, their
#: values in half steps, which it may change and must not keep.
Use = Callable[[int, torch.Tensor, torch.Tensor], object]


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
        return ((self.classes - TOP_CLASS + 3) // 4).clamp_min(0)  # see width_of

    @property
    def large(self) -> torch.Tensor:
        """(rows,) bool: which rows have lowest bits that are stored uncoded."""
        return self.classes > TOP_CLASS

    @property
    def known(self) -> bool:
        """Whether the format has the classes of all rows."""
        return bool((self.classes <= MAX_CLASS).all())

    def hold(self, numbers: torch.Tensor) -> bool:
        """Return whether the format has codes for the rows and numbers, (rows, length) int32."""
        return self.known and (not numbers.numel() or int(numbers.abs().max()) <= MOST)


@dataclass(frozen=True)
class _Alike:
    """Rows of one length and one class."""

    group: int
    """Index of their :class:`Rows`."""
    length: int
    rows: torch.Tensor
    """(rows,) int64: which ones."""
    width: int
    """How many lowest bits of their numbers are stored uncoded."""
    code: int
    """The class of their numbers without those bits."""

    @property
    def padded(self) -> int:
        """Numbers of a row with its padding."""
        return PARTS * part_of(self.length)

    @property
    def pairs(self) -> int:
        """Bytes of their coded bits."""
        return len(self.rows) * self.padded // 2

    @property
    def together(self) -> int:
        """How many rows are decoded at a time."""
        return min(len(self.rows), max(1, _TOGETHER // self.padded))

    def planes(self) -> list[tuple[int, int]]:
        """Return (bits, bytes) of each plane."""
        whole = len(self.rows) * part_of(self.length)
        return [(bits, bits * whole) for bits in plane_widths(self.width)]


def pack(groups: Sequence[Rows], indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Encode numbers as bytes.

    Args:
        groups: groups of rows in ascending order of length.
        indices: for each group (rows, length), int32; see :meth:`Rows.hold`.

    Returns:
        (bytes,) uint8.

    Raises:
        ValueError: there are too many numbers.
    """
    streams, planes, extras, first = list[bytes](), list[bytes](), list[Extras](), 0
    for _, same in groupby(_divided(groups), key=lambda alike: alike.code):
        coded = []
        for alike in same:
            numbers = padded(indices[alike.group][alike.rows])
            extra = Extras.of(numbers, alike.width, first)
            first += numbers.numel()
            numbers = extra.removed(numbers)
            extras.append(extra)
            coded.append(packed_plane(numbers >> alike.width, 4).flatten())
            for bits in plane_widths(alike.width):
                planes.append(bytes_of(packed_plane(numbers, bits)))
                numbers = numbers >> bits
        streams += _deflated(bytes_of(torch.cat(coded)))
    if first > MOST_PLACES:
        raise ValueError("compressed factors have more than 2^32 numbers; do not compress them")
    lengths = [
        part for one in streams for part in (len(one).to_bytes(_LENGTH_BYTES, "little"), one)
    ]
    data = b"".join((*lengths, *planes, Extras.bytes_of(extras)))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def unpack(packed: torch.Tensor, groups: Sequence[Rows], use: Use) -> None:
    """Decode numbers from bytes, some rows at a time.

    Args:
        packed: (bytes,) uint8, on the CPU.
        groups: groups of rows in ascending order of length.
        use: takes what was decoded.

    Raises:
        ValueError: the bytes do not encode such numbers.
    """
    divided = _divided(groups)
    coded, begin = _inflate_all(packed, divided)
    ends = list(
        accumulate((size for alike in divided for _, size in alike.planes()), initial=begin)
    )
    extras = Extras.read(packed, ends[-1], 2 * len(coded))
    places, first = iter(pairwise(ends)), 0
    decoder = Decoder(max((alike.together * alike.padded for alike in divided), default=0))
    for alike in divided:
        high = coded[first // 2 : first // 2 + alike.pairs].view(len(alike.rows), -1)
        planes = [packed[slice(*next(places))].view(len(alike.rows), -1) for _ in alike.planes()]
        grids = second_grid(planes[0]) if planes else None
        for begin in range(0, len(alike.rows), alike.together):
            some = slice(begin, begin + alike.together)
            part = high[some]
            terms = extras.terms_of(first, 2 * part.numel())
            if grids is None:
                points = decoder.small(part, None if terms is None else terms.dense(part))
            else:
                points = decoder.large(
                    part, grids[some], [own[some] for own in planes], alike.width
                )
                if terms is not None:
                    terms.add_to(points, alike.width)
            if terms is not None:
                terms.check(points, alike.width)
            if alike.padded > alike.length and bool((points[:, alike.length :] // 2).any()):
                raise ValueError("the numbers after a row's last one are not 0")
            first += points.numel()
            use(alike.group, alike.rows[some], points[:, : alike.length])


def _inflate_all(packed: torch.Tensor, divided: Sequence[_Alike]) -> tuple[torch.Tensor, int]:
    """Return the coded bits of all rows, (bytes,) uint8, and the place after their streams."""
    data, begin = memory_of(packed), 0
    coded = empty(sum(alike.pairs for alike in divided), torch.uint8)
    memory, filled = memory_of(coded), 0
    for _, same in groupby(divided, key=lambda alike: alike.code):
        left = sum(alike.pairs for alike in same)
        while left:
            count = min(left, _BLOCK)
            end = begin + _LENGTH_BYTES
            begin = end + int.from_bytes(data[begin:end], "little")
            memory[filled : filled + count] = _inflated(data[end:begin], count)
            filled, left = filled + count, left - count
    return coded, begin


def sizes(groups: Sequence[Rows], indices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the size of each row in the result of :func:`pack`, in bits.

    Returns:
        For each group (rows,) float64.
    """
    found = [torch.zeros(len(rows.levels), dtype=torch.float64) for rows in groups]
    for _, alikes in groupby(_divided(groups), key=lambda alike: alike.code):
        same = list(alikes)
        coded = []
        for alike in same:
            numbers = padded(indices[alike.group][alike.rows])
            extra = Extras.of(numbers, alike.width, 0)
            whole = PARTS * part_of(alike.length)
            found[alike.group][alike.rows] += alike.width * whole + extra.bits(len(numbers), whole)
            coded.append(packed_plane(extra.removed(numbers) >> alike.width, 4).flatten())
        streams = _deflated(bytes_of(torch.cat(coded)))
        mean = 8 * sum(len(one) + _LENGTH_BYTES for one in streams) / sum(map(len, coded))
        for alike in same:
            found[alike.group][alike.rows] += mean * alike.pairs / len(alike.rows)
    return found


def _divided(groups: Sequence[Rows]) -> list[_Alike]:
    """Return the rows of each class and length, in the order of the file."""
    found = []
    for index, rows in enumerate(groups):
        classes, order = torch.sort(rows.classes, stable=True)
        own, counts = torch.unique_consecutive(classes, return_counts=True)
        parts = torch.split(order, counts.tolist())
        for number, places in zip(own.tolist(), parts, strict=True):
            width = width_of(number)
            found.append(_Alike(index, rows.length, places, width, number - 4 * width))
    return sorted(found, key=lambda alike: (alike.code, alike.width, alike.length))


def _deflated(raw: bytes) -> list[bytes]:
    """Return raw deflate streams that use Huffman codes only, one per block."""
    found = []
    for begin in range(0, len(raw), _BLOCK):
        coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        found.append(coder.compress(raw[begin : begin + _BLOCK]) + coder.flush())
    return found


def _inflated(stream: memoryview, count: int) -> bytes:
    """Inflate a stream to ``count`` bytes.

    Raises:
        ValueError: the stream is damaged or has another length.
    """
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw = coder.decompress(stream, count + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != count or not coder.eof or coder.unused_data:
        raise ValueError(f"a stream in it is not one of {2 * count} numbers")
    return raw
