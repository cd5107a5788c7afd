"""The compressed slots of a file: those that act are packed into one tensor, the rest into another.

`values` turns their numbers into whole numbers, and `bitstream` codes similar rows of all layers
together. This module is the room's entry; artifacts without compressed slots do not import it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch

from klora_runtime.artifact.delta import Delta, Dense, LowRank, Stored
from klora_runtime.artifact.document import Document
from klora_runtime.artifact.memory import empty
from klora_runtime.artifact.q.bitstream import Rows, pack, sizes, unpack
from klora_runtime.artifact.q.form import Quantised, matrices_of
from klora_runtime.artifact.q.values import CHANGED, indices_of, steps_of
from klora_runtime.errors import ArtifactError


@dataclass(frozen=True)
class PackedSlot:
    """The compressed delta of one slot of one entry, as the file's JSON describes it."""

    scale: float
    shape: tuple[int, ...]
    """Shape of the parameter."""
    dense: bool
    quantised: Quantised

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, numbers per row) of each stored matrix."""
        return matrices_of(self.shape, len(self.quantised.levels), dense=self.dense)

    @property
    def decoded_nbytes(self) -> int:
        """Bytes of the delta in float32."""
        return sum(4 * rows * numbers for rows, numbers in self.matrices)


def check_shape(stored: Stored, shape: tuple[int, ...]) -> None:
    """Check that a compressed delta has the rank and shape that its levels describe.

    Args:
        shape: shape of the parameter.

        Raises:
        ValueError: its rank or shape differs.
    """
    assert stored.quantised is not None
    dense = isinstance(stored.delta, Dense)
    expected = matrices_of(shape, len(stored.quantised.levels), dense=dense)
    if tuple(tuple(matrix.shape) for matrix in matrices(stored.delta)) != expected:
        raise ValueError(CHANGED)


def unpacked(
    document: Document, tensors: Mapping[str, torch.Tensor]
) -> dict[tuple[int, str], Stored]:
    """Decode the compressed deltas of a document's file that act.

    A tensor that holds only deltas that never act is decoded when one of them is first needed.

    Args:
        tensors: the file's tensors by name.

    Returns:
        (index of the entry, slot) -> its delta.

    Raises:
        ArtifactError: a tensor is damaged; only reading its bytes shows that. For deltas that never
            act, reading :attr:`Stored.delta` raises it.
    """
    found: dict[tuple[int, str], Stored] = {}
    for name, slots in _slots_by_tensor(document).items():
        packed = _Packed(name, tensors[name], list(slots.values()))
        if any(document.entries[index].timeline.uses(slot) for index, slot in slots):
            found.update(zip(slots, packed.stored(), strict=True))
            continue
        for place, (where, slot) in enumerate(slots.items()):
            decode = partial(packed.delta, place)
            found[where] = Stored.packed(
                slot.scale, slot.quantised, packed.data, slot.decoded_nbytes, decode
            )
    return found


class _Packed:
    """A tensor of compressed deltas, decoded at most once; threads may share it."""

    def __init__(self, name: str, data: torch.Tensor, slots: list[PackedSlot]) -> None:
        self.data = data
        self._name, self._slots = name, slots
        self._found: list[Stored] | None = None
        self._lock = Lock()

    def stored(self) -> list[Stored]:
        """Return all deltas, in packing order.

        Raises:
            ArtifactError: the tensor is damaged.
        """
        with self._lock:
            if self._found is None:
                try:
                    self._found = unpack_factors(self.data, self._slots)
                except ValueError as error:
                    raise ArtifactError(f"tensor {self._name} is damaged: {error}.") from error
            return self._found

    def delta(self, place: int) -> Delta:
        """Return one delta; see :meth:`stored`."""
        try:
            return self.stored()[place].delta
        except ArtifactError as error:
            raise ArtifactError(f"{error} Get the artifact again.") from error


def _slots_by_tensor(document: Document) -> dict[str, dict[tuple[int, str], PackedSlot]]:
    """Return name of a tensor -> (index of the entry, slot) -> packed slot, in packing order."""
    found: dict[str, dict[tuple[int, str], PackedSlot]] = defaultdict(dict)
    for index, entry in enumerate(document.entries):
        for name, slot in sorted(entry.factors.items()):
            if slot.quantised is not None:
                packed = PackedSlot(slot.scale, entry.shape, slot.kind == "dense", slot.quantised)
                found[slot.tensors["packed"].name][index, name] = packed
    return found


def pack_factors(stored: Sequence[Stored]) -> torch.Tensor:
    """Encode compressed deltas as bytes.

    Returns:
        (bytes,) uint8.

    Raises:
        ValueError: the numbers of a delta do not fit its compression.
    """
    return pack(*_grouped(stored))


def unpack_factors(packed: torch.Tensor, slots: Sequence[PackedSlot]) -> list[Stored]:
    """Decode deltas in float32, all in one block of memory on the device of the bytes.

    Args:
        packed: (bytes,) uint8.
        slots: the packed slots in packing order.

    Raises:
        ValueError: the bytes do not encode such numbers.
    """
    levels, steps = defaultdict[int, list[int]](list), defaultdict[int, list[float]](list)
    for slot in slots:
        own, step = slot.quantised.levels, slot.quantised.step
        for rows, length in slot.matrices:
            levels[length] += own * (rows // len(own))
            steps[length] += [step] * rows
    groups = [Rows(length, torch.tensor(levels[length])) for length in sorted(levels)]
    halves = [
        steps_of(torch.tensor(steps[rows.length], dtype=torch.float64), rows.levels) / 2
        for rows in groups
    ]
    counts = [len(rows.levels) * rows.length for rows in groups]
    flat = empty(sum(counts), torch.float32)
    values = [
        part.view(-1, rows.length)
        for part, rows in zip(torch.split(flat, counts), groups, strict=True)
    ]

    def use(group: int, rows: torch.Tensor, points: torch.Tensor) -> None:
        points *= halves[group][rows]
        values[group].index_copy_(0, rows, points)

    unpack(packed.cpu(), groups, use)
    there = torch.split(flat.to(packed.device), counts)
    by_length = {rows.length: part for rows, part in zip(groups, there, strict=True)}
    return _laid_out(by_length, slots)


def stored_sizes(stored: Sequence[Stored]) -> list[float]:
    """Return the bytes that each delta takes in the result of :func:`pack_factors`."""
    groups, indices = _grouped(stored)
    bits = {rows.length: size for rows, size in zip(groups, sizes(groups, indices), strict=True)}
    begins: dict[int, int] = defaultdict(int)
    found = []
    for each in stored:
        total = 0.0
        for matrix in matrices(each.delta):
            count, length = matrix.shape
            begin = begins[length]
            begins[length] = begin + count
            total += float(bits[length][begin : begin + count].sum())
        found.append(total / 8)
    return found


class _Groups:
    """Matrices grouped by the length of their rows, each group in order of arrival."""

    def __init__(self) -> None:
        self._parts: dict[int, list[torch.Tensor]] = defaultdict(list)

    def add(self, length: int, part: torch.Tensor) -> None:
        self._parts[length].append(part)

    def joined(self) -> list[torch.Tensor]:
        """Return the groups in ascending order of length."""
        return [torch.cat(self._parts[length]) for length in sorted(self._parts)]

    def rows(self) -> list[Rows]:
        """Return the groups of levels as :class:`Rows`, in ascending order of length."""
        return [Rows(n, own) for n, own in zip(sorted(self._parts), self.joined(), strict=True)]


def _grouped(stored: Sequence[Stored]) -> tuple[list[Rows], list[torch.Tensor]]:
    levels, indices = _Groups(), _Groups()
    for each in stored:
        assert each.quantised is not None
        for matrix in matrices(each.delta):
            own, steps = _of_rows(each.quantised, len(matrix))
            rows = Rows(matrix.shape[1], own)
            numbers = indices_of(matrix, steps, rows.large)
            if not rows.hold(numbers):
                raise ValueError(CHANGED)
            levels.add(matrix.shape[1], own)
            indices.add(matrix.shape[1], numbers)
    return levels.rows(), indices.joined()


def _of_rows(quantised: Quantised, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the level of each row of a matrix, (rows,), and its step, (rows, 1)."""
    levels = torch.tensor(quantised.levels)
    steps = steps_of(quantised.step, quantised.levels)
    return levels.expand(rows), steps.expand(rows, 1)


def matrices(delta: Delta) -> list[torch.Tensor]:
    """Return the stored matrices of one slot; see :func:`matrices_of`."""
    if isinstance(delta, Dense):
        values = delta.values.cpu()
        return [values.reshape(1 if values.dim() == 1 else len(values), -1)]
    return [delta.down.cpu().flatten(1), delta.up.cpu().flatten(1).T.contiguous()]


def _laid_out(values: Mapping[int, torch.Tensor], slots: Sequence[PackedSlot]) -> list[Stored]:
    """Return the delta of each slot as views of the rows, which are in the order of the slots.

    Args:
        values: length of rows -> the numbers of all such rows.
    """
    begins: dict[int, int] = defaultdict(int)

    def rows_of(count: int, length: int) -> torch.Tensor:
        begin = begins[length]
        begins[length] += count * length
        return values[length][begin : begins[length]].view(count, length)

    found = list[Stored]()
    for slot in slots:
        parts = [rows_of(*matrix) for matrix in slot.matrices]
        if slot.dense:
            found.append(Stored(slot.scale, Dense(parts[0].view(slot.shape)), slot.quantised))
            continue
        rank, (out, *inner) = len(slot.quantised.levels), slot.shape
        up = parts[1].T.view(out, rank, *(1 for _ in inner[1:]))
        found.append(Stored(slot.scale, LowRank(parts[0].view(rank, *inner), up), slot.quantised))
    return found
