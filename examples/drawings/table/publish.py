"""What the repository keeps of a run: its numbers, its tables, its planes and a sheet.

    python -m drawings.table.publish PACKAGES OUT drawings/results

OUT is that of ``drawings.table``. RESULTS/results.json has the mean over seeds of each cell, from
which every table is made again; what a regime lacks is left out.
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

_PARTS = ("tuning", "reported")
#: Of a sheet, which has to be small.
_COLOURS = 256
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("packages", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.argument("results", type=click.Path(file_okay=False, path_type=Path))
@click.option("--best", default="NP-LoRA", show_default=True, help="Row of the sheet.")
def main(packages: Path, out: Path, results: Path, best: str) -> None:
    """Write the results of every run in OUT to RESULTS."""
    results.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Any] = {}
    for part in _PARTS:
        found = {}
        for regime in Regime:
            kept = Kept(out / f"{regime}-{part}.jsonl")
            if not kept.path.is_file():
                continue
            made_with, cells = kept.read()
            found[regime.value] = means(cells)
            runs.setdefault(regime.value, {})[part] = {"made with": made_with, "rows": means(cells)}
            name = f"{regime}-{part}"
            (results / f"{name}.md").write_text(markdown(cells), encoding="utf-8")
            plot_plane(cells, results / f"{name}.png")
        if found:
            text = side_by_side(found)
            (results / f"{part}.md").write_text(text, encoding="utf-8")
            click.echo(text)
    _write(runs, results / "results.json")
    for regime, parts in runs.items():
        latest = list(parts)[-1]  # ceilings are among the reported rows
        sheet = table_sheet(packages, out / "pictures" / f"{regime}-{latest}", best)
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
