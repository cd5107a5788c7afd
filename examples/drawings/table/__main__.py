"""Draw and judge rows of the table; a run that was stopped goes on where it was.

    python -m drawings.table PACKAGES RUN LORAS OUT entangled --row "K-LoRA s" --row "NP-LoRA"

screens rows on the tuning subjects, and says how many subjects their differences take. After a
commit that names the rows to report in a JSON list,

    python -m drawings.table PACKAGES RUN LORAS OUT entangled --reported candidates.json

draws these on the reported subjects, once. Both write a table, OUT/REGIME-PART.md, and
a plane of subject against style, OUT/REGIME-PART.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from diffusers import DiffusionPipeline

from drawings.base.subjects import REPORTED_SUBJECTS, STYLES, TUNING_SUBJECTS
from drawings.judges.fitted import Judges
from drawings.loras.acceptance import Ledger, summary
from drawings.loras.recipes import Regime
from drawings.material import drawing
from drawings.table.candidates import candidates
from drawings.table.drawing import Studio
from drawings.table.ingredients import digests, material_of
from drawings.table.kept import Kept, Results
from drawings.table.places import places
from drawings.table.plane import plot_plane
from drawings.table.rows import REFERENCE, ROWS, Material
from drawings.table.rules import STEPS
from drawings.table.written import markdown, pilot

#: Which of how many processes this is, from 1.
Share = tuple[int, int]


class _Share(click.ParamType[Share]):
    """A share of the pairs, written as 1/2."""

    name = "share"

    def convert(self, value: Any, param: Any, ctx: Any) -> Share:
        first, _, count = str(value).partition("/")
        if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
            self.fail(f"{value!r} is no share. Write 1/2 for the first of two.")
        return int(first), int(count)


@click.command()
@places
@click.option("--row", "rows", multiple=True, help="Screen this row; can be given again.")
@click.option(
    "--reported",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Draw the committed candidates in this file on the reported subjects.",
)
@click.option("--seeds", default=2, show_default=True, help="Pictures per cell.")
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--guidance", default=3.0, show_default=True)
@click.option(
    "--share",
    type=_Share(),
    default="1/1",
    show_default=True,
    help="Draw a share of the pairs: processes draw side by side.",
)
@click.option("--threads", default=1, show_default=True, help="On the CPU.")
def main(
    packages: Path,
    run: Path,
    loras: Path,
    out: Path,
    regime: str,
    rows: tuple[str, ...],
    reported: Path | None,
    seeds: int,
    steps: int,
    guidance: float,
    share: Share,
    threads: int,
) -> None:
    """Draw rows with the base and judges in RUN and the LoRAs in LORAS/REGIME."""
    torch.set_num_threads(threads)
    folder = loras / regime
    part, subjects = ("reported", REPORTED_SUBJECTS) if reported else ("tuning", TUNING_SUBJECTS)
    made_with: dict[str, Any] = {"seeds": seeds, "steps": steps, "guidance": guidance}
    try:
        if reported:
            named = candidates(reported)
            rows = named.rows
            made_with["candidates"] = named.commit
        rows = _known(rows)
        material = material_of(packages, Regime(regime), subjects, folder)
        made_with |= digests(run, folder, material)
        kept = Kept(out / f"{regime}-{part}.jsonl")
        found = kept.open(made_with)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(summary(Ledger(folder).read()))
    pipe = DiffusionPipeline.from_pretrained(run / "base")
    pipe.set_progress_bar_config(disable=True)
    judges = Judges.load(run / "judges.pt")
    pictures = out / "pictures" / f"{regime}-{part}"
    studio = Studio(pipe, judges, folder, pictures, seeds, steps, guidance)
    try:
        _draw(studio, kept, found, rows, material, packages, share)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    text = markdown(found)
    (out / f"{regime}-{part}.md").write_text(text, encoding="utf-8")
    plot_plane(found, out / f"{regime}-{part}.png")
    click.echo(text)
    click.echo(pilot(found, rows))


def _draw(
    studio: Studio,
    kept: Kept,
    found: Results,
    rows: tuple[str, ...],
    material: Material,
    packages: Path,
    share: Share,
) -> None:
    """Draw the cells that are not kept yet, a pair of LoRAs after the other."""
    jobs = [(row, cell) for row in ROWS if row.name in rows for cell in row.cells(material)]
    first, count = share
    mine = set(sorted({cell.files for _, cell in jobs})[first - 1 :: count])
    for row, cell in sorted(jobs, key=lambda job: job[1].files):
        if cell.files not in mine:
            continue
        done, place = found.setdefault(row.name, {}), f"{cell.subject}, {cell.style}"
        if place in done:
            continue
        truth = drawing(packages, STYLES[cell.style], cell.subject)
        if truth is None:
            raise ValueError(f"There is no true drawing of {place}.")
        done[place] = studio.verdicts(row, cell, truth)
        kept.add(row.name, place, done[place])


def _known(rows: tuple[str, ...]) -> tuple[str, ...]:
    """Return these rows and the reference, or an error about an unknown one."""
    names = [row.name for row in ROWS]
    for row in rows:
        if row not in names:
            raise ValueError(f"{row!r} is no row. Take some of: {', '.join(names)}.")
    return tuple(name for name in names if name in {*rows, REFERENCE})


if __name__ == "__main__":
    main()
