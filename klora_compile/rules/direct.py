"""The direct sum: all LoRAs at constant weights, in every layer at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import SUM, Choice, total
from klora_compile.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class Direct(Rule):
    """The plain sum of all LoRAs; its weights are the settings that all rules share."""

    name: ClassVar[str] = "direct"
    title: ClassVar[str] = "their sum"
    sentence: ClassVar[str] = "All act at every step, at constant weights"
    fates: ClassVar[Mapping[str, str]] = SUM
    whole: ClassVar[bool] = True
    linkable: ClassVar[bool] = True
    least: ClassVar[int] = 1

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        return total(layer.present)

    def text(self) -> str:
        return "constant weights"
