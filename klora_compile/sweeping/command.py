"""A whole run of ``klora sweep``: load the model, sweep, write the sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from klora_compile.measured import MeasuredLoras
from klora_compile.measuring.statistics import OnLayer
from klora_compile.sampling.album import check_ending, write_picture
from klora_compile.sampling.pipeline import load_pipeline, use_scheduler
from klora_compile.sweeping.grid import Grid
from klora_compile.sweeping.result import OnPicture, Sweep
from klora_compile.sweeping.run import How, swept
from klora_runtime.errors import shown


@dataclass(frozen=True)
class Desk:
    """The model of a sweep, and where its pictures go."""

    model: str
    folder: Path
    scheduler: str | None = None
    mode: str = "auto"
    missing: Literal["error", "skip"] = "error"
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    tells: bool = True
    """Whether a PNG says how it was made."""
    overwrite: bool = False
    """Whether to replace existing sheets."""


@dataclass(frozen=True)
class WrittenSweep:
    """A sweep, and the files of its sheets."""

    sweep: Sweep
    outputs: Sequence[Path]
    folder: Path

    def text(self) -> str:
        """Return a few lines for people."""
        grid = self.sweep.grid
        size = f"{len(grid.columns)} columns by {len(grid.rows)} rows"
        lines = [f"wrote {', '.join(shown(path) for path in self.outputs)}: {size}"]
        failed = [cell for cell in self.sweep.cells if cell.picture is None]
        lines += [f"failed: {shown(cell.name)}: {shown(cell.error, limit=500)}" for cell in failed]
        lines += self.sweep.times()
        return "\n".join([*lines, f"the pictures are in {shown(self.folder)}"])

    def json(self) -> Mapping[str, Any]:
        """Return the index, and where everything is, as JSON values."""
        files = {"outputs": list(map(str, self.outputs)), "folder": str(self.folder)}
        return {**files, **self.sweep.json()}


def sweep_to_files(
    loras: MeasuredLoras,
    grid: Grid,
    outputs: Sequence[Path],
    desk: Desk,
    on_layer: OnLayer | None = None,
    on_picture: OnPicture | None = None,
) -> WrittenSweep:
    """Sweep, and write the sheets.

    Args:
        loras: the LoRAs.
        grid: the cells.
        outputs: a file for each sheet.
        desk: model, folder and options.
        on_layer: see :class:`~klora_compile.sweeping.run.How`.
        on_picture: called before each picture that is made.

    Raises:
        KloraError: the model cannot be loaded, or see :func:`~klora_compile.sweeping.run.swept`; or
            a sheet cannot be written. The pictures that were made are in the folder.
    """
    check_sheets(outputs)
    pipe, how = opened(desk, loras, on_layer)
    made = swept(pipe, loras, grid, how, on_picture)
    for number, path in enumerate(outputs):
        write_picture(made.sheet(number), path, overwrite=desk.overwrite)
    return WrittenSweep(made, outputs, desk.folder)


def check_sheets(outputs: Sequence[Path]) -> None:
    """Refuse files of sheets whose names end like no picture.

    Raises:
        ConfigError: a name does.
    """
    for path in outputs:
        check_ending(path, total=1, videos=False)


def opened(desk: Desk, loras: MeasuredLoras, on_layer: OnLayer | None) -> tuple[Any, How]:
    """Load the model of a desk; return the pipeline, and how cells are made with it.

    Raises:
        KloraError: the model cannot be loaded.
    """
    pipe = load_pipeline(
        desk.model,
        loras.components,
        device=desk.device,
        dtype=desk.dtype,
        trust_remote_code=desk.trust_remote_code,
    )
    if desk.scheduler is not None:
        use_scheduler(pipe, desk.scheduler)
    return pipe, How(
        folder=desk.folder,
        mode=desk.mode,
        missing=desk.missing,
        scheduler=desk.scheduler,
        dtype=desk.dtype,
        tells=desk.tells,
        on_layer=on_layer,
    )
