"""``klora sweep``: a sheet with a picture for each combination of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from klora_compile.commands.setting_options import reading_options
from klora_compile.commands.swept_options import SweepCommand, settings_in_order
from klora_compile.commands.user_cache import no_cache_option, user_cache
from klora_compile.extras import missing_library
from klora_compile.rules.lookup import usual_rule
from klora_compile.settings.read_options import ReadOptions
from klora_compile.sweeping.axes import CELLS, axes_of, listed_cells
from klora_compile.sweeping.grid import grid_of
from klora_compile.trying.names import RULE

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
    **options: Any,
) -> None:
    """Make a sheet of pictures of the LoRAs CONTENT and STYLE with several values of settings.

    A setting with several values, such as --bias -0.3,0,0.3, is an axis: the first one is the
    columns, the second one the rows, a third one several sheets. The first column is always the
    direct sum of the LoRAs. The model and the LoRAs are loaded once.

    Each picture is kept in a folder, so the same command goes on after an interruption, and more
    values make only their own pictures. A cell that fails is drawn as a blank with the reason.
    """
    asked = {name: options.pop(name) for name in _ASKED}
    tells = not options.pop("no_metadata")
    listed = None if cells is None else (CELLS, tuple(listed_cells(cells)))
    named = ("prompt", prompts) if prompts else None
    values = settings_in_order({**options, "prompts": named, "cells": listed})
    axes = {name: each for name, each in values.items() if len(each) > 1 or name == CELLS}
    base = {name: each[0] for name, each in values.items() if name not in axes}
    slots = [(name.removeprefix(_WEIGHT), 1.0) for name in values if name.startswith(_WEIGHT)]
    found = NamedLoras(loras, content, style, always, halves, both_denoisers, weight_names).found(
        slots, lambda: check_output(output, force, inputs=())
    )
    base |= {f"{_WEIGHT}{slot}": factor for slot, factor in found.factors.items()}
    count = len(found.contents) + len(found.styles)
    grid = grid_of(axes_of(axes), {RULE: usual_rule(count), **base})
    outputs = sheet_paths(output, len(grid.sheets))
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
    with layer_bar("measuring") as on_layer, picture_bar() as on_picture:
        made = sweep_to_files(measured, grid, outputs, desk, on_layer, on_picture)
    print_result(as_json, "sweep", made.json, made.text)


def sheet_paths(output: Path, sheets: int) -> list[Path]:
    """Return a file for each sheet; of several, numbered from 1."""
    if sheets == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number}") for number in range(1, sheets + 1)]
