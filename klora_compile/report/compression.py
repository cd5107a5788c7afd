"""The loss of a compressed fusion, from the fusion alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from klora_runtime.artifact.delta import LowRank
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.q.codec import stored_sizes
from klora_runtime.errors import shown


@dataclass(frozen=True)
class Compression:
    """The result of compression; errors are relative Frobenius errors of deltas, 0 to 1."""

    slots: int
    """Number of compressed deltas."""
    of: int
    """Number of stored deltas."""
    error: float
    """Error of all stored deltas together, each with its scale."""
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


def compression_of(fusion: Fusion) -> Compression | None:
    """Return the result of compression; None if nothing is compressed."""
    stored = [
        (entry, slot, held) for entry in fusion.entries for slot, held in entry.factors.items()
    ]
    small = [(entry, slot, held.quantised) for entry, slot, held in stored if held.quantised]
    if not small:
        return None
    worst = max(small, key=lambda each: each[2].error)
    lost = whole = 0.0
    for _, _, held in stored:
        energy = (held.scale * held.delta.norm()) ** 2
        whole += energy
        lost += energy * (0.0 if held.quantised is None else held.quantised.error) ** 2
    sizes = _packed_sizes(fusion)
    numbers = sum(
        tensor.numel() for _, _, held in stored if held.quantised for tensor in held.delta.tensors
    )
    return Compression(
        slots=len(small),
        of=len(stored),
        error=math.sqrt(lost / whole) if whole else 0.0,
        worst=worst[2].error,
        layer=worst[0].layer,
        slot=worst[1],
        ranks=dict(_mean_ranks(fusion)),
        bits=8 * sum(sizes.values()) / numbers,
    )


def stored_json(fusion: Fusion) -> dict[str, dict[str, Any]]:
    """Return path of a layer -> slot -> its storage, as JSON values."""
    sizes = _packed_sizes(fusion)
    held: dict[str, dict[str, Any]] = {}
    for entry in fusion.entries:
        own = held[entry.path] = {}
        for slot, stored in entry.factors.items():
            if stored.quantised is None:
                own[slot] = {"encoding": "plain", "error": 0.0, "bytes": stored.delta.nbytes}
            else:
                size = round(sizes[entry.path, slot])
                own[slot] = {"encoding": "q", "bytes": size} | asdict(stored.quantised)
        for slot, reference in entry.references.items():
            own[slot] = {"encoding": "reference", "error": 0.0, "bytes": 0} | asdict(reference)
    return held


def storage_lines(fusion: Fusion) -> list[tuple[str, str]]:
    """Return rows of (label, text) for a terminal; empty if the factors are stored unchanged."""
    if fusion.is_thin:
        return [("thin", "the factors are in the sources; applying it needs them")]
    found = compression_of(fusion)
    if found is None:
        return []
    ranks = ", ".join(f"{shown(slot)} {rank:.1f}" for slot, rank in found.ranks.items())
    return [
        (
            "compressed",
            f"{found.slots} of {found.of} deltas, {found.bits:.1f} bits a number, mean rank "
            f"{ranks}",
        ),
        (
            "lost",
            f"{found.error:.2%} of the deltas, at most {found.worst:.2%} of one "
            f"({shown(found.layer)}, {shown(found.slot)})",
        ),
    ]


def _packed_sizes(fusion: Fusion) -> dict[tuple[str, str], float]:
    """Return (path of a layer, slot) -> bytes of its compressed factors in the shared tensor."""
    small = {
        (entry.path, slot): stored
        for entry in fusion.entries
        for slot, stored in sorted(entry.factors.items())
        if stored.quantised is not None
    }
    return dict(zip(small, stored_sizes(list(small.values())), strict=True)) if small else {}


def _mean_ranks(fusion: Fusion) -> Iterator[tuple[str, float]]:
    for slot in fusion.slots:
        ranks = [
            stored.delta.rank
            for entry in fusion.entries
            if (stored := entry.factors.get(slot)) is not None
            and isinstance(stored.delta, LowRank)
            and stored.quantised
        ]
        if ranks:
            yield slot, sum(ranks) / len(ranks)
