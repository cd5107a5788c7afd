"""Level: the sum of all LoRAs, each scaled to the norm of the first.

LoRAs of one base model differ in size, sometimes by a factor of a hundred, so a plain sum may hide
the smaller ones. With E the sum of ||delta||_F^2 over the layers that all LoRAs adapt, LoRA i acts
at every step with

    sqrt(E_1 / E_i)

one number for each LoRA and component. It ignores the similarity of deltas: two deltas in the same
direction add up to more than either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any, ClassVar

from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import SUM, Choice
from klora_compile.rules.rule import Rule

#: Prefix of a component's name in an artifact: the factors on its LoRAs.
_FACTORS = "factors."


@dataclass(frozen=True, kw_only=True)
class Level(Rule):
    """The sum of all LoRAs, each scaled to the norm of the first content LoRA."""

    name: ClassVar[str] = "level"
    title: ClassVar[str] = "their sum, at one norm"
    sentence: ClassVar[str] = "All act at every step, each scaled to the norm of the first"
    fates: ClassVar[Mapping[str, str]] = SUM
    needs: ClassVar[tuple[str, ...]] = ("frobenius",)
    whole: ClassVar[bool] = True

    def weigh(self, layers: Mapping[str, LayerNumbers]) -> dict[str, Any]:
        """Return component -> slot -> factor; 1 if the LoRAs share no layer or only zero deltas."""
        squares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for layer in layers.values():
            if layer.is_stepless:
                continue
            shared = all(side is not None for side in layer.sides.values())
            for slot, side in layer.sides.items():
                norm = side.frobenius if shared and side is not None else None
                squares[layer.component][slot].append((norm or 0.0) ** 2)
        return {
            f"{_FACTORS}{component}": _factors({s: fsum(v) for s, v in energies.items()})
            for component, energies in squares.items()
        }

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        factors = derived[f"{_FACTORS}{layer.component}"]
        return Choice("summed", ((0.0, {slot: factors[slot] for slot in layer.present}),))

    def text(self) -> str:
        return "at one norm"


def _factors(energies: Mapping[str, float]) -> dict[str, float]:
    first = next(iter(energies.values()))
    if first == 0.0:
        return dict.fromkeys(energies, 1.0)
    return {slot: sqrt(first / own) if own else 1.0 for slot, own in energies.items()}
