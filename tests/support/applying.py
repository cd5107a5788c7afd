"""``apply_fusion`` as tests of both modes take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.layers.live_fusion import LiveFusion
from klora_runtime.pipeline.handle import FusionHandle


class Apply(Protocol):
    """``apply_fusion`` in one mode."""

    def __call__(
        self, pipe: Any, path_or_fusion: Fusion | Path, **options: Any
    ) -> FusionHandle: ...


def live_of(handle: FusionHandle) -> LiveFusion:
    """What a handle has on the live layers, to look at and to move without a scheduler."""
    return handle._live
