"""The terms on which pairs of LoRAs are linked: what a rule of the compiler says in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from klora_runtime.artifact.timeline import ClockName
from klora_runtime.linking.inequality import Inequality

#: How gamma is computed: by K-LoRA's paper, or as its authors' code does.
GammaRule = Literal["paper", "code"]
#: What is compared: Top-K sums, or squares of Frobenius norms.
Size = Literal["top_k", "energy"]


@dataclass(frozen=True)
class Duel:
    """In each layer one LoRA acts at a time: content where the inequality holds, else style."""

    inequality: Inequality
    size: Size
    """What S_c and S_s are."""
    gamma: GammaRule | float
    """How the magnitudes of the two LoRAs are balanced, or the balance itself."""
    favour: float = 1.0
    """Factor on gamma."""
    top_k: int | None = None
    """Number of weights in the Top-K sums; None for the product of the two ranks."""

    @property
    def measures(self) -> bool:
        """Whether sums of absolute values are compared, which takes measuring."""
        return self.size == "top_k"


@dataclass(frozen=True)
class Terms:
    """A rule and all settings that decide how two LoRAs become a schedule."""

    rule: str
    """Name of the rule, for the artifact."""
    parameters: Mapping[str, Any]
    """Its settings, for the artifact."""
    duel: Duel | None
    """None for the sum of both LoRAs at constant weights."""
    ignores_alpha: bool = False
    """Whether deltas are measured and applied without alpha / rank."""
    text_encoder: str = "both"
    """Whose layers act that run before the first step: both, content, style or none."""
    unpaired: str = "keep"
    """Denoiser layers of one LoRA alone: keep, drop or error."""
    clock: ClockName = "step"
    weights: Mapping[str, float] = field(default_factory=dict)
    """Factor on the deltas of a slot; ``SLOT.COMPONENT`` for one in that component; 1 if absent."""

    @property
    def measures(self) -> bool:
        """Whether L1 norms and Top-K sums are needed, besides norms."""
        return self.duel is not None and self.duel.measures

    def weight(self, slot: str, component: str) -> float:
        """Return the factor on the deltas of a slot in a component."""
        return self.weights.get(f"{slot}.{component}", self.weights.get(slot, 1.0))
