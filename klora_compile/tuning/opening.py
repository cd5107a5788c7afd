"""Opening of a page: the LoRAs are read, the model is loaded, and both come to one desk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from klora_compile.reading.adapter import OnModule
from klora_compile.sampling.pipeline import load_pipeline, use_scheduler
from klora_compile.settings.read_options import ReadOptions
from klora_compile.sources import Lora
from klora_compile.trying.loras import loras_to_try
from klora_compile.trying.studio import Studio
from klora_compile.tuning.desk import Desk


@dataclass(frozen=True)
class Opening:
    """What a page is opened with."""

    contents: Sequence[Lora]
    styles: Sequence[Lora]
    beside: Mapping[str, Lora]
    """Name -> LoRA that always acts."""
    reading: ReadOptions
    model: str
    """See :func:`~klora_compile.sampling.pipeline.load_pipeline`."""
    trust_remote_code: bool = False
    scheduler: str | None = None
    mode: str = "auto"
    missing: Literal["error", "skip"] = "error"
    device: str = "auto"
    dtype: str = "auto"
    cache: Path | None = None
    """A folder that keeps statistics; None to keep nothing."""

    def desk(self, on_module: OnModule | None = None) -> Desk:
        """Read the LoRAs, load the model, and put both on a desk.

        Args:
            on_module: called after each module that was read.

        Raises:
            ConfigError: the device or the scheduler is unknown, or the model makes videos.
            LoraError: a file cannot be read completely.
            PairingError: the LoRAs are for different models.
            KloraError: the model cannot be loaded.
        """
        loras = loras_to_try(
            self.contents,
            self.styles,
            always=self.beside,
            options=self.reading,
            device=self.device,
            cache=self.cache,
            on_module=on_module,
        )
        pipe = load_pipeline(
            self.model,
            loras.components,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        if self.scheduler is not None:
            use_scheduler(pipe, self.scheduler)
        return Desk(Studio(pipe, loras, mode=self.mode, missing=self.missing))
