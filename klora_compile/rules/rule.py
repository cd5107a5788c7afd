"""What a fusion rule is: settings that were checked, and two functions of numbers.

``weigh`` looks at the whole model once, ``choose`` at one layer. Neither sees a tensor, a prompt or
a step. What surrounds a choice for every rule (zero deltas, layers that one LoRA has, text
encoders, weights) is in :mod:`klora_compile.planning.plan`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from klora_compile.fields import (
    Number,
    Setting,
    check_settings,
    is_required,
    setting_of,
    settings_of,
)
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import Choice
from klora_compile.rules.kit.papers import Paper
from klora_runtime.errors import ConfigError

if TYPE_CHECKING:  # no rule needs torch until it computes
    from klora_runtime.artifact.delta import Delta

#: How the sentence of a rule begins that chooses one LoRA for a layer.
EVERY_LAYER = "In every layer of the denoiser, at every step of sampling, the one acts"


class LayerOfSlot(Protocol):
    """One layer of one LoRA, with its values."""

    @property
    def component(self) -> str: ...

    @property
    def parameter(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def delta(self) -> Delta: ...

    @property
    def scaling(self) -> float: ...


@dataclass(frozen=True)
class Rule(ABC):
    """A rule with its own settings, which are its fields. Instances are immutable.

    Each field says in its metadata what it means and what it may be
    (:func:`klora_compile.fields.setting`), and is checked when the rule is made.

    Raises:
        ConfigError: a setting is out of its range.
    """

    name: ClassVar[str]
    """On the command line and in artifacts."""
    title: ClassVar[str]
    """In a model card: what the LoRAs are fused by."""
    sentence: ClassVar[str]
    """In a model card: what it does, as Markdown without the full stop."""
    papers: ClassVar[tuple[Paper, ...]] = ()
    """What to cite."""
    fates: ClassVar[Mapping[str, str]]
    """What may become of a layer, in a few words for reports, with one sentence on each. What may
    happen under every rule is in :mod:`klora_compile.planning.fates`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`~klora_compile.rules.kit.numbers.Side` it reads, if there is a partner."""
    whole: ClassVar[bool] = False
    """Whether it schedules whole LoRAs: nothing is compared, and a layer that only one LoRA has
    follows that LoRA's schedule."""
    most: ClassVar[int | None] = None
    """How many LoRAs it takes at most; None: as many as an artifact holds."""
    ratio_formula: ClassVar[str] = ""
    """What :attr:`Choice.ratio` is, as matplotlib's mathematics."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Settings that the artifact states only where they are not at their default."""
    derives: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Slot -> the slots of the LoRAs that its factors are computed from (:meth:`derive`)."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_settings(self)

    @property
    def ignores_alpha(self) -> bool:
        """Whether deltas count and act without the network's alpha / rank."""
        return False

    @property
    def made_for_steps(self) -> int | None:
        """The number of steps that the schedule is made for; None where it fits every number."""
        return None

    def parameters(self) -> dict[str, Any]:
        """Every setting with its default filled in, as the artifact records it."""
        return {
            field.name: _stated(getattr(self, field.name), setting_of(field))
            for field in fields(self)
            if field.name not in self.optional or getattr(self, field.name) != field.default
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The rule that :meth:`parameters` gives these values for; other keys are passed over.

        Raises:
            ConfigError: a value is missing or out of its range.
        """
        own = settings_of(cls)
        missing = [name for name in own if name not in parameters and name not in cls.optional]
        if missing:
            raise ConfigError(f"the rule's parameters lack {', '.join(missing)}.")
        return cls.stated({name: value for name, value in parameters.items() if name in own})

    @classmethod
    def stated(cls, settings: Mapping[str, Any]) -> Self:
        """The rule with these settings, as a command line or an artifact states them.

        Args:
            settings: some of its fields by name; a word may stand for None
                (:attr:`klora_compile.fields.Setting.unset`).

        Raises:
            ConfigError: a required setting is not there, or a value is out of its range.
        """
        for field in fields(cls):
            if is_required(field) and field.name not in settings:
                wanted = setting_of(field).help.rstrip(".")
                raise ConfigError(
                    f"{field.name}: rule {cls.name} needs {wanted[:1].lower()}{wanted[1:]}; "
                    "name it."
                )
        words = {name: each.unset for name, each in settings_of(cls).items() if each.unset}
        return cls(**{n: None if n in words and v == words[n] else v for n, v in settings.items()})

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

    def derive(self, slot: str, layers: Mapping[str, LayerOfSlot]) -> Delta:
        """The delta of one layer of a derived slot; it takes the scaling of that slot's own LoRA.

        Args:
            slot: a key of :attr:`derives`.
            layers: slot -> the layer, of each of the LoRAs that it is computed from.
        """
        raise NotImplementedError(f"rule {self.name} derives no {slot}")


def _stated(value: Any, setting: Setting) -> Any:
    """A value as the artifact records it."""
    if value is None:
        return setting.unset
    return float(value) if isinstance(setting.kind, Number) and type(value) is int else value
