"""The interface of fusion rules: checked settings and two functions of numbers.

``weigh`` sees the whole model once, ``choose`` sees one layer. Neither sees a tensor, a prompt or a
step. :mod:`klora_compile.planning.plan` handles what is the same for every rule: zero deltas,
layers of one LoRA, text encoders, and weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
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
from klora_runtime.linking.terms import Duel

if TYPE_CHECKING:  # rules need torch only when they compute
    from klora_runtime.artifact.delta import Delta

#: The beginning of the sentence of a rule that chooses one LoRA per layer.
EVERY_LAYER = "In every layer of the denoiser, at every step of sampling, the one acts"


class LayerOfSlot(Protocol):
    """One layer of one LoRA, with its values."""

    @property
    def name(self) -> str: ...

    @property
    def component(self) -> str: ...

    @property
    def parameter(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def rank(self) -> int: ...

    @property
    def delta(self) -> Delta: ...

    @property
    def scaling(self) -> float: ...


@dataclass(frozen=True)
class Derived:
    """One layer of a derived slot."""

    delta: Delta
    error: float = 0.0
    """Share of its Frobenius norm that was lost to its rank, 0 to 1."""


@dataclass(frozen=True)
class Rule(ABC):
    """A fusion rule whose fields are its settings. Instances are immutable.

    The metadata of each field state its meaning and its allowed values
    (:func:`klora_compile.fields.setting`); the constructor checks them.

    Raises:
        ConfigError: a setting is out of its range.
    """

    name: ClassVar[str]
    """Name on the command line and in artifacts."""
    title: ClassVar[str]
    """Name in a model card."""
    sentence: ClassVar[str]
    """Description for a model card, as Markdown without the full stop."""
    papers: ClassVar[tuple[Paper, ...]] = ()
    """Papers to cite."""
    fates: ClassVar[Mapping[str, str]]
    """Possible fate of a layer, in a few words for reports -> one sentence about it. Fates that all
        rules share are in :mod:`klora_compile.planning.fates`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`~klora_compile.rules.kit.numbers.Side` that the rule compares."""
    needs_products: ClassVar[bool] = False
    """Whether the rule needs the inner products of the LoRAs' deltas
        (:attr:`~klora_compile.rules.kit.numbers.LayerNumbers.products`)."""
    whole: ClassVar[bool] = False
    """Whether the rule schedules whole LoRAs: it compares nothing, and a layer of only one LoRA
        follows that LoRA's schedule."""
    least: ClassVar[int] = 2
    """Smallest number of LoRAs, without those that always act."""
    most: ClassVar[int | None] = None
    """Greatest number of LoRAs; None for as many as an artifact can hold."""
    ratio_formula: ClassVar[str] = ""
    """Formula of :attr:`Choice.ratio` in matplotlib's math notation."""
    linkable: ClassVar[bool] = False
    """Whether numbers of single LoRAs decide everything between a content and a style, by
        :meth:`duel`, so that a catalogue can link pairs."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Settings that the artifact states only if they differ from their default."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_settings(self)

    @property
    def ignores_alpha(self) -> bool:
        """Whether deltas are measured and applied without the network's alpha / rank."""
        return False

    @property
    def made_for_steps(self) -> int | None:
        """The number of steps that the schedule is made for; None if it fits every number."""
        return None

    def parameters(self) -> dict[str, Any]:
        """Return every setting with its default filled in, as the artifact records it."""
        return {
            field.name: _stated(getattr(self, field.name), setting_of(field))
            for field in fields(self)
            if field.name not in self.optional or getattr(self, field.name) != field.default
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """Return the rule with these :meth:`parameters`; ignore other keys.

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
        """Return the rule with settings as a command line or an artifact states them.

        Args:
            settings: some of the rule's fields by name; a word may represent None
                (:attr:`klora_compile.fields.Setting.unset`).

        Raises:
            ConfigError: a required setting is missing, or a value is out of range.
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
        """Return why the settings do not fit these LoRAs, as one sentence; None if they do."""
        return None

    def misfit_of_base(self, families: Collection[str]) -> str | None:
        """Return why the settings do not fit LoRAs of a base model, as :meth:`misfit` does.

        Args:
            families: keys of the base models that the LoRAs may be for; none if that is unknown.
        """
        return None

    def count(self, ranks: Sequence[int], numel: int) -> int | None:
        """Return K for a layer's Top-K sums; None if the rule uses no such sums.

        Args:
            ranks: the layer's rank in each LoRA that has it, two or more.
            numel: number of elements of the layer.
        """
        return None

    def weigh(self, layers: Mapping[str, LayerNumbers]) -> dict[str, Any]:
        """Compute the rule's numbers for the whole model: name -> number or object of numbers."""
        return {}

    @abstractmethod
    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        """Decide one layer of the denoiser.

        Args:
            layer: a layer with two or more deltas; for rules of whole LoRAs, one or more.
            derived: the result of :meth:`weigh`.
        """

    def duel(self) -> Duel | None:
        """Return how a linkable rule lets two LoRAs duel; None if it is their plain sum."""
        return None

    def range(self) -> tuple[float, float] | None:
        """Return the range of ratios in which layers switch; None if no ratio decides."""
        return None

    def text(self) -> str:
        """Return the settings in a few words, for reports."""
        return ", ".join(f"{name} {value}" for name, value in self.parameters().items())

    def derives(self, slots: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Return derived slot -> slots of the LoRAs that :meth:`derive` computes it from.

        A derived slot replaces the LoRA of its name, or is ``merged``, beside all LoRAs.
        """
        return {}

    def derivation(self, slot: str) -> str | None:
        """Return the artifact's note on how a slot is computed; None if it is a LoRA as given."""
        return None

    def derive(self, slot: str, layers: Mapping[str, LayerOfSlot]) -> Derived | None:
        """Compute one layer of a derived slot; None if the slot shall not have the layer.

        Args:
            slot: a key of :meth:`derives`.
            layers: slot -> the layer in each LoRA that it is computed from. If the derived slot
                replaces a LoRA, these are all of its origins, and the result has the scaling of
                that LoRA. Otherwise they are two or more of them, the scaling of each includes the
                weight of its LoRA, and the result has the scaling 1.
        """
        raise NotImplementedError(f"rule {self.name} derives no {slot}")


def _stated(value: Any, setting: Setting) -> Any:
    """Return a value as the artifact records it."""
    if value is None:
        return setting.unset
    return float(value) if isinstance(setting.kind, Number) and type(value) is int else value
