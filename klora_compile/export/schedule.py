"""``schedule.json``: when each of several LoRAs acts, in the units of other tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from klora_compile.runs import Run, runs_of
from klora_runtime.artifact.timeline import ClockName

if TYPE_CHECKING:
    from klora_compile.export.averaging import Window

SCHEDULE_FILE = "schedule.json"

NOTE = (
    "step_fraction is exact for every sampler: of N steps, a LoRA acts in step i (from 0) where "
    "from <= (i + 1/2) / N < to. timestep_percent, the start_percent and end_percent of ComfyUI, "
    "counts timesteps and not steps: it is equal to the step fraction only where the sampler's "
    "timesteps are spaced linearly over its steps (schedulers such as normal, simple and "
    "ddim_uniform, not karras or exponential)."
)

NOISE_NOTE = (
    "noise_level is exact for every sampler: a LoRA acts in the steps of which the middle noise "
    "level (sigma for flow matching, timestep / training steps for other models) is at most the "
    "first number and above the second. Where that is among the steps depends on the shift of the "
    "sampler's schedule: at_shift assumes one, for sigma = shift u / (1 + (shift - 1) u), u "
    "falling linearly over the steps. There step_fraction is the share of the steps that is done, "
    "to within a step, and timestep_percent the start_percent and end_percent of ComfyUI, for a "
    "model of that shift; for models that are no flow matching take shift 1."
)


def phase_file(index: int | str, count: int | str) -> str:
    """Return the file name of one phase, counted from 1."""
    return f"phase-{index}-of-{count}.safetensors"


def is_export(name: str) -> bool:
    """Return whether ``klora export --phases`` writes files of this name."""
    return name == SCHEDULE_FILE or re.fullmatch(phase_file(r"\d+", r"\d+"), name) is not None


def schedule_json(
    phases: Mapping[str, tuple[Window, float]],
    clock: ClockName = "step",
    shift: float | None = None,
) -> str:
    """Return the text of ``schedule.json``.

    Args:
        phases: file name -> its window of progress, and the schedule's distance from it there.
        clock: what progress follows.
        shift: see :func:`~klora_compile.runs.runs_of`.

    Raises:
        ConfigError: see :func:`~klora_compile.runs.runs_of`.
    """
    runs = runs_of(clock, shift)
    rows = [
        {
            "file": file,
            **(_by_steps(window) if clock == "step" else _by_noise(window, runs)),
            "error": float(f"{error:.6g}"),  # further digits depend on the number of threads
        }
        for file, (window, error) in phases.items()
    ]
    stated: dict[str, Any] = {"note": NOTE, "phases": rows}
    if clock != "step":
        stated = {"note": NOISE_NOTE, "clock": clock, "phases": rows}
    return json.dumps(stated, indent=2) + "\n"


def _by_steps(window: Window) -> dict[str, Any]:
    shares = [window.start, window.stop]
    return {"step_fraction": shares, "timestep_percent": shares}


def _by_noise(window: Window, runs: Sequence[Run]) -> dict[str, Any]:
    levels = [1.0 - window.start, 1.0 - window.stop]
    at_shift = []
    for run in runs:
        shares = [float(f"{run.done(level):.9g}") for level in levels]
        at_shift.append({"shift": run.shift, "step_fraction": shares, "timestep_percent": shares})
    return {"noise_level": levels, "at_shift": at_shift}
