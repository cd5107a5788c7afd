"""Compile LoRAs into one fused artifact with a schedule, K-LoRA's or another rule's.

    from klora_compile import Config, compile_fusion
    from klora_runtime import save_fusion

    config = Config.named("klora", pattern="s*")
    fusion = compile_fusion("fox.safetensors", "ink.safetensors", config)
    save_fusion(fusion, "fox-in-ink.klora.safetensors")

Importing this package is cheap; torch is imported with the first use of a name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klora_compile.compiler import compile_fusion
    from klora_compile.reading.adapter import read_adapter
    from klora_compile.rescheduling import reschedule
    from klora_compile.settings.config import Config

__all__ = ["Config", "compile_fusion", "read_adapter", "reschedule"]

_HOMES = {
    "Config": "klora_compile.settings.config",
    "compile_fusion": "klora_compile.compiler",
    "read_adapter": "klora_compile.reading.adapter",
    "reschedule": "klora_compile.rescheduling",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
