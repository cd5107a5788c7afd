"""Writing of exports: one LoRA for the whole sampling, or a folder with one for each phase."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_compile.export.averaging import WHOLE, Loss, ScheduleError, Window, phases
from klora_compile.export.ordinary import OrdinaryLora, ordinary_lora, spelling_of
from klora_compile.export.schedule import (
    SCHEDULE_FILE,
    STEPS,
    check_steps,
    is_export,
    phase_file,
    schedule_json,
)
from klora_compile.export.settings import ExportSettings, Keys
from klora_compile.runs import runs_of
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.replacing import replacing
from klora_runtime.artifact.tensor_file import write_tensors
from klora_runtime.errors import ConfigError

MAX_PHASES = 100


@dataclass(frozen=True)
class Exported:
    """A LoRA that was written."""

    file: str
    """File name without folders."""
    window: Window
    """Window of progress that it averages."""
    nbytes: int
    layers: int
    rank: int
    """Rank of every low-rank layer."""
    dtype: str
    keys: Keys
    schedule: Loss
    """Distance of the schedule from the average, before a smaller rank."""
    truncation: Loss | None
    """Loss by a smaller rank; None if none was requested."""

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        lost = {"schedule": self.schedule, "truncation": self.truncation}
        return {
            "file": self.file,
            "progress": [self.window.start, self.window.stop],
            "bytes": self.nbytes,
            "layers": self.layers,
            "rank": self.rank,
            "dtype": self.dtype,
            "keys": self.keys,
            **{f"{name}_error": loss and vars(loss) for name, loss in lost.items()},
        }


@dataclass(frozen=True)
class ExportedPhases:
    """The LoRAs of a folder."""

    loras: tuple[Exported, ...]
    schedule: Loss
    """Distance of the schedule from the LoRAs, each in its phase."""

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "phases": [lora.json() for lora in self.loras],
            "schedule_error": vars(self.schedule),
        }


def export_static(
    fusion: Fusion,
    path: str | os.PathLike[str],
    settings: ExportSettings | None = None,
    *,
    overwrite: bool = False,
) -> Exported:
    """Write the average of a schedule over the whole sampling as one ordinary LoRA.

    Args:
        fusion: of an artifact.
        path: the ``.safetensors`` file; equal fusions and settings give equal bytes.
        settings: settings of the export.
        overwrite: replace an existing file.

    Raises:
        KloraError: the file exists and ``overwrite`` is false, it cannot be written, or an ordinary
            LoRA cannot hold the fusion; an old file is unchanged.
    """
    settings, place = settings or ExportSettings(), Path(path)
    with replacing(place, overwrite=overwrite) as temporary:
        lora = ordinary_lora(fusion, spelling_of(fusion, settings), WHOLE, settings)
        write_tensors(temporary, lora.tensors, lora.metadata)
    lost = ScheduleError(fusion.entries).over(WHOLE, gain=settings.gain)
    return _exported(lora, place, WHOLE, settings.keys, lost)


def export_phases(
    fusion: Fusion,
    folder: str | os.PathLike[str],
    count: int,
    settings: ExportSettings | None = None,
    *,
    overwrite: bool = False,
    shift: float | None = None,
    steps: Sequence[int] = STEPS,
) -> ExportedPhases:
    """Write the averages over equal phases of the sampling as ordinary LoRAs, with a schedule.

    Args:
        fusion: of an artifact.
        folder: the folder for ``phase-K-of-N.safetensors`` and ``schedule.json``.
        count: N, 2 to 100.
        settings: settings of the export.
        overwrite: replace an existing folder, unless it has files that are not of an export.
        shift: for a fusion by the clock of the noise, the shift that ``schedule.json`` assumes,
            0.01 to 1000; by default 1 and 3, side by side.
        steps: the numbers of steps for which ``schedule.json`` states the steps of each phase, 1 to
            10000.

    Raises:
        ConfigError: ``count``, ``shift`` or ``steps`` is out of range, or the clock follows the
            steps and a shift is named.
        KloraError: see :func:`export_static`; an old folder is unchanged.
    """
    if not (type(count) is int and 2 <= count <= MAX_PHASES):
        raise ConfigError(
            f"phases: expected a whole number from 2 to {MAX_PHASES}, found {count!r}."
        )
    runs_of(fusion.clock, shift)
    check_steps(steps)
    settings, place = settings or ExportSettings(), Path(folder)
    spelling = spelling_of(fusion, settings)
    written = []
    with replacing(place, overwrite=overwrite, folder_of=is_export) as temporary:
        errors = ScheduleError(fusion.entries)
        for index, window in enumerate(phases(count), start=1):
            lora = ordinary_lora(fusion, spelling, window, settings)
            file = temporary / phase_file(index, count)
            write_tensors(file, lora.tensors, lora.metadata)
            lost = errors.over(window, gain=settings.gain)
            written.append(_exported(lora, file, window, settings.keys, lost))
        told = {each.file: (each.window, each.schedule.total) for each in written}
        text = schedule_json(told, fusion.clock, shift, steps)
        (temporary / SCHEDULE_FILE).write_text(text, encoding="ascii")
        together = errors.over(*phases(count), gain=settings.gain)
    return ExportedPhases(tuple(written), together)


def _exported(lora: OrdinaryLora, file: Path, window: Window, keys: Keys, lost: Loss) -> Exported:
    return Exported(
        file=file.name,
        window=window,
        nbytes=file.stat().st_size,
        layers=lora.layers,
        rank=lora.rank,
        dtype=str(lora.dtype).removeprefix("torch."),
        keys=keys,
        schedule=lost,
        truncation=lora.truncation,
    )
