"""What compression cost a fusion, told by the fusion alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from klora_runtime.errors import shown
from klora_runtime.fusion import Dense, Entry, Factors, Fusion
from klora_runtime.stored_factors import stored_tensors


@dataclass(frozen=True)
class Compression:
    """Errors are relative Frobenius errors of deltas against the sources', 0 to 1."""

    slots: int
    """Slots of layers that are stored in few bits."""
    of: int
    """Slots of layers that are stored."""
    error: float
    """Of all stored deltas together, each with its scale."""
    worst: float
    """Of the slot of a layer that lost most."""
    layer: str
    """That layer."""
    slot: str
    """That slot."""
    ranks: Mapping[str, float]
    """Slot -> mean rank that was kept of compressed factors."""
    bits: float
    """Mean bits per number that was kept, scales not counted."""

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def compression_of(fusion: Fusion) -> Compression | None:
    """None where nothing is compressed."""
    stored = [
        (entry, slot, factors)
        for entry in fusion.entries
        for slot, factors in entry.factors.items()
    ]
    small = [
        (entry, slot, factors.quantised) for entry, slot, factors in stored if factors.quantised
    ]
    if not small:
        return None
    worst = max(small, key=lambda each: each[2].error)
    lost = whole = 0.0
    for _, _, factors in stored:
        energy = (factors.scale * _norm(factors)) ** 2
        whole += energy
        lost += energy * (0.0 if factors.quantised is None else factors.quantised.error) ** 2
    widths = [width for _, _, quantised in small for width in quantised.widths]
    return Compression(
        slots=len(small),
        of=len(stored),
        error=math.sqrt(lost / whole) if whole else 0.0,
        worst=worst[2].error,
        layer=worst[0].layer,
        slot=worst[1],
        ranks=dict(_mean_ranks(fusion)),
        bits=sum(widths) / len(widths),
    )


def stored_json(entry: Entry) -> dict[str, Any]:
    """Slot -> how the file holds it, as JSON values."""
    held: dict[str, Any] = {
        slot: {"encoding": "plain", "error": 0.0, "bytes": _nbytes(factors)}
        if factors.quantised is None
        else {
            "encoding": "q",
            "error": factors.quantised.error,
            "bytes": _nbytes(factors),
            "widths": list(factors.quantised.widths),
        }
        for slot, factors in entry.factors.items()
    }
    for slot, reference in entry.references.items():
        held[slot] = {"encoding": "reference", "error": 0.0, "bytes": 0} | asdict(reference)
    return held


def storage_lines(fusion: Fusion) -> list[tuple[str, str]]:
    """Rows of (label, text) for a terminal; none where the factors are stored as they were."""
    if fusion.is_thin:
        return [("thin", "the factors lie in the sources, which applying it needs")]
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


def _nbytes(factors: Factors | Dense) -> int:
    return sum(tensor.nbytes for tensor in stored_tensors(factors))


def _norm(factors: Factors | Dense) -> float:
    if isinstance(factors, Dense):
        return float(factors.delta.double().norm())
    up, down = factors.up.double().flatten(1), factors.down.double().flatten(1)
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def _mean_ranks(fusion: Fusion) -> Iterator[tuple[str, float]]:
    for slot in fusion.slots:
        ranks = [
            factors.rank
            for entry in fusion.entries
            if isinstance(factors := entry.factors.get(slot), Factors) and factors.quantised
        ]
        if ranks:
            yield slot, sum(ranks) / len(ranks)
