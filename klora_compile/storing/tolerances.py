"""The tolerance of each delta: the same for all, or the same loss for every number of a LoRA.

In the second way, a LoRA as a whole loses what the tolerance allows, and a number loses the same
whatever its layer. That takes the fewest bytes for the loss of the whole (*reverse water-filling*,
as in `components`): strong layers lose a small share of their delta, weak ones a large share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.fusion import Entry

#: Range of a tolerance, a relative Frobenius error.
LOWEST, HIGHEST = 1e-5, 0.5

#: What a tolerance holds for: each delta, or all deltas that a LoRA has in one component.
By = Literal["layer", "lora"]
BY: tuple[By, ...] = ("layer", "lora")

#: Halvings of the range in which the loss of one number is sought.
_HALVINGS = 60


@dataclass(frozen=True)
class _Part:
    """A delta of a LoRA."""

    entry: int
    slot: str
    numbers: int
    """How many numbers are stored for it."""
    energy: float
    """Squared Frobenius norm, with its scale."""

    @classmethod
    def of(cls, entry: int, slot: str, stored: Stored) -> _Part:
        numbers = sum(tensor.numel() for tensor in stored.delta.tensors)
        return cls(entry, slot, numbers, (stored.scale * stored.delta.norm()) ** 2)


def tolerances(
    entries: Sequence[Entry], tolerance: float, by: By = "layer"
) -> list[Mapping[str, float]]:
    """Return the tolerance of each delta of each entry, by slot.

    Args:
        entries: the entries of a fusion.
        tolerance: greatest relative Frobenius error, :data:`LOWEST` to :data:`HIGHEST`.
        by: what it holds for. With ``lora`` no delta loses more than :data:`HIGHEST`.
    """
    if by == "layer":
        return [dict.fromkeys(entry.factors, tolerance) for entry in entries]
    found: list[dict[str, float]] = [{} for _ in entries]
    loras: dict[tuple[str, str], list[_Part]] = defaultdict(list)
    for index, entry in enumerate(entries):
        for slot, stored in entry.factors.items():
            loras[entry.component, slot].append(_Part.of(index, slot, stored))
    for parts in loras.values():
        loss = _loss_of_a_number(parts, tolerance)
        for part in parts:
            share = (loss * part.numbers / part.energy) ** 0.5 if part.energy else tolerance
            found[part.entry][part.slot] = min(max(share, LOWEST), HIGHEST)
    return list(found)


def _loss_of_a_number(parts: Sequence[_Part], tolerance: float) -> float:
    """Return the energy that each number may lose so that the parts lose ``tolerance`` together."""
    aim = tolerance**2 * sum(part.energy for part in parts)
    low, high = 0.0, max(part.energy / part.numbers for part in parts)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        lost = sum(
            min(max(middle * part.numbers, LOWEST**2 * part.energy), HIGHEST**2 * part.energy)
            for part in parts
        )
        if lost > aim:
            high = middle
        else:
            low = middle
    return low
