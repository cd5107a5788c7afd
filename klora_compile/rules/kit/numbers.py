"""The numbers that rules use: a few for each LoRA and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from klora_runtime.artifact.schedule import STEPLESS


@dataclass(frozen=True)
class Side:
    """One LoRA's numbers for one layer, with its scaling applied."""

    rank: int
    scaling: float
    """Factor on its delta: alpha / rank, or 1 if the network alpha is ignored."""
    frobenius: float | None = None
    """Frobenius norm of the scaled delta; None in artifacts that lack it."""
    l1: float | None = None
    """Sum of absolute values of the scaled delta; None if the rule does not need it."""
    top_k: float | None = None
    """Sum of the K largest absolute values; None also if no other LoRA has the layer."""
    error: float | None = None
    """Share of a made delta's Frobenius norm that its rank lost, 0 to 1; None for a LoRA's own."""

    @property
    def is_zero(self) -> bool:
        """Whether the delta is exactly zero."""
        return self.frobenius == 0.0 or self.l1 == 0.0

    @property
    def scores(self) -> dict[str, Any]:
        """The measured numbers, as the artifact stores them."""
        scores: dict[str, Any] = {"rank": self.rank, "scaling": self.scaling}
        if self.frobenius is not None:
            scores["frobenius"] = self.frobenius
        if self.l1 is not None:
            scores |= {"l1": self.l1, "top_k": self.top_k}
        if self.error is not None:
            scores["error"] = self.error
        return scores

    @classmethod
    def from_scores(cls, scores: Mapping[str, Any]) -> Side:
        """Return the side with these :attr:`scores`."""
        names = ("rank", "scaling", "frobenius", "l1", "top_k", "error")
        return cls(**{name: scores[name] for name in names if name in scores})


@dataclass(frozen=True)
class LayerNumbers:
    """The numbers of all LoRAs for one layer."""

    component: str
    k: int | None
    """Number of weights in the Top-K sums; None if only one LoRA has the layer or the rule has no
        such sums."""
    sides: Mapping[str, Side | None]
    """Slot -> its numbers, in the order of the LoRAs; None if it does not adapt the layer."""
    weight: str | None = None
    """For a bias, the layer name of the weight that it is chosen with."""
    made: Mapping[str, Side | None] = field(default_factory=dict)
    """The same for slots that a rule made of several LoRAs, beside their own."""
    beside: Mapping[str, Side | None] = field(default_factory=dict)
    """The same for LoRAs that always act; no rule looks at them."""
    name: str = ""
    """Name of the layer."""
    products: Mapping[tuple[str, str], float] | None = None
    """Two slots, in the order of the LoRAs -> the Frobenius inner product of their scaled deltas;
        None if the rule does not need them."""

    @property
    def is_stepless(self) -> bool:
        return self.component in STEPLESS

    @property
    def owners(self) -> tuple[str, ...]:
        """Slots that adapt the layer."""
        return tuple(slot for slot, side in self.sides.items() if side is not None)

    @property
    def present(self) -> dict[str, Side]:
        """Slot -> numbers, for slots that adapt the layer with a nonzero delta."""
        return {s: side for s, side in self.sides.items() if side is not None and not side.is_zero}
