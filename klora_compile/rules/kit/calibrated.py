"""Rules that a base model calibrates: at compile time it shows what each LoRA does alone.

The rule itself stays pure maths. :mod:`klora_compile.calibrating` runs the base model, and gives
the rule what it asks for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import SUM, Choice, total
from klora_compile.rules.rule import Derived, LayerOfSlot, Rule
from klora_runtime.artifact.schedule import MERGED
from klora_runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Calibrated(Rule):
    """The base of rules that a base model calibrates."""

    @property
    def unmade(self) -> str:
        """The error of a compilation without a base model."""
        return (
            f"rule {self.name} needs a base model, which shows what each LoRA does alone. Compile "
            "the LoRAs with --calibrate MODEL."
        )


@dataclass(frozen=True, kw_only=True)
class Routing(Calibrated):
    """The base of rules that make one slot, ``merged``, from the inputs of layers."""

    fates: ClassVar[Mapping[str, str]] = {"merged": "what its LoRAs were merged to", **SUM}
    whole: ClassVar[bool] = True

    @abstractmethod
    def route(self, moments: Sequence[torch.Tensor], ranks: Sequence[int]) -> torch.Tensor:
        """Return the matrix R of the merged delta, up R down.

        The factors of all LoRAs stand one below the other: down has (rank, in) numbers, up has
        (out, rank), and rank is the sum of ``ranks``.

        Args:
            moments: one per LoRA, (rank, rank), float64: the mean of z z^T over its own inputs x,
                with z = down x.
            ranks: of each LoRA.

        Returns:
            (rank, rank), float64; the unit matrix is the plain sum.
        """

    def derives(self, slots: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        return {MERGED: tuple(slots)}

    def derivation(self, slot: str) -> str | None:
        if slot != MERGED:
            return None
        return f"denoiser merged by {self.title}, calibrated: {self.text()}"

    def derive(self, slot: str, layers: Mapping[str, LayerOfSlot]) -> Derived | None:
        raise ConfigError(self.unmade)

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        merged = layer.made.get(MERGED)
        if merged is None:
            return total(layer.present)
        return Choice("merged", ((0.0, {} if merged.is_zero else {MERGED: 1.0}),))


#: Slot -> layer name -> a coefficient per phase.
Coefficients = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True, kw_only=True)
class Fitting(Calibrated):
    """The base of rules whose coefficients are fitted, and which another rule then schedules."""

    least: ClassVar[int] = 2

    @property
    @abstractmethod
    def descent(self) -> Descent:
        """How to fit."""

    @abstractmethod
    def scheduled(self, coefficients: Coefficients) -> Rule:
        """Return the rule that makes a schedule of fitted coefficients.

        Args:
            coefficients: of every layer and LoRA that were fitted; phases divide the sampling into
                equal parts.
        """

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        raise NotImplementedError(f"rule {self.name} only fits another one")


@dataclass(frozen=True)
class Descent:
    """How coefficients are fitted, by Adam from 1."""

    phases: int
    updates: int
    rate: float
    """Learning rate at the start; it falls to 0."""
    hold: float
    """Weight of the mean squared distance of the coefficients from 1."""
    until: Mapping[str, float]
    """Role -> progress up to which its LoRAs' own predictions are matched; 1 if it is missing."""
