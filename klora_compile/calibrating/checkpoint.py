"""Checkpoints: how far a calibration has come, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from klora_runtime.artifact.canonical import canonical_json
from klora_runtime.artifact.replacing import replacing
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.errors import KloraError

#: The one metadata key.
_KEY = "klora_calibration"

#: Seconds between two checkpoints.
_PAUSE = 10.0


@dataclass
class Checkpoint:
    """The file of a calibration's state; without a path, nothing is kept."""

    path: Path | None
    inputs: Mapping[str, Any]
    """What determines the result; a file of other inputs is not read."""
    saved: float = field(default=0.0, init=False)

    def load(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """Return the number of finished parts and the state; None if there is nothing to go on.

        A damaged file, or one of another calibration, counts as none and is written over.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            with SafetensorsFile(self.path, "checkpoint") as file:
                key, _, done = file.metadata.get(_KEY, "").partition(" ")
            if key != self._key or not done.isdecimal():
                return None
            return int(done), dict(load_file(self.path))
        except (KloraError, OSError, ValueError):
            return None

    def save(self, done: int, tensors: Mapping[str, torch.Tensor], *, now: bool = False) -> None:
        """Write the state, at most once in a while unless ``now``.

        Raises:
            KloraError: the file cannot be written.
        """
        if self.path is None or not (now or time.monotonic() - self.saved > _PAUSE):
            return
        with replacing(self.path, overwrite=True) as new:
            save_file(dict(tensors), new, metadata={_KEY: f"{self._key} {done}"})
        self.saved = time.monotonic()

    def remove(self) -> None:
        """Remove the file after the result was written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    @property
    def _key(self) -> str:
        return hashlib.sha256(canonical_json(self.inputs).encode()).hexdigest()
