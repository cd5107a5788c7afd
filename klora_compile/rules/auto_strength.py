"""Auto-strength: the sum of all LoRAs, scaled down to the norm of the strongest of them alone.

Tools that stack LoRAs know it by this name (ComfyUI-LoRA-Optimizer documents it as a scale for the
whole model). Here, with the deltas d_i of a layer, or of all layers of one component together:

    a = min(1, max over i of ||d_i||_F / ||sum over i of d_i||_F)
    ||sum||^2 = sum over i of ||d_i||^2 + 2 * sum over i < j of <d_i, d_j>

and all LoRAs act with a at every step: 1 / 2 for two equal deltas, 1 / sqrt(2) for two of one norm
that are orthogonal, 1 where one stands alone or both cancel. All numbers come from the factors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum, sqrt
from typing import Any, ClassVar, Literal, get_args

from klora_compile.fields import Word, setting
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import SUM, Choice
from klora_compile.rules.rule import Rule

#: Name in an artifact of the scale by component.
_SCALE = "strength"

Scope = Literal["model", "layer"]


@dataclass(frozen=True, kw_only=True)
class AutoStrength(Rule):
    """The sum of all LoRAs, scaled down to the norm of the strongest of them alone."""

    name: ClassVar[str] = "auto-strength"
    title: ClassVar[str] = "their sum, no stronger than the strongest"
    sentence: ClassVar[str] = (
        "All act at every step, scaled down together to the norm of the strongest of them alone"
    )
    fates: ClassVar[Mapping[str, str]] = SUM
    needs: ClassVar[tuple[str, ...]] = ("frobenius",)
    needs_products: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    per: Scope = field(
        default="model",
        metadata=setting(
            "One scale for all layers of a component (model), or one for each layer, which then "
            "is no stronger than there the strongest LoRA.",
            Word(get_args(Scope)),
        ),
    )

    def weigh(self, layers: Mapping[str, LayerNumbers]) -> dict[str, Any]:
        """Return the scale by component; nothing if each layer has its own."""
        if self.per == "layer":
            return {}
        parts: dict[str, list[LayerNumbers]] = defaultdict(list)
        for layer in layers.values():
            if not layer.is_stepless:
                parts[layer.component].append(layer)
        return {_SCALE: {component: scale_of(own) for component, own in parts.items()}}

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        own = self.per == "layer"
        scale = scale_of([layer]) if own else float(derived[_SCALE][layer.component])
        return Choice("summed", ((0.0, dict.fromkeys(layer.present, scale)),))

    def text(self) -> str:
        return f"one scale for each {self.per}"


def scale_of(layers: list[LayerNumbers]) -> float:
    """Return min(1, norm of the strongest LoRA / norm of the sum) over some layers together.

    Args:
        layers: layers with norms and inner products; 1 if all deltas are zero.
    """
    energies: dict[str, list[float]] = defaultdict(list)
    products: list[float] = []
    for layer in layers:
        for slot, side in layer.present.items():
            assert side.frobenius is not None
            energies[slot].append(side.frobenius**2)
        products.extend((layer.products or {}).values())
    strongest = max(map(fsum, energies.values()), default=0.0)
    whole = fsum([*map(fsum, energies.values()), 2.0 * fsum(products)])
    return sqrt(strongest / whole) if whole > strongest else 1.0
