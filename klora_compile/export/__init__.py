"""Export of artifacts as ordinary LoRAs, for tools without schedules.

    from klora_compile.export import ExportSettings, export_phases, export_static
    from klora_runtime import load_fusion

    fusion = load_fusion("fox-in-ink.klora.safetensors")
    export_static(fusion, "fox-in-ink.safetensors", ExportSettings(keys="peft", rank=32))
    export_phases(fusion, "fox-in-ink", 4)

An ordinary LoRA cannot hold a schedule: its factors are the average of the schedule over the whole
sampling or over one phase of it. Every report states how far the schedule is from the average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora_runtime.lazy_names import lazy_names

if TYPE_CHECKING:
    from klora_compile.export.settings import ExportSettings
    from klora_compile.export.writing import Exported, ExportedPhases, export_phases, export_static

__all__ = ["ExportSettings", "Exported", "ExportedPhases", "export_phases", "export_static"]

_HOMES = {
    "ExportSettings": "klora_compile.export.settings",
    "Exported": "klora_compile.export.writing",
    "ExportedPhases": "klora_compile.export.writing",
    "export_phases": "klora_compile.export.writing",
    "export_static": "klora_compile.export.writing",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
