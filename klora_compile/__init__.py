"""Compile LoRAs into one fused artifact with a schedule by K-LoRA or another rule.

    from klora_compile import Settings, compile_fusion, compress
    from klora_compile.rules import Klora
    from klora_runtime import save_fusion

    rule, settings = Klora(pattern="s*"), Settings(style_weight=0.8)
    fusion = compile_fusion("fox.safetensors", "ink.safetensors", rule, settings)
    save_fusion(compress(fusion, 0.01), "fox-in-ink.klora.safetensors")

Rules are in :mod:`klora_compile.rules`; :mod:`klora_compile.export` writes ordinary LoRAs for other
tools. Importing these packages is cheap: torch is imported on first use of a name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora_runtime.lazy_names import lazy_names

if TYPE_CHECKING:
    from klora_compile.calibrating.fusion import calibrate_fusion
    from klora_compile.calibrating.pictures import OwnPictures
    from klora_compile.compiler import compile_fusion
    from klora_compile.halves import Halves
    from klora_compile.reading.adapter import Adapter, read_adapter
    from klora_compile.rescheduling import reschedule
    from klora_compile.settings.read_options import ReadOptions
    from klora_compile.settings.shared import Settings
    from klora_compile.storing.compress import compress
    from klora_compile.storing.dropping import drop_unused
    from klora_compile.storing.thin import thin
    from klora_compile.verify import verify_fusion
    from klora_runtime.artifact.fusion import Fusion
    from klora_runtime.errors import ConfigError, KloraError, LoraError, PairingError

__all__ = [
    "Adapter",
    "ConfigError",
    "Fusion",
    "Halves",
    "KloraError",
    "LoraError",
    "OwnPictures",
    "PairingError",
    "ReadOptions",
    "Settings",
    "calibrate_fusion",
    "compile_fusion",
    "compress",
    "drop_unused",
    "read_adapter",
    "reschedule",
    "thin",
    "verify_fusion",
]

_HOMES = {
    "Adapter": "klora_compile.reading.adapter",
    "ConfigError": "klora_runtime.errors",
    "Fusion": "klora_runtime.artifact.fusion",
    "Halves": "klora_compile.halves",
    "KloraError": "klora_runtime.errors",
    "LoraError": "klora_runtime.errors",
    "OwnPictures": "klora_compile.calibrating.pictures",
    "PairingError": "klora_runtime.errors",
    "ReadOptions": "klora_compile.settings.read_options",
    "Settings": "klora_compile.settings.shared",
    "calibrate_fusion": "klora_compile.calibrating.fusion",
    "compile_fusion": "klora_compile.compiler",
    "compress": "klora_compile.storing.compress",
    "drop_unused": "klora_compile.storing.dropping",
    "read_adapter": "klora_compile.reading.adapter",
    "reschedule": "klora_compile.rescheduling",
    "thin": "klora_compile.storing.thin",
    "verify_fusion": "klora_compile.verify",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
