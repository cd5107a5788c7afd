"""The run of a sweep: measure once, swap between cells, keep each picture, go on after failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    on_layer: OnLayer | None = None
    """See :data:`~klora_compile.measuring.statistics.OnLayer`."""


class CellMaker:
    """A pipeline with LoRAs, and a folder that keeps pictures; it makes the pictures of cells.

    A context manager, which leaves the pipeline bare.

    Args:
        pipe: the pipeline.
        loras: the LoRAs.
        how: how it runs.

    Raises:
        KloraError: the folder holds pictures of other inputs, or cannot be written.
    """

    def __init__(self, pipe: Any, loras: MeasuredLoras, how: How) -> None:
        self._loras, self._how = loras, how
        self._video = makes_videos(pipe)
        self._folder: CellFolder | None = None
        if how.folder is not None:
            self._folder = CellFolder(how.folder, inputs_of(pipe, loras.adapters, how.mode))
        self._studio = Studio(pipe, loras, mode=how.mode, missing=how.missing)

    def __enter__(self) -> CellMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self._studio.close()

    def each(
        self, cells: Sequence[Cell], on_picture: OnPicture | None
    ) -> Iterator[tuple[Cell, SweptCell]]:
        """Yield the first cell of each trial, and itself with its picture, as soon as it is there.

        Pictures that the folder has come first; then those of equal derived slots follow each
        other. A cell that fails says why.

        Args:
            cells: the cells.
            on_picture: see :data:`~klora_compile.sweeping.result.OnPicture`.

        Raises:
            KloraError: a picture cannot be written, or what the rules need cannot be measured.
        """
        first = {cell.trial.key: cell for cell in reversed(cells)}
        left = []
        for cell in _in_order([*reversed(first.values())], self._loras):
            there = self._there(cell)
            if there is None:
                left.append(cell)
            else:
                yield cell, there
        measurable = _measurable(left, self._loras)
        self._loras.measure(measurable, on_layer=self._how.on_layer)
        for number, cell in enumerate(left):
            if on_picture is not None:
                on_picture(cell.name, len(left) - number)
            yield cell, _made(self._studio, cell, self._folder, self._how)

    def index(self, facts: Mapping[str, Any]) -> None:
        """Write an index into the folder, if there is one.

        Raises:
            KloraError: it cannot be written.
        """
        if self._folder is not None:
            self._folder.index(facts)

    def _there(self, cell: Cell) -> SweptCell | None:
        """Return a cell whose picture was made before; None if it was not."""
        if self._folder is None:
            return None
        picture = self._folder.picture(cell.trial, video=self._video)
        if picture is None:
            return None
        file = self._folder.path(cell.trial, video=self._video)
        return replace(_empty(cell), picture=picture, file=file)


def swept(
    pipe: Any, loras: MeasuredLoras, grid: Grid, how: How, on_picture: OnPicture | None = None
) -> Sweep:
    """Make the pictures of a grid.

    Args:
        pipe: the pipeline, which is bare again afterwards.
        loras: the LoRAs.
        grid: the cells.
        how: how it runs.
        on_picture: called before each picture that is made.

    Raises:
        KloraError: the folder holds pictures of other inputs, or cannot be written; or every cell
            failed.
    """
    with CellMaker(pipe, loras, how) as maker:
        made = maker.each(grid.cells, on_picture)
        done = {cell.trial.key: found for cell, found in made}
        cells = tuple(placed(done[cell.trial.key], cell) for cell in grid.cells)
        _refuse_all_failed(cells)
        result = Sweep(grid, cells, title_of(grid.common, loras))
        maker.index(result.json())
    return result


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


def placed(found: SweptCell, cell: Cell) -> SweptCell:
    """Return what was found for a trial in the place of one of its cells."""
    empty = _empty(cell)
    names = ("name", "sheet", "row", "column", "settings", "idle", "repeats")
    return replace(found, **{name: getattr(empty, name) for name in names})


def _refuse_all_failed(cells: Sequence[SweptCell]) -> None:
    if all(cell.picture is None for cell in cells):
        raise KloraError(f"every cell failed; the first one, {cells[0].name}: {cells[0].error}")


def title_of(common: Mapping[str, Any], loras: MeasuredLoras) -> str:
    """Return a line with the LoRAs, and the settings that all cells have."""
    files = " + ".join(shown(each.survey.path.name) for each in loras.adapters.values())
    return ": ".join(filter(None, [files, words(common)]))
