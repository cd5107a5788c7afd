"""The pictures of each LoRA alone that a base model is asked for: prompts, seeds, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from klora_compile.reading.adapter import Adapter
from klora_compile.slots import role_of, slot_of
from klora_runtime.errors import ConfigError, shown


@dataclass(frozen=True)
class OwnPictures:
    """What a base model draws with each LoRA alone, to calibrate their fusion."""

    prompts: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Slot or role -> one prompt or several, such as ``{"content": "a penguin", "style": "a house,
        ink style"}``; by default the trigger words that the LoRA states."""
    count: int = 4
    """Pictures per LoRA, 1 to 1000; several prompts take turns."""
    seed: int = 0
    """Seed of the first picture; the next ones count up."""
    steps: int | None = None
    """Steps of a picture; None leaves them to the pipeline."""
    guidance: float | None = None
    """Guidance scale; None leaves it to the pipeline."""
    height: int | None = None
    """Pixels; None leaves them to the pipeline."""
    width: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if type(self.count) is not int or not 1 <= self.count <= 1000:
            raise ConfigError(f"count: expected a whole number from 1 to 1000, found {self.count}.")
        if type(self.seed) is not int or not 0 <= self.seed <= 2**63 - 1001:
            raise ConfigError(f"seed: expected a whole number from 0, found {self.seed!r}.")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ConfigError(f"steps: expected a whole number from 1, found {self.steps!r}.")

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, by name, as far as they are given."""
        given = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
        }
        return {name: value for name, value in given.items() if value is not None}


def turns(own: OwnPictures, prompts: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield prompt and seed of each picture of a LoRA with these prompts."""
    for number in range(own.count):
        yield prompts[number % len(prompts)], own.seed + number


def prompts_of(
    own: OwnPictures,
    slots: Sequence[str],
    adapters: Mapping[str, Adapter],
    *,
    who: str = "calibration",
    option: str = "--calibrate-prompt",
) -> dict[str, tuple[str, ...]]:
    """Return the prompts of each slot that a rule schedules.

    Args:
        own: the given prompts.
        slots: the slots.
        adapters: source -> LoRA, whose trigger words stand in for prompts.
        who: what needs them, for errors.
        option: the option of a command that names them, for errors.

    Raises:
        ConfigError: a prompt is for no LoRA, or a LoRA has neither prompt nor trigger words.
    """
    known = {*slots, *map(role_of, slots)}
    for name in own.prompts:
        if name not in known:
            raise ConfigError(
                f"prompts: there is no LoRA {shown(name)}; name one of {', '.join(sorted(known))}."
            )
    found = {}
    for slot in slots:
        given = own.prompts.get(slot, own.prompts.get(role_of(slot), ()))
        texts = (given,) if isinstance(given, str) else tuple(given)
        texts = texts or _trigger_words(slot, adapters)
        if not texts:
            raise ConfigError(
                f"{who} needs a prompt that shows the {slot} LoRA alone, and its file states no "
                f"trigger words. Name one with {option} {slot}=TEXT."
            )
        found[slot] = texts
    return found


def _trigger_words(slot: str, adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """Return the trigger words of a slot's LoRA as one prompt, if it states some."""
    for source, adapter in adapters.items():
        words = [word.strip() for word in adapter.survey.origin.trigger_words]
        if slot_of(source) == slot and any(words):
            return (", ".join(filter(None, words)),)
    return ()
