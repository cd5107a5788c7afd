"""What few steps leave of a schedule: how many layers still differ, and how many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from klora_compile.runs import Run
from klora_runtime.artifact.schedule import STEPLESS, Schedule

#: Numbers of steps that people take with an accelerator.
FEW = (4, 8)


@dataclass(frozen=True)
class FewSteps:
    """What is left of a schedule in a run of few steps."""

    steps: int
    shift: float | None
    """See :attr:`Run.shift`."""
    layers: int
    """Number of layers of the denoiser that act."""
    schedules: int
    """Number of different schedules among them: sequences of which LoRAs act at each step."""
    different: int
    """Number of different steps: at two equal ones, the same LoRAs act in every layer."""

    @property
    def text(self) -> str:
        """The numbers as a sentence."""
        at = ", ".join(filter(None, (f"at {self.steps}", Run(self.shift).text)))
        schedules = _counted(self.schedules, "different schedule")
        return (
            f"{at}: {schedules} (which LoRAs act at each step) among "
            f"{_counted(self.layers, 'layer')}, {_counted(self.different, 'different step')}"
        )


def few_steps(fusion: Schedule, runs: Sequence[Run]) -> tuple[FewSteps, ...]:
    """Return what is left of a schedule at 4 and at 8 steps of each run; empty if none switches."""
    timelines = [
        entry.timeline for entry in fusion.entries if entry.acts and entry.component not in STEPLESS
    ]
    found = []
    for steps in FEW if any(timeline.switches for timeline in timelines) else ():
        for run in runs:
            moments = run.progress(steps)
            rows = [
                tuple(tuple(timeline.at(moment).items()) for moment in moments)
                for timeline in timelines
            ]
            columns = zip(*rows, strict=True)
            found.append(FewSteps(steps, run.shift, len(rows), len(set(rows)), len(set(columns))))
    return tuple(found)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
