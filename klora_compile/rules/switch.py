"""LoRA Switch: one LoRA at a time, for tau steps each, in turns.

Source: Zhong et al., "Multi-LoRA Composition for Image Generation", arXiv 2402.16843: with k LoRAs
and steps t from 1, LoRA floor(((t - 1) mod (k * tau)) / tau) + 1 acts. The breakpoints are stated
in progress, (j * tau) / steps, each between the middles of two steps of that number of steps. At
another number of steps the turns keep their shares of the run, so a turn is then not tau steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.ranges import require_whole
from klora_compile.rules.rule import Choice, Rule
from klora_runtime.artifact.checks import MAX_SEGMENTS
from klora_runtime.errors import ConfigError

_MOST_STEPS = 100_000


@dataclass(frozen=True)
class SwitchRule(Rule):
    """LoRA Switch's settings. The LoRAs take turns in their order, contents first."""

    name: ClassVar[str] = "switch"
    whole: ClassVar[bool] = True
    fates: ClassVar[tuple[str, ...]] = ("in turns",)

    steps: int | None = None
    """Steps of the runs that it is for, 1 to 100000; required."""
    tau: int = 5
    """Steps of one turn, 1 or more."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.steps is None:
            raise ConfigError("steps: rule switch needs the number of steps of your runs; name it.")
        require_whole("steps", self.steps, 1, _MOST_STEPS)
        require_whole("tau", self.tau, 1, _MOST_STEPS)
        if self.steps > MAX_SEGMENTS * self.tau:
            raise ConfigError(
                f"tau: {self.steps} steps in turns of {self.tau} are more than {MAX_SEGMENTS} "
                "turns; take longer ones."
            )

    def misfit(self, slots: Sequence[str]) -> str | None:
        assert self.steps is not None
        turns = -(-self.steps // self.tau)
        if turns >= len(slots):
            return None
        return (
            f"tau: {self.steps} steps in turns of {self.tau} are {turns}, so that "
            f"{', '.join(slots[turns:])} would never act; take tau "
            f"{self.steps // len(slots) or 1} or less."
        )

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        assert self.steps is not None
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
