"""Apply a compiled LoRA fusion to a diffusers pipeline.

    from klora_runtime import apply_fusion

    handle = apply_fusion(pipe, "fox-in-ink.klora.safetensors")
    image = pipe("a fox in ink").images[0]
    handle.remove()

Importing this package is cheap: torch is imported on first use of a name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora_runtime.__about__ import __version__ as __version__
from klora_runtime.lazy_names import lazy_names

if TYPE_CHECKING:
    from klora_runtime.artifact.file import load_fusion, save_fusion
    from klora_runtime.artifact.fusion import Fusion
    from klora_runtime.catalogue.catalogue import Catalogue
    from klora_runtime.catalogue.library import FusionLibrary
    from klora_runtime.errors import (
        ArtifactError,
        ConfigError,
        IncompatibleModelError,
        InUseError,
        KloraError,
    )
    from klora_runtime.pipeline.handle import FusionHandle, apply_fusion
    from klora_runtime.pipeline.report import Report

__all__ = [
    "ArtifactError",
    "Catalogue",
    "ConfigError",
    "Fusion",
    "FusionHandle",
    "FusionLibrary",
    "InUseError",
    "IncompatibleModelError",
    "KloraError",
    "Report",
    "apply_fusion",
    "load_fusion",
    "save_fusion",
]

_HOMES = {
    "ArtifactError": "klora_runtime.errors",
    "Catalogue": "klora_runtime.catalogue.catalogue",
    "ConfigError": "klora_runtime.errors",
    "Fusion": "klora_runtime.artifact.fusion",
    "FusionHandle": "klora_runtime.pipeline.handle",
    "FusionLibrary": "klora_runtime.catalogue.library",
    "InUseError": "klora_runtime.errors",
    "IncompatibleModelError": "klora_runtime.errors",
    "KloraError": "klora_runtime.errors",
    "Report": "klora_runtime.pipeline.report",
    "apply_fusion": "klora_runtime.pipeline.handle",
    "load_fusion": "klora_runtime.artifact.file",
    "save_fusion": "klora_runtime.artifact.file",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
