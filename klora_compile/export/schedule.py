"""``schedule.json``: when each of several LoRAs acts, in the units of other tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

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


def phase_file(index: int | str, count: int | str) -> str:
    """Return the file name of one phase, counted from 1."""
    return f"phase-{index}-of-{count}.safetensors"


def is_export(name: str) -> bool:
    """Return whether ``klora export --phases`` writes files of this name."""
    return name == SCHEDULE_FILE or re.fullmatch(phase_file(r"\d+", r"\d+"), name) is not None


def schedule_json(phases: Mapping[str, tuple[Window, float]]) -> str:
    """Return the text of ``schedule.json``.

    Args:
        phases: file name -> its window of progress, and the schedule's distance from it there.
    """
    rows = [
        {
            "file": file,
            "step_fraction": [window.start, window.stop],
            "timestep_percent": [window.start, window.stop],
            "error": float(f"{error:.6g}"),  # further digits depend on the number of threads
        }
        for file, (window, error) in phases.items()
    ]
    return json.dumps({"note": NOTE, "phases": rows}, indent=2) + "\n"
