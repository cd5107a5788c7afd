"""Compare rules: draw every held-out subject in every held-out style, and judge the pictures.

    python -m drawings.evaluate PACKAGES WEIGHTS OUT

Half of the held-out subjects is for tuning, which finds the best setting of each curve; the table
is of the other half. Pictures are kept in OUT, so a second run continues where the first ended.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from drawings.evaluation.check import similarities
from drawings.evaluation.comparison import begin, read, tuned, verdicts, write
from drawings.evaluation.judges import Judges
from drawings.evaluation.networks import available
from drawings.evaluation.pictures import claim
from drawings.evaluation.rules import SWEEPS, TABLE
from drawings.material import gallery
from drawings.subjects import (
    HELD_OUT_SUBJECTS,
    REPORTED_SUBJECTS,
    STYLES,
    TRAINING_SUBJECTS,
    TUNING_SUBJECTS,
)

#: Styles of the curves; only these, to save time.
_SWEEP_STYLES = ("ink", "soft")

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("packages", type=_FOLDER)
@click.argument("weights", type=_FOLDER)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seeds", default=2, show_default=True, help="Pictures per pair and rule.")
@click.option("--sweep-seeds", default=1, show_default=True, help="The same on the curves.")
@click.option("--steps", default=16, show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option(
    "--kept",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="results.json of an earlier run: only rules that are new in it are drawn.",
)
def main(
    packages: Path,
    weights: Path,
    out: Path,
    seeds: int,
    sweep_seeds: int,
    steps: int,
    processes: int,
    kept: Path | None,
) -> None:
    """Compare rules on the LoRAs in WEIGHTS and the drawings in PACKAGES; results go to OUT."""
    missing = available()
    if missing:
        raise click.ClickException(missing)
    try:
        claim(out, weights)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    judges = Judges.train(
        gallery(packages, TRAINING_SUBJECTS, STYLES), gallery(packages, HELD_OUT_SUBJECTS, STYLES)
    )
    check = similarities(judges)
    settings = {"seeds": seeds, "sweep_seeds": sweep_seeds, "steps": steps}
    before: Any = {"tuning": None, "reported": None}
    if kept is not None:
        try:
            before = read(kept, settings, check)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    worker = (judges, weights, out, steps)
    with ProcessPoolExecutor(processes, get_context("spawn"), begin, worker) as pool:
        tuning = verdicts(
            pool, SWEEPS, TUNING_SUBJECTS, sweep_seeds, _SWEEP_STYLES, before["tuning"]
        )
        rows = (*TABLE, *tuned(tuning))
        reported = verdicts(pool, rows, REPORTED_SUBJECTS, seeds, kept=before["reported"])
    results = {
        "check": check,
        "settings": settings,
        "tuning": tuning,
        "reported": reported,
    }
    write(results, out)
    click.echo((out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
