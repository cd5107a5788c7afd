"""The loss of a compressed fusion, from the fusion or its file alone.

What needs the numbers themselves is known of a fusion in memory only, and None of a document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.artifact.document import Document, SlotInFile
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.q.form import matrices_of
from klora_runtime.artifact.schedule import ScheduledEntry
from klora_runtime.errors import shown


@dataclass(frozen=True)
class Compression:
    """The result of compression; errors are relative Frobenius errors of deltas, 0 to 1."""

    slots: int
    """Number of compressed deltas."""
    of: int
    """Number of stored deltas."""
    error: float | None
    """Error of all stored deltas together, each with its scale; None for a document."""
    worst: float
    """Error of the delta that lost most."""
    layer: str
    """Layer of that delta."""
    slot: str
    """Slot of that delta."""
    ranks: Mapping[str, float]
    """Slot -> mean rank of compressed factors."""
    bits: float
    """Mean bits per stored number."""

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def compression_of(fusion: Fusion | Document) -> Compression | None:
    """Return the result of compression; None if nothing is compressed."""
    stored: list[tuple[ScheduledEntry, str, Stored | SlotInFile]] = [
        (entry, slot, held) for entry in fusion.entries for slot, held in entry.factors.items()
    ]
    small = [(entry, slot, held.quantised) for entry, slot, held in stored if held.quantised]
    if not small:
        return None
    worst = max(small, key=lambda each: each[2].error)
    numbers = sum(
        rows * length
        for entry, _, held in stored
        if held.quantised
        for rows, length in matrices_of(
            entry.shape, len(held.quantised.levels), dense=_is_dense(held)
        )
    )
    return Compression(
        slots=len(small),
        of=len(stored),
        error=_lost(fusion) if isinstance(fusion, Fusion) else None,
        worst=worst[2].error,
        layer=worst[0].layer,
        slot=worst[1],
        ranks=dict(_mean_ranks(fusion)),
        bits=8 * _packed_bytes(fusion) / numbers,
    )


def stored_json(fusion: Fusion | Document) -> dict[str, dict[str, Any]]:
    """Return path of a layer -> slot -> its storage, as JSON values."""
    sizes = _packed_sizes(fusion) if isinstance(fusion, Fusion) else {}
    held: dict[str, dict[str, Any]] = {}
    for entry in fusion.entries:
        own = held[entry.path] = {}
        for slot, stored in entry.factors.items():
            if stored.quantised is None:
                size = sum(stored.sizes().values())
                own[slot] = {"encoding": "plain", "error": 0.0, "bytes": size}
            else:
                share = sizes.get((entry.path, slot))
                packed = None if share is None else round(share)
                own[slot] = {"encoding": "q", "bytes": packed} | asdict(stored.quantised)
        for slot, reference in entry.references.items():
            own[slot] = {"encoding": "reference", "error": 0.0, "bytes": 0} | asdict(reference)
    return held


def storage_lines(fusion: Fusion | Document) -> list[tuple[str, str]]:
    """Return rows of (label, text) for a terminal; empty if the factors are stored unchanged."""
    if fusion.is_thin:
        return [("thin", "the factors are in the sources; applying it needs them")]
    found = compression_of(fusion)
    if found is None:
        return []
    worst = f"at most {found.worst:.2%} of one ({shown(found.layer)}, {shown(found.slot)})"
    whole = "" if found.error is None else f"{found.error:.2%} of the deltas, "
    ranks = ", ".join(f"{shown(slot)} {rank:.1f}" for slot, rank in found.ranks.items())
    return [
        (
            "compressed",
            f"{found.slots} of {found.of} deltas, {found.bits:.1f} bits a number, mean rank "
            f"{ranks}",
        ),
        ("lost", f"{whole}{worst}"),
    ]


def _is_dense(held: Stored | SlotInFile) -> bool:
    return held.kind == "dense" if isinstance(held, SlotInFile) else isinstance(held.delta, Dense)


def _lost(fusion: Fusion) -> float:
    """Return :attr:`Compression.error`."""
    lost = whole = 0.0
    for entry in fusion.entries:
        for held in entry.factors.values():
            energy = (held.scale * held.delta.norm()) ** 2
            whole += energy
            lost += energy * (0.0 if held.quantised is None else held.quantised.error) ** 2
    return math.sqrt(lost / whole) if whole else 0.0


def _packed_bytes(fusion: Fusion | Document) -> float:
    """Return the bytes of all compressed factors."""
    if isinstance(fusion, Fusion):
        return sum(_packed_sizes(fusion).values())
    packed = {
        tensor.name: tensor.nbytes
        for entry in fusion.entries
        for slot in entry.factors.values()
        if slot.quantised is not None
        for tensor in slot.tensors.values()
    }
    return sum(packed.values())


def _packed_sizes(fusion: Fusion) -> dict[tuple[str, str], float]:
    """Return (path of a layer, slot) -> bytes of its compressed factors in the shared tensor."""
    from klora_runtime.artifact.q.codec import stored_sizes  # it imports torch

    small = {
        (entry.path, slot): stored
        for entry in fusion.entries
        for slot, stored in sorted(entry.factors.items())
        if stored.quantised is not None
    }
    return dict(zip(small, stored_sizes(list(small.values())), strict=True)) if small else {}


def _mean_ranks(fusion: Fusion | Document) -> Iterator[tuple[str, float]]:
    for slot in fusion.slots:
        ranks = [
            len(how.levels)
            for entry in fusion.entries
            if (stored := entry.factors.get(slot)) is not None
            and (how := stored.quantised) is not None
            and not _is_dense(stored)
        ]
        if ranks:
            yield slot, sum(ranks) / len(ranks)
