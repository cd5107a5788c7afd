"""The run of a sweep: measure once, swap between cells, keep each picture, go on after failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from klora_compile.measured import MeasuredLoras
from klora_compile.measuring.statistics import OnLayer
from klora_compile.planning.pairing import check_slots
from klora_compile.sampling.pictures import Request, makes_videos
from klora_compile.sampling.stating import making_of
from klora_compile.settings.config import Config
from klora_compile.slots import slots_of
from klora_compile.sweeping.axes import words
from klora_compile.sweeping.folder import CellFolder
from klora_compile.sweeping.grid import Cell, Grid
from klora_compile.sweeping.inputs import inputs_of
from klora_compile.sweeping.result import OnPicture, Sweep, SweptCell
from klora_compile.trying.studio import Studio
from klora_runtime.errors import ConfigError, KloraError, shown

if TYPE_CHECKING:
    from klora_compile.sampling.making import Making
    from klora_compile.trying.studio import Picture


@dataclass(frozen=True)
class How:
    """How a sweep runs."""

    folder: Path | None = None
    """Keeps the pictures; None to keep them in memory only."""
    mode: str = "auto"
    missing: Literal["error", "skip"] = "error"
    scheduler: str | None = None
    """The scheduler that was asked for, which the pipeline has already."""
    dtype: str = "auto"
    """The type that was asked for, which the pipeline has already."""
    tells: bool = True
    """Whether a PNG says how it was made."""
    on_picture: OnPicture | None = None
    on_layer: OnLayer | None = None
    """See :data:`~klora_compile.measuring.statistics.OnLayer`."""


def swept(pipe: Any, loras: MeasuredLoras, grid: Grid, how: How) -> Sweep:
    """Make the pictures of a grid.

    Args:
        pipe: the pipeline, which is bare again afterwards.
        loras: the LoRAs.
        grid: the cells.
        how: how it runs.

    Raises:
        KloraError: the folder holds pictures of other inputs, or cannot be written; or every cell
            failed.
    """
    folder = None
    if how.folder is not None:
        folder = CellFolder(how.folder, inputs_of(pipe, loras.adapters, how.mode))
    video = makes_videos(pipe)
    done = dict(_there(grid, folder, video=video))
    first = {cell.trial.key: cell for cell in reversed(grid.cells)}
    left = [cell for cell in _in_order(grid.cells, loras) if first[cell.trial.key] is cell]
    left = [cell for cell in left if cell.trial.key not in done]
    loras.measure(_measurable(left, loras), on_layer=how.on_layer)
    with Studio(pipe, loras, mode=how.mode, missing=how.missing) as studio:
        for number, cell in enumerate(left):
            if how.on_picture is not None:
                how.on_picture(cell.name, len(left) - number)
            done[cell.trial.key] = _made(studio, cell, folder, how)
    cells = tuple(_placed(done[cell.trial.key], cell) for cell in grid.cells)
    _refuse_all_failed(cells)
    result = Sweep(grid, cells, _title(grid, loras))
    if folder is not None:
        folder.index(result.json())
    return result


def _there(
    grid: Grid, folder: CellFolder | None, *, video: bool
) -> Iterator[tuple[str, SweptCell]]:
    """Yield the cells whose pictures an earlier sweep made."""
    if folder is None:
        return
    for cell in grid.cells:
        picture = folder.picture(cell.trial, video=video)
        if picture is not None:
            file = folder.path(cell.trial, video=video)
            yield cell.trial.key, replace(_empty(cell), picture=picture, file=file)


def _in_order(cells: Sequence[Cell], loras: MeasuredLoras) -> list[Cell]:
    """Return cells so that those with equal derived slots follow each other."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        notes = loras.notes(loras.settled(cell.trial.config))
        groups.setdefault(tuple(notes.values()), []).append(cell)
    return [cell for group in groups.values() for cell in group]


def _measurable(cells: Iterable[Cell], loras: MeasuredLoras) -> Iterator[Config]:
    """Yield the configs of cells whose rules take these LoRAs; the others fail when they come."""
    for cell in cells:
        config = cell.trial.config
        try:
            check_slots(slots_of(loras.adapters), config.rule, config.settings)
        except ConfigError:
            continue
        yield config


def _made(studio: Studio, cell: Cell, folder: CellFolder | None, how: How) -> SweptCell:
    """Make the picture of a cell, or say why that failed."""
    try:
        made = studio.picture(cell.trial)
        told = _making(studio, cell, made, how) if how.tells else None
    except (KloraError, RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        return replace(_empty(cell), error=text)
    return replace(
        _empty(cell),
        picture=made.shot.frames[len(made.shot.frames) // 2],
        file=None if folder is None else folder.keep(cell.trial, made.shot, told),
        mode=made.mode,
        seconds=made.shot.seconds,
        changing=made.changing,
        deriving=made.deriving,
    )


def _making(studio: Studio, cell: Cell, made: Picture, how: How) -> Making:
    trial = cell.trial
    return making_of(
        studio.pipe,
        studio.fusion(trial.config),
        Request((trial.prompt,), trial.seed, 1, trial.call),
        files={name: each.survey.path for name, each in studio.loras.adapters.items()},
        scheduler=how.scheduler,
        mode=made.mode,
        missing=how.missing,
        dtype=how.dtype,
    )


def _empty(cell: Cell) -> SweptCell:
    places = cell.sheet, cell.row, cell.column
    return SweptCell(cell.name, *places, cell.settings, cell.idle, cell.repeats, None)


def _placed(found: SweptCell, cell: Cell) -> SweptCell:
    """Return what was found for a trial in the place of one of its cells."""
    empty = _empty(cell)
    names = ("name", "sheet", "row", "column", "settings", "idle", "repeats")
    return replace(found, **{name: getattr(empty, name) for name in names})


def _refuse_all_failed(cells: Sequence[SweptCell]) -> None:
    if all(cell.picture is None for cell in cells):
        raise KloraError(f"every cell failed; the first one, {cells[0].name}: {cells[0].error}")


def _title(grid: Grid, loras: MeasuredLoras) -> str:
    files = " + ".join(shown(each.survey.path.name) for each in loras.adapters.values())
    return ": ".join(filter(None, [files, words(grid.common)]))
