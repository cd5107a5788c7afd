"""The direct sum: all LoRAs at constant weights, in every layer at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.rule import Choice, Rule


@dataclass(frozen=True)
class DirectRule(Rule):
    """It has no settings of its own: the weights are common to all rules."""

    name: ClassVar[str] = "direct"
    whole: ClassVar[bool] = True
    fates: ClassVar[tuple[str, ...]] = ("summed",)

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        return Choice("summed", ((0.0, dict.fromkeys(layer.present, 1.0)),))

    def text(self) -> str:
        return "constant weights"
