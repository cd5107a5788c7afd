"""Sweeps: a picture for each combination of settings, beside those of the plain sum.

from klora_compile.sweeping import sweep

axes = {"bias": [-0.3, 0, 0.3], "weight.style": [0.6, 1]}
swept = sweep(pipe, "fox.safetensors", "ink.safetensors", axes, prompt="a fox in ink")
swept.sheet().save("grid.png")
swept.cells[0].settings, swept.cells[0].picture
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora_runtime.lazy_names import lazy_names

if TYPE_CHECKING:
    from klora_compile.sweeping.from_python import sweep
    from klora_compile.sweeping.result import Sweep, SweptCell

__all__ = ["Sweep", "SweptCell", "sweep"]

_HOMES = {
    "Sweep": "klora_compile.sweeping.result",
    "SweptCell": "klora_compile.sweeping.result",
    "sweep": "klora_compile.sweeping.from_python",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
