"""What rules decide by: a few numbers of each LoRA for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klora_runtime.artifact.schedule import STEPLESS


@dataclass(frozen=True)
class Side:
    """One LoRA's numbers for one layer, its scaling applied."""

    rank: int
    scaling: float
    """What its delta is multiplied by: alpha / rank, or 1 where the network alpha is ignored."""
    frobenius: float | None = None
    """Square root of the sum of squares of the scaled delta; None in artifacts that lack it."""
    l1: float | None = None
    """Sum of absolute values of the scaled delta; None where the rule does not need it."""
    top_k: float | None = None
    """Sum of the K largest of them; None also where no partner has the layer, so there is no K."""

    @property
    def is_zero(self) -> bool:
        """Whether the delta is exactly zero."""
        return self.frobenius == 0.0 or self.l1 == 0.0

    @property
    def scores(self) -> dict[str, Any]:
        """As stored in the artifact: what was measured."""
        scores: dict[str, Any] = {"rank": self.rank, "scaling": self.scaling}
        if self.frobenius is not None:
            scores["frobenius"] = self.frobenius
        if self.l1 is not None:
            scores |= {"l1": self.l1, "top_k": self.top_k}
        return scores

    @classmethod
    def from_scores(cls, scores: Mapping[str, Any]) -> Side:
        """The inverse of :attr:`scores`."""
        names = ("rank", "scaling", "frobenius", "l1", "top_k")
        return cls(**{name: scores[name] for name in names if name in scores})


@dataclass(frozen=True)
class LayerNumbers:
    """All LoRAs' numbers for one layer."""

    component: str
    k: int | None
    """How many weights the Top-K sums are of; None where only one LoRA has the layer, and where the
    rule has no such sums."""
    sides: Mapping[str, Side | None]
    """Slot -> its numbers, in the order of the LoRAs; None where it does not adapt the layer."""
    weight: str | None = None
    """Of a bias: the layer name of the weight beside it, with which it is chosen."""

    @property
    def is_stepless(self) -> bool:
        return self.component in STEPLESS

    @property
    def owners(self) -> tuple[str, ...]:
        """Slots that adapt the layer."""
        return tuple(slot for slot, side in self.sides.items() if side is not None)

    @property
    def present(self) -> dict[str, Side]:
        """Slots that adapt it with a delta that is not zero."""
        return {s: side for s, side in self.sides.items() if side is not None and not side.is_zero}
