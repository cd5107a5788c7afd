"""Rules that pick another rule by what is measured of LoRAs together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import Choice
from klora_compile.rules.rule import Rule


@dataclass(frozen=True)
class Together:
    """Numbers of LoRAs together, over the weights of the denoiser that two or more of them change.

    Norms are Frobenius norms of all these deltas laid end to end, with their scalings and without
    the weights of the settings.
    """

    slots: tuple[str, ...]
    """The LoRAs."""
    layers: int
    """Number of these weights; without any, the numbers below are 0."""
    ratio: float = 0.0
    """Norm of the strongest LoRA over that of the weakest, 1 or more; 0 if one is zero."""
    growth: float = 0.0
    """Norm of the sum over that of the strongest LoRA: sqrt(2) for two of one norm that are
        orthogonal, 2 for two that are equal."""
    cosine: float = 0.0
    """Cosine of the angle between two LoRAs, -1 to 1; of several, the largest."""
    inputs: float = 0.0
    """For a content and a style: the share of the content's energy on inputs that the style's
        delta reacts to, 0 to 1. Deltas without factors do not count."""
    inputs_by_chance: float = 0.0
    """The same for inputs of random directions: rank over width."""
    outputs: float = 0.0
    """The share of the content's energy on outputs that the style's delta has, 0 to 1."""
    outputs_by_chance: float = 0.0
    """The same for outputs of random directions."""

    def numbers(self) -> dict[str, float]:
        """Return the numbers by name, as the artifact records them."""
        return {each.name: getattr(self, each.name) for each in fields(self)[1:]}


@dataclass(frozen=True)
class Pick:
    """The rule that another one picked."""

    rule: Rule
    why: str
    """The reason, as a part of a sentence."""


class Picking(Rule):
    """The base of rules that pick another one, which then makes the schedule."""

    whole: ClassVar[bool] = True
    least: ClassVar[int] = 1

    @abstractmethod
    def pick(self, together: Together) -> Pick:
        """Return the rule for these LoRAs."""

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        raise NotImplementedError(f"rule {self.name} only picks another one")
