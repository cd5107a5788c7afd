"""What the repository keeps of a run: its numbers, its tables, its planes and a sheet.

    python -m drawings.table.publish PACKAGES OUT drawings/results

OUT is that of ``drawings.table``. RESULTS/results.json has the mean over seeds of each cell, from
which every table is made again; what a regime lacks is left out. ``--later`` names a folder of
later runs on the reported subjects, with rows that another committed file names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from drawings.loras.recipes import Regime
from drawings.table.kept import Kept, Results
from drawings.table.plane import plot_plane
from drawings.table.sheet import table_sheet
from drawings.table.written import markdown, side_by_side

_TUNING, _REPORTED = _PARTS = ("tuning", "reported")
#: Name of the reported part of a later run.
_LATER = "reported-later"
#: Of a sheet, which has to be small.
_COLOURS = 256
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("packages", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.argument("results", type=click.Path(file_okay=False, path_type=Path))
@click.option("--best", default="NP-LoRA", show_default=True, help="Row of the sheet.")
@click.option(
    "--later",
    type=_FOLDER,
    multiple=True,
    help="A folder as OUT, of later reported runs; can be given again.",
)
def main(packages: Path, out: Path, results: Path, best: str, later: tuple[Path, ...]) -> None:
    """Write the results of every run in OUT to RESULTS."""
    results.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Any] = {}
    parts = [(part, out, part) for part in _PARTS]
    for number, folder in enumerate(later, start=1):
        parts.append((_LATER if number == 1 else f"{_LATER}-{number}", folder, _REPORTED))
    for name, folder, part in parts:
        found = {}
        for regime in Regime:
            kept = Kept(folder / f"{regime}-{part}.jsonl")
            if not kept.path.is_file():
                continue
            made_with, cells = kept.read()
            found[regime.value] = means(cells)
            runs.setdefault(regime.value, {})[name] = {"made with": made_with, "rows": means(cells)}
            (results / f"{regime}-{name}.md").write_text(markdown(cells), encoding="utf-8")
            plot_plane(cells, results / f"{regime}-{name}.png")
        if found:
            text = side_by_side(found)
            (results / f"{name}.md").write_text(text, encoding="utf-8")
            click.echo(text)
    _write(runs, results / "results.json")
    for regime, published in runs.items():
        # Ceilings are among the reported rows of the first run.
        latest = [part for part in _PARTS if part in published][-1]
        pictures = [out / "pictures" / f"{regime}-{latest}"]
        pictures += [each / "pictures" / f"{regime}-{_REPORTED}" for each in later]
        sheet = table_sheet(packages, pictures, best)
        sheet.quantize(_COLOURS).save(results / f"{regime}.png", optimize=True)


def means(results: Results) -> Results:
    """Return the same rows with one verdict a cell, the mean over its seeds."""
    return {
        row: {
            cell: [{key: round(sum(v[key] for v in each) / len(each), 4) for key in each[0]}]
            for cell, each in cells.items()
        }
        for row, cells in results.items()
    }


def _write(runs: Mapping[str, Any], path: Path) -> None:
    """Write JSON without spaces; the tables beside it are for reading."""
    path.write_text(json.dumps(runs, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
