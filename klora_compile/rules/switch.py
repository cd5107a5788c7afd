"""LoRA Switch: the LoRAs take turns of tau steps each.

Source: Zhong et al., "Multi-LoRA Composition for Image Generation", arXiv 2402.16843: with k LoRAs
and steps t from 1, LoRA floor(((t - 1) mod (k * tau)) / tau) + 1 acts. The breakpoints are progress
values, (j * tau) / steps, each between the middles of two steps of a run of ``steps``. In a run of
another number of steps the turns keep their shares of the run, so a turn is not tau steps then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from klora_compile.fields import Whole, setting
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import Choice
from klora_compile.rules.kit.papers import Paper, preprint
from klora_compile.rules.rule import Rule
from klora_runtime.artifact.timeline import MAX_SEGMENTS
from klora_runtime.errors import ConfigError

_STEPS = Whole(1, 100_000)


@dataclass(frozen=True, kw_only=True)
class Switch(Rule):
    """LoRA Switch (arXiv 2402.16843): the LoRAs take turns in their order, contents first."""

    name: ClassVar[str] = "switch"
    title: ClassVar[str] = "LoRA Switch"
    sentence: ClassVar[str] = "One acts at a time, for some steps each, in turns"
    papers: ClassVar[tuple[Paper, ...]] = (
        preprint("2402.16843", "zhong2024multilora", "Multi-LoRA Composition for Image Generation"),
    )
    fates: ClassVar[Mapping[str, str]] = {"in turns": "its LoRAs one at a time, in turns"}
    whole: ClassVar[bool] = True

    steps: int = field(metadata=setting("The number of steps of your runs.", _STEPS))
    tau: int = field(default=5, metadata=setting("Steps of one LoRA's turn.", _STEPS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps > MAX_SEGMENTS * self.tau:
            raise ConfigError(
                f"tau: {self.steps} steps in turns of {self.tau} make more than {MAX_SEGMENTS} "
                f"turns; set tau to {-(-self.steps // MAX_SEGMENTS)} or more."
            )

    @property
    def made_for_steps(self) -> int | None:
        return self.steps

    def misfit(self, slots: Sequence[str]) -> str | None:
        turns = -(-self.steps // self.tau)
        if turns >= len(slots):
            return None
        return (
            f"tau: {self.steps} steps in turns of {self.tau} end before the turn of "
            f"{', '.join(slots[turns:])}; set tau to {self.steps // len(slots) or 1} or less."
        )

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        order = list(layer.sides)
        turns = range(-(-self.steps // self.tau))
        present = layer.present
        segments = []
        for turn in turns:
            slot = order[turn % len(order)]
            row = {slot: 1.0} if slot in present else {}
            segments.append(((turn * self.tau) / self.steps, row))
        return Choice("in turns", tuple(segments))

    def text(self) -> str:
        return (
            f"turns of {self.tau} of {self.steps} steps; "
            "at another number of steps they stretch with it"
        )
