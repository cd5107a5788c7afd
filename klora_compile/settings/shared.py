"""The settings that all rules share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from klora_compile.fields import BySlot, Number, Word, check_settings, setting
from klora_compile.slots import half_of, role_of
from klora_runtime.artifact.schedule import ALWAYS, CONTENT, MERGED, STYLE
from klora_runtime.artifact.timeline import CLOCKS, ClockName
from klora_runtime.errors import ConfigError

TextEncoder = Literal["both", "content", "style", "none"]
Unpaired = Literal["keep", "drop", "error"]

_WEIGHT = Number(-100.0, 100.0)

#: Settings that an artifact states only if they differ from their default.
_OPTIONAL = ("weights", "clock")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all rules share.

    Raises:
        ConfigError: a value is out of its range.
    """

    content_weight: float = field(
        default=1.0,
        metadata=setting(
            "Factor on the contents' deltas when they are applied; it does not change the choice.",
            _WEIGHT,
        ),
    )
    style_weight: float = field(
        default=1.0,
        metadata=setting(
            "Factor on the styles' deltas when they are applied; it does not change the choice.",
            _WEIGHT,
        ),
    )
    weights: Mapping[str, float] = field(
        default_factory=dict,
        metadata=setting(
            "A further factor on one LoRA, of several or of those that always act.",
            BySlot(_WEIGHT, "weight", "content.2=0.5"),
            option="weight",
        ),
    )
    text_encoder: TextEncoder = field(
        default="both",
        metadata=setting(
            "Whose layers act that run before the first step, such as text encoders'.",
            Word(get_args(TextEncoder)),
        ),
    )
    unpaired: Unpaired = field(
        default="keep",
        metadata=setting(
            "Denoiser layers that only one LoRA adapts: keep them (they always act, or follow the "
            "schedule of their LoRA), drop them, or refuse the LoRAs (error).",
            Word(get_args(Unpaired)),
        ),
    )
    clock: ClockName = field(
        default="step",
        metadata=setting(
            "What the progress of a schedule follows: the count of steps (step), or the noise that "
            "is left (noise), which falls unevenly where a schedule is shifted.",
            Word(CLOCKS),
        ),
    )

    def __post_init__(self) -> None:
        """Check every setting."""
        check_settings(self)

    def weight(self, slot: str, component: str) -> float:
        """Return the factor on the deltas of a slot in a component.

        Args:
            slot: such as ``content``.
            component: such as ``transformer``; ``transformer_2`` is the half for low noise, which
                may have a factor of its own (``content.low``).
        """
        roles = {CONTENT: self.content_weight, STYLE: self.style_weight, MERGED: 1.0, ALWAYS: 1.0}
        half = self.weights.get(f"{slot}.{half_of(component)}", 1.0)
        return roles[role_of(slot)] * self.weights.get(slot, 1.0) * half

    def parameters(self) -> dict[str, Any]:
        """Return the settings as the artifact records them."""
        found: dict[str, Any] = {
            "content_weight": float(self.content_weight),
            "style_weight": float(self.style_weight),
            "text_encoder": self.text_encoder,
            "unpaired": self.unpaired,
        }
        if self.weights:
            found["weights"] = {slot: float(weight) for slot, weight in self.weights.items()}
        if self.clock != CLOCKS[0]:
            found["clock"] = self.clock
        return found

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """Return the settings with these :meth:`parameters`.

        Raises:
            ConfigError: a value is missing or out of its range.
        """
        names = [each.name for each in fields(cls)]
        missing = [n for n in names if n not in parameters and n not in _OPTIONAL]
        if missing:
            raise ConfigError(f"the rule's parameters lack {', '.join(missing)}.")
        return cls(**{name: parameters[name] for name in names if name in parameters})
