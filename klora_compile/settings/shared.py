"""What a user may decide about a fusion whatever its rule, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from klora_compile.rules.ranges import require_choice, require_number
from klora_compile.slots import CONTENT, role_of
from klora_runtime.errors import ConfigError

TextEncoder = Literal["both", "content", "style", "none"]
Unpaired = Literal["keep", "drop", "error"]

#: Settings that an artifact states only where they are not at their default.
_OPTIONAL = ("weights", "keep_all_slots")


@dataclass(frozen=True)
class Settings:
    """Settings that all rules share.

    Raises:
        ConfigError: a value is out of its range.
    """

    content_weight: float = 1.0
    """Factor on the contents' deltas where they are applied; the choice does not see it."""
    style_weight: float = 1.0
    """Factor on the styles' deltas where they are applied; the choice does not see it."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Slot -> a further factor on the deltas of one LoRA."""
    text_encoder: TextEncoder = "both"
    """Whose text encoder layers act, by role; they have no steps."""
    unpaired: Unpaired = "keep"
    """Denoiser layers that only one LoRA adapts: always act (or follow the schedule of their LoRA),
    are left out, or are an error."""
    keep_all_slots: bool = False
    """Store also what never acts, so that every other schedule can be made from the artifact."""

    def __post_init__(self) -> None:
        require_choice("text_encoder", self.text_encoder, get_args(TextEncoder))
        require_choice("unpaired", self.unpaired, get_args(Unpaired))
        for name in ("content_weight", "style_weight"):
            require_number(name, getattr(self, name), -100.0, 100.0)
        if not isinstance(self.weights, Mapping):
            raise ConfigError(
                f"weights: expected slots with a number each, found {self.weights!r}."
            )
        for slot, weight in self.weights.items():
            require_number(f"weight of {slot}", weight, -100.0, 100.0)
        if not isinstance(self.keep_all_slots, bool):
            raise ConfigError(f"keep_all_slots: expected a boolean, found {self.keep_all_slots!r}.")

    def weight(self, slot: str) -> float:
        """The factor on one slot's deltas."""
        role = self.content_weight if role_of(slot) == CONTENT else self.style_weight
        return role * self.weights.get(slot, 1.0)

    def parameters(self) -> dict[str, Any]:
        """As the artifact records them."""
        found: dict[str, Any] = {
            "content_weight": float(self.content_weight),
            "style_weight": float(self.style_weight),
            "text_encoder": self.text_encoder,
            "unpaired": self.unpaired,
        }
        if self.weights:
            found["weights"] = {slot: float(weight) for slot, weight in self.weights.items()}
        if self.keep_all_slots:
            found["keep_all_slots"] = True
        return found

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The settings that :meth:`parameters` gives these values for.

        Raises:
            ConfigError: a value is missing or out of its range.
        """
        names = [each.name for each in fields(cls)]
        missing = [n for n in names if n not in parameters and n not in _OPTIONAL]
        if missing:
            raise ConfigError(f"the rule's parameters lack {', '.join(missing)}.")
        return cls(**{name: parameters[name] for name in names if name in parameters})
