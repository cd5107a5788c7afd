"""``klora sweep``: a sheet with a picture for each combination of settings, or a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klora_compile.commands.beside import Beside
from klora_compile.commands.lora_arguments import NamedLoras, lora_arguments
from klora_compile.commands.lora_files import Files
from klora_compile.commands.output import check_output
from klora_compile.commands.progress import layer_bar, picture_bar
from klora_compile.commands.result import json_option, print_result
from klora_compile.commands.sampling_options import (
    metadata_option,
    model_option,
    sampling_options,
)
from klora_compile.commands.search_options import Searching, search_options
from klora_compile.commands.setting_options import reading_options, reading_words
from klora_compile.commands.swept_options import SweepCommand, settings_in_order
from klora_compile.commands.user_cache import no_cache_option, user_cache
from klora_compile.extras import missing_library
from klora_compile.rules.lookup import usual_rule
from klora_compile.settings.read_options import ReadOptions
from klora_compile.sweeping.axes import CELLS, axes_of, listed_cells
from klora_compile.sweeping.grid import Grid, grid_of
from klora_compile.trying.names import RULE

if TYPE_CHECKING:
    from klora_compile.measured import MeasuredLoras
    from klora_compile.searching.command import WrittenSearch
    from klora_compile.sweeping.command import Desk, WrittenSweep

_WEIGHT = "weight."

#: Options that go to the sweep as they are, under these names.
_ASKED = ("scheduler", "mode", "missing", "device", "dtype", "trust_remote_code")


@click.command("sweep", cls=SweepCommand)
@lora_arguments
@model_option
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="What to show. Repeat it for an axis of prompts.",
)
@click.option(
    "--cells",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A list of cells as an axis: a .csv with names of settings in the first line, or a .json "
    "with a list of objects. A cell may have a label.",
)
@search_options
@sampling_options
@reading_options
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The sheet to write: .png, .jpg or .webp. Several sheets get numbers.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where each picture is kept as it comes, and from where a sweep goes on.  [default: "
    "OUTPUT without its ending, and .cells]",
)
@metadata_option
@no_cache_option
@click.option("--force", is_flag=True, help="Overwrite existing sheets.")
@json_option
def sweep_command(
    loras: tuple[Files, ...],
    content: tuple[Files, ...],
    style: tuple[Files, ...],
    always: tuple[Beside, ...],
    halves: str | None,
    both_denoisers: bool,
    weight_names: tuple[tuple[str | None, str], ...],
    model: str,
    prompts: tuple[str, ...],
    cells: Path | None,
    output: Path,
    folder: Path | None,
    no_cache: bool,
    force: bool,
    as_json: bool,
    reading: ReadOptions,
    searching: Searching | None,
    **options: Any,
) -> None:
    """Make a sheet of pictures of the LoRAs CONTENT and STYLE with several values of settings.

    A setting with several values, such as --bias -0.3,0,0.3, is an axis: the first one is the
    columns, the second one the rows, a third one several sheets. The first column is always the
    direct sum of the LoRAs. The model and the LoRAs are loaded once.

    Each picture is kept in a folder, so the same command goes on after an interruption, and more
    values make only their own pictures. A cell that fails is drawn as a blank with the reason.

    With --search N, a judge scores N combinations of settings on several seeds (--seed, by default
    0 to 7) and prompts. The sheet shows the best few beside the direct sum, with their scores. At
    the end the best one is compared with the direct sum on further seeds.
    """
    asked = {name: options.pop(name) for name in _ASKED}
    tells = not options.pop("no_metadata")
    listed = None if cells is None else (CELLS, tuple(listed_cells(cells)))
    named = ("prompt", prompts) if prompts else None
    values = settings_in_order({**options, "prompts": named, "cells": listed})
    slots = [(name.removeprefix(_WEIGHT), 1.0) for name in values if name.startswith(_WEIGHT)]
    names = NamedLoras(loras, content, style, always, halves, both_denoisers, weight_names)
    found = names.found(slots, lambda: check_output(output, force, inputs=()))
    values |= {f"{_WEIGHT}{slot}": (factor,) for slot, factor in found.factors.items()}
    count = len(found.contents) + len(found.styles)
    grid = None if searching else _grid(values, count)
    outputs = sheet_paths(output, len(grid.sheets) if grid else max(1, len(prompts)))
    for path in outputs:
        check_output(path, force, inputs=found.files)

    try:
        from klora_compile.sweeping.command import Desk, sweep_to_files
    except ModuleNotFoundError as error:
        raise missing_library("klora sweep", error) from error
    from klora_compile.trying.loras import loras_to_try

    place = output.with_suffix(".cells") if folder is None else folder
    desk = Desk(model, place, tells=tells, overwrite=force, **asked)
    with layer_bar("reading") as on_module:
        measured = loras_to_try(
            *(found.contents, found.styles),
            always=found.always,
            options=reading,
            device=desk.device,
            cache=user_cache(no_cache),
            on_module=on_module,
        )
    make: Callable[..., WrittenSweep | WrittenSearch]
    if grid is not None:
        make = partial(sweep_to_files, measured, grid, outputs, desk)
    elif searching is not None:
        words = (*names.words(), *reading_words(reading))
        make = _search(searching, values, measured, outputs, desk, words)
    with layer_bar("measuring") as on_layer, picture_bar() as on_picture:
        made = make(on_layer=on_layer, on_picture=on_picture)
    print_result(as_json, "search" if searching else "sweep", made.json, made.text)


def _search(
    searching: Searching,
    values: Mapping[str, Sequence[Any]],
    measured: MeasuredLoras,
    outputs: Sequence[Path],
    desk: Desk,
    words: Sequence[str],
) -> partial[WrittenSearch]:
    """Return a search that is ready to begin."""
    from klora_compile.calibrating.pictures import OwnPictures
    from klora_compile.searching.command import search_to_files
    from klora_compile.searching.plan import plan_of

    plan = plan_of(
        values,
        measured.adapters,
        count=searching.count,
        judge=searching.judge,
        own=OwnPictures(searching.own_prompts),
        seed=searching.seed,
        best=searching.best,
        checked=True,
    )
    return partial(search_to_files, measured, plan, outputs, desk, words)


def _grid(values: Mapping[str, Sequence[Any]], loras: int) -> Grid:
    """Return the grid of settings; those with several values are its axes."""
    axes = {name: each for name, each in values.items() if len(each) > 1 or name == CELLS}
    base = {name: each[0] for name, each in values.items() if name not in axes}
    return grid_of(axes_of(axes), {RULE: usual_rule(loras), **base})


def sheet_paths(output: Path, sheets: int) -> list[Path]:
    """Return a file for each sheet; of several, numbered from 1."""
    if sheets == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number}") for number in range(1, sheets + 1)]
