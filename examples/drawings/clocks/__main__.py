"""Draw and judge both clocks at few steps and several shifts; a stopped run goes on where it was.

    python -m drawings.clocks PACKAGES RUN LORAS OUT entangled

RUN, LORAS and OUT are those of the table. OUT/clocks-REGIME.md has the result, on tuning subjects.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from drawings.base.subjects import STYLES, TUNING_SUBJECTS
from drawings.clocks.rows import MANY, PLACES, ROWS, SHIFTS, Place
from drawings.clocks.written import markdown
from drawings.judges.fitted import Judges
from drawings.loras.recipes import Regime
from drawings.material import drawing
from drawings.table.drawing import Studio
from drawings.table.ingredients import digests, material_of
from drawings.table.kept import Kept, Results, Verdicts
from drawings.table.places import places
from drawings.table.rows import Cell, Row, files


@click.command()
@places
@click.option("--subjects", default=len(TUNING_SUBJECTS), show_default=True, help="The first ones.")
@click.option("--seeds", default=2, show_default=True, help="Pictures per cell.")
@click.option("--guidance", default=3.0, show_default=True)
@click.option("--threads", default=1, show_default=True, help="On the CPU.")
def main(
    packages: Path,
    run: Path,
    loras: Path,
    out: Path,
    regime: str,
    subjects: int,
    seeds: int,
    guidance: float,
    threads: int,
) -> None:
    """Compare clocks with the base and judges in RUN and the LoRAs in LORAS/REGIME."""
    torch.set_num_threads(threads)
    folder = loras / regime
    try:
        material = material_of(packages, Regime(regime), TUNING_SUBJECTS[:subjects], folder)
        made_with: dict[str, Any] = {"seeds": seeds, "guidance": guidance}
        kept = Kept(out / f"clocks-{regime}.jsonl")
        found = kept.open(made_with | digests(run, folder, material))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    pipe = DiffusionPipeline.from_pretrained(run / "base")
    pipe.set_progress_bar_config(disable=True)
    studio = Studio(pipe, Judges.load(run / "judges.pt"), folder, out, seeds, MANY, guidance)
    for row in ROWS:
        for cell in row.cells(material):
            truth = drawing(packages, STYLES[cell.style], cell.subject)
            if truth is not None:
                _draw(studio, row, cell, truth, kept, found)
    text = markdown(found)
    (out / f"clocks-{regime}.md").write_text(text, encoding="utf-8")
    click.echo(text)


def _draw(studio: Studio, row: Row, cell: Cell, truth: Tensor, kept: Kept, found: Results) -> None:
    """Draw a cell at every place that is not kept yet."""
    name = f"{cell.subject}, {cell.style}"
    missing = [place for place in PLACES if name not in found.get(place.of(row.name), {})]
    if not missing:
        return
    with row.act(studio.pipe, files(studio.loras, cell)):
        for shift in SHIFTS:
            here = [place for place in missing if place.shift == shift]
            if here:
                _draw_shift(studio, row, cell, truth, here, kept, found)


def _draw_shift(
    studio: Studio,
    row: Row,
    cell: Cell,
    truth: Tensor,
    places: list[Place],
    kept: Kept,
    found: Results,
) -> None:
    """Draw a cell at places of one shift, and in many steps at that shift."""
    pipe, before = studio.pipe, studio.pipe.scheduler
    pipe.scheduler = type(before).from_config(before.config, flow_shift=places[0].shift)
    try:
        many = replace(studio, steps=MANY).drawn(cell)
        for place in places:
            few = replace(studio, steps=place.steps).drawn(cell)
            verdicts = _with_distance(studio.judged(few, cell, truth), studio, few, many)
            name, at = f"{cell.subject}, {cell.style}", place.of(row.name)
            found.setdefault(at, {})[name] = verdicts
            kept.add(at, name, verdicts)
    finally:
        pipe.scheduler = before


def _with_distance(verdicts: Verdicts, studio: Studio, few: Tensor, many: Tensor) -> Verdicts:
    """Add the distance of each picture to the one in many steps."""
    apart = studio.judges.distance(few, many).tolist()
    return [
        {**verdict, "many": round(far, 5)} for verdict, far in zip(verdicts, apart, strict=True)
    ]


if __name__ == "__main__":
    main()
