"""What a fusion rule is: settings that were checked, and two functions of numbers.

``weigh`` looks at the whole model once, ``choose`` at one layer. Neither sees a tensor, a prompt or
a step. What surrounds a choice for every rule (zero deltas, layers that one LoRA has, text
encoders, weights) is in :mod:`klora_compile.planning.plan`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from klora_compile.rules.kit.numbers import LayerNumbers
from klora_runtime.errors import ConfigError

if TYPE_CHECKING:
    from klora_compile.reading.layers import Layer

#: Progress from which it holds, and slot -> coefficient; slots that are not named have none.
Segment = tuple[float, Mapping[str, float]]


@dataclass(frozen=True)
class Choice:
    """What a rule decides for one layer."""

    fate: str
    """In a few words, one of :attr:`Rule.fates`."""
    segments: tuple[Segment, ...]
    """At least one; the first starts at 0."""
    ratio: float | None = None
    """What the choice goes by, 1 where both sides are even; None where nothing is compared."""


@dataclass(frozen=True)
class Rule(ABC):
    """A rule with its own settings, which are its fields. Instances are immutable.

    Raises:
        ConfigError: a setting is out of its range.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`~klora_compile.rules.kit.numbers.Side` it reads, if there is a partner."""
    whole: ClassVar[bool] = False
    """Whether it schedules whole LoRAs: nothing is compared, and a layer that only one LoRA has
    follows that LoRA's schedule."""
    most: ClassVar[int | None] = None
    """How many LoRAs it takes at most; None: as many as an artifact holds."""
    ratio_formula: ClassVar[str] = ""
    """What :attr:`Choice.ratio` is, as matplotlib's mathematics."""
    fates: ClassVar[tuple[str, ...]] = ()
    """The fates that it gives layers."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Settings that the artifact states only where they are not at their default."""
    derives: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Slot -> the slots of the LoRAs that its factors are computed from (:meth:`derive`)."""

    @property
    def ignores_alpha(self) -> bool:
        """Whether deltas count and act without the network's alpha / rank."""
        return False

    def parameters(self) -> dict[str, Any]:
        """Every setting with its default filled in, as the artifact records it."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in self.optional or value != defaults[name]
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The rule that :meth:`parameters` gives these values for; other keys are passed over.

        Raises:
            ConfigError: a value is missing or out of its range.
        """
        own = [field.name for field in fields(cls)]
        missing = [n for n in own if n not in parameters and n not in cls.optional]
        if missing:
            raise ConfigError(f"the rule's parameters lack {', '.join(missing)}.")
        return cls(**{name: value for name, value in parameters.items() if name in own})

    def misfit(self, slots: Sequence[str]) -> str | None:
        """Why the settings do not fit these LoRAs, as one sentence; None where they do."""
        return None

    def count(self, ranks: Sequence[int], numel: int) -> int | None:
        """How many weights of a layer its Top-K sums are of; None where the rule needs none.

        Args:
            ranks: of the layer in each LoRA that has it, two or more.
            numel: elements of the layer.
        """
        return None

    def weigh(self, layers: Mapping[str, LayerNumbers]) -> dict[str, Any]:
        """What the rule computes for the whole model: numbers, or objects of them, by name."""
        return {}

    @abstractmethod
    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        """Decide one layer of the denoiser.

        Args:
            layer: at least two of its deltas are there; one, for rules of whole LoRAs.
            derived: of :meth:`weigh`.
        """

    def range(self) -> tuple[float, float] | None:
        """Between which ratios a layer switches; None where no ratio decides."""
        return None

    def text(self) -> str:
        """The settings in a few words, for reports."""
        return ", ".join(f"{name} {value}" for name, value in self.parameters().items())

    def derivation(self, slot: str) -> str | None:
        """How a slot is computed, as the artifact records it; None where it is a LoRA as given."""
        return None

    def derive(self, slot: str, layers: Mapping[str, Layer]) -> Layer:
        """One layer of a derived slot.

        Args:
            layers: the layer in each of the LoRAs of :attr:`derives`.
        """
        raise NotImplementedError(f"rule {self.name} derives no {slot}")
