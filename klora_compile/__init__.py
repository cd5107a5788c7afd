"""Compile LoRAs into one fused artifact with a schedule, K-LoRA's or another rule's.

    from klora_compile import Klora, Settings, compile_fusion, compress
    from klora_runtime import save_fusion

    rule, settings = Klora(pattern="s*"), Settings(style_weight=0.8)
    fusion = compile_fusion("fox.safetensors", "ink.safetensors", rule, settings)
    save_fusion(compress(fusion, 0.01), "fox-in-ink.klora.safetensors")

Importing this package is cheap; torch is imported with the first use of a name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from klora_compile.rules.catalogue import *  # noqa: F403  # every rule is public
from klora_compile.rules.lookup import RULES as _RULES

if TYPE_CHECKING:
    from klora_compile.compiler import compile_fusion
    from klora_compile.export.settings import ExportSettings
    from klora_compile.export.writing import Exported, ExportedPhases, export_phases, export_static
    from klora_compile.reading.adapter import Adapter, read_adapter
    from klora_compile.rescheduling import reschedule
    from klora_compile.rules.rule import Rule
    from klora_compile.settings.read_options import ReadOptions
    from klora_compile.settings.shared import Settings
    from klora_compile.storing.compress import compress
    from klora_compile.storing.thin import thin
    from klora_compile.verify import verify_fusion
    from klora_runtime.artifact.fusion import Fusion
    from klora_runtime.errors import ConfigError, KloraError, LoraError, PairingError

__all__ = [
    "Adapter",
    "ConfigError",
    "ExportSettings",
    "Exported",
    "ExportedPhases",
    "Fusion",
    "KloraError",
    "LoraError",
    "PairingError",
    "ReadOptions",
    "Rule",
    "Settings",
    "compile_fusion",
    "compress",
    "export_phases",
    "export_static",
    "read_adapter",
    "reschedule",
    "thin",
    "verify_fusion",
]
__all__ += [kind.__name__ for kind in _RULES.values()]

_HOMES = {
    "Adapter": "klora_compile.reading.adapter",
    "ConfigError": "klora_runtime.errors",
    "ExportSettings": "klora_compile.export.settings",
    "Exported": "klora_compile.export.writing",
    "ExportedPhases": "klora_compile.export.writing",
    "Fusion": "klora_runtime.artifact.fusion",
    "KloraError": "klora_runtime.errors",
    "LoraError": "klora_runtime.errors",
    "PairingError": "klora_runtime.errors",
    "ReadOptions": "klora_compile.settings.read_options",
    "Rule": "klora_compile.rules.rule",
    "Settings": "klora_compile.settings.shared",
    "compile_fusion": "klora_compile.compiler",
    "compress": "klora_compile.storing.compress",
    "export_phases": "klora_compile.export.writing",
    "export_static": "klora_compile.export.writing",
    "read_adapter": "klora_compile.reading.adapter",
    "reschedule": "klora_compile.rescheduling",
    "thin": "klora_compile.storing.thin",
    "verify_fusion": "klora_compile.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
