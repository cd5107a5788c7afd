"""Manual schedules: each LoRA's weight as a step function of progress.

The schedule ``0:1,0.4:0.2`` means weight 1 from the start and 0.2 from progress 0.4 on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from klora_compile.fields import BySlot, Number, Text, setting
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import Choice
from klora_compile.rules.rule import Rule
from klora_compile.slots import role_of
from klora_runtime.errors import ConfigError

#: (start as progress, weight) of each point.
Points = tuple[tuple[float, float], ...]

_TEXT = Text("POINTS", "progress:weight, such as 0:1,0.4:0.2")
_WEIGHT = Number(-100.0, 100.0)
_MOST_POINTS = 64


@dataclass(frozen=True, kw_only=True)
class Phases(Rule):
    """Manual schedules, as text or points; weights are -100 to 100, and the first starts at 0."""

    name: ClassVar[str] = "phases"
    title: ClassVar[str] = "a schedule by hand"
    sentence: ClassVar[str] = "Each has its own weight from one phase to the next"
    fates: ClassVar[Mapping[str, str]] = {"scheduled": "its LoRAs by the schedules that were set"}
    whole: ClassVar[bool] = True
    least: ClassVar[int] = 1
    optional: ClassVar[tuple[str, ...]] = ("slot_phases",)

    content_phases: str | Points = field(
        default="0:1",
        metadata=setting(
            "Weights of the content LoRAs, each from a progress on, such as 0:1,0.4:0.2.", _TEXT
        ),
    )
    style_phases: str | Points = field(
        default="0:1", metadata=setting("The same for the style LoRAs.", _TEXT)
    )
    slot_phases: Mapping[str, str | Points] = field(
        default_factory=dict,
        metadata=setting(
            "Weights of one of several LoRAs. They replace the weights of its role.",
            BySlot(_TEXT, "schedule", "content.2=0:0,0.5:1"),
            option="phases",
        ),
    )

    def __post_init__(self) -> None:
        """Check the settings and normalise them."""
        super().__post_init__()
        for name in ("content_phases", "style_phases"):
            object.__setattr__(self, name, points_of(name, getattr(self, name)))
        own = {slot: points_of(slot, points) for slot, points in self.slot_phases.items()}
        object.__setattr__(self, "slot_phases", own)

    def parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "content_phases": points_text(self.content_phases),
            "style_phases": points_text(self.style_phases),
        }
        if self.slot_phases:
            found["slot_phases"] = {s: points_text(p) for s, p in self.slot_phases.items()}
        return found

    def misfit(self, slots: Sequence[str]) -> str | None:
        strange = [slot for slot in self.slot_phases if slot not in slots]
        if not strange:
            return None
        return f"slot_phases: there is no LoRA {strange[0]!r}; name one of {', '.join(slots)}."

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        points = {slot: self._points(slot) for slot in layer.present}
        starts = sorted({start for own in points.values() for start, _ in own})
        rows = ({slot: weight_at(own, start) for slot, own in points.items()} for start in starts)
        return Choice("scheduled", tuple(zip(starts, rows, strict=True)))

    def text(self) -> str:
        own = self.parameters()
        parts = {"content": own["content_phases"], "style": own["style_phases"]}
        parts |= own.get("slot_phases", {})
        return ", ".join(f"{slot} {text}" for slot, text in parts.items())

    def _points(self, slot: str) -> Points:
        points = self.slot_phases.get(slot) or getattr(self, f"{role_of(slot)}_phases")
        assert not isinstance(points, str)  # the constructor parsed it
        return points


def points_of(name: str, value: str | Iterable[Sequence[float]]) -> Points:
    """Parse and check a schedule.

    Args:
        name: name of the setting, for errors.
        value: text, or pairs of progress and weight.

    Raises:
        ConfigError: the value is neither, or its progress does not ascend from 0.
    """
    try:
        pairs = [part.split(":") for part in value.split(",")] if isinstance(value, str) else value
        points = tuple((float(start), float(weight)) for start, weight in pairs)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: expected {_TEXT.what}, found {value!r}.") from None
    starts = [start for start, _ in points]
    ascends = all(one < other for one, other in pairwise(starts))
    if not starts or starts[0] != 0.0 or not ascends or not starts[-1] < 1.0:
        raise ConfigError(
            f"{name}: expected progress that ascends from 0 and stays below 1, found {value!r}."
        )
    if len(points) > _MOST_POINTS:
        raise ConfigError(f"{name}: expected at most {_MOST_POINTS} points, found {len(points)}.")
    for _, weight in points:
        _WEIGHT.check(f"a weight of {name}", weight)
    return points


def points_text(points: str | Points) -> str:
    """Return a schedule as text; :func:`points_of` gives the same points again."""
    if isinstance(points, str):
        return points
    return ",".join(f"{_number(start)}:{_number(weight)}" for start, weight in points)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def weight_at(points: Points, progress: float) -> float:
    """Return the weight at a progress.

    Args:
        points: a parsed schedule.
        progress: in [0, 1).
    """
    return next(weight for start, weight in reversed(points) if start <= progress)
