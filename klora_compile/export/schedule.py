"""``schedule.json``: when each of several LoRAs acts, in the units of other tools."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from klora_compile.runs import Run, runs_of
from klora_runtime.artifact.timeline import ClockName
from klora_runtime.errors import ConfigError

if TYPE_CHECKING:
    from klora_compile.export.averaging import Window

SCHEDULE_FILE = "schedule.json"

#: Numbers of steps for which step ranges are stated if none is named.
STEPS = (4, 8, 20, 25, 30, 50)
#: Greatest number of steps that may be named.
MAX_STEPS = 10_000

KSAMPLER_NOTE = (
    "ksampler_advanced is exact for every scheduler of ComfyUI: one KSamplerAdvanced for each "
    "phase, each with the model and its LoRA, one after another by their latents. All have the "
    "same steps, scheduler and seed; start_at_step and end_at_step are as stated. add_noise is "
    "enabled in the first one only, return_with_leftover_noise in all but the last one. Take a "
    "sampler of first order, such as euler: one that remembers earlier steps begins anew in each "
    "phase. Leave out a phase that has no entry for your number of steps."
)

PERCENT_NOTE = (
    "start_percent and end_percent are compared with the noise before a step. Under sgm_uniform, "
    "with models of flow matching, each phase begins one step late. Under beta and karras a fifth "
    "of the steps or more get the LoRA of another phase."
)

NOTE = (
    "step_fraction is exact for every sampler: of N steps, a LoRA acts in step i (from 0) where "
    "from <= (i + 1/2) / N < to. timestep_percent, the start_percent and end_percent of ComfyUI, "
    "counts timesteps and not steps: it is equal to the step fraction, to within a step, only "
    "where the sampler's timesteps are spaced linearly over its steps (schedulers normal, simple "
    "and ddim_uniform)."
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
    steps: Sequence[int] = STEPS,
) -> str:
    """Return the text of ``schedule.json``.

    Args:
        phases: file name -> its window of progress, and the schedule's distance from it there.
        clock: what progress follows.
        shift: see :func:`~klora_compile.runs.runs_of`.
        steps: the numbers of steps for which to state the step ranges; see :func:`check_steps`.

    Raises:
        ConfigError: see :func:`~klora_compile.runs.runs_of`.
    """
    runs = runs_of(clock, shift)
    rows = [
        {
            "file": file,
            **(_by_steps(window, steps) if clock == "step" else _by_noise(window, runs, steps)),
            "error": float(f"{error:.6g}"),  # further digits depend on the number of threads
        }
        for file, (window, error) in phases.items()
    ]
    stated: dict[str, Any] = {
        "note": NOTE if clock == "step" else NOISE_NOTE,
        "note_on_ksampler_advanced": KSAMPLER_NOTE,
        "note_on_percent": PERCENT_NOTE,
        **({} if clock == "step" else {"clock": clock}),
        "phases": rows,
    }
    return json.dumps(stated, indent=2) + "\n"


def check_steps(steps: Sequence[int]) -> None:
    """Refuse numbers of steps that are out of range.

    Raises:
        ConfigError: one of them is no whole number from 1 to 10000.
    """
    for each in steps:
        if not (type(each) is int and 1 <= each <= MAX_STEPS):
            raise ConfigError(
                f"steps: expected whole numbers from 1 to {MAX_STEPS}, found {each!r}."
            )


def _by_steps(window: Window, steps: Sequence[int]) -> dict[str, Any]:
    shares = [window.start, window.stop]
    return {
        "step_fraction": shares,
        "timestep_percent": shares,
        "ksampler_advanced": _ranges(window, Run(), steps),
    }


def _by_noise(window: Window, runs: Sequence[Run], steps: Sequence[int]) -> dict[str, Any]:
    levels = [1.0 - window.start, 1.0 - window.stop]
    at_shift = []
    for run in runs:
        shares = [float(f"{run.done(level):.9g}") for level in levels]
        at_shift.append(
            {
                "shift": run.shift,
                "step_fraction": shares,
                "timestep_percent": shares,
                "ksampler_advanced": _ranges(window, run, steps),
            }
        )
    return {"noise_level": levels, "at_shift": at_shift}


def _ranges(window: Window, run: Run, steps: Sequence[int]) -> list[dict[str, int]]:
    """Return the steps of a window for each number of steps that has any; the end is not in it."""
    found = []
    for count in sorted(set(steps)):
        places = run.progress(count)
        start, end = (bisect_left(places, edge) for edge in (window.start, window.stop))
        if start < end:
            found.append({"steps": count, "start_at_step": start, "end_at_step": end})
    return found
