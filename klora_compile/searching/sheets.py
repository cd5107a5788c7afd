"""The sheets of a search: the plain sum and the best candidates across, seeds down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from klora_compile.searching.plan import Plan
from klora_compile.searching.result import Scored
from klora_compile.searching.space import Candidate, Case, cell_of
from klora_compile.sweeping.grid import Grid
from klora_compile.sweeping.result import Sweep, SweptCell
from klora_compile.sweeping.run import placed


def best_few(
    few: Mapping[Candidate, Scored],
    made: Mapping[tuple[Candidate, Case], SweptCell],
    plan: Plan,
    title: str,
) -> Sweep:
    """Return the sheets of candidates.

    Args:
        few: the plain sum, then the best candidates in their order, with their scores.
        made: the cell of each candidate and case; a candidate that failed may lack some.
        plan: has the prompts, a sheet each, and the seeds, a row each.
        title: what all cells have in common.
    """
    columns = _labels(list(few.values()))
    rows = [f"seed {seed}" for seed in plan.seeds] if len(plan.seeds) > 1 else [""]
    sheets = list(plan.prompts) if len(plan.prompts) > 1 else [""]
    cells, found = [], []
    for (sheet, prompt), (row, seed), (column, candidate) in product(
        enumerate(plan.prompts), enumerate(plan.seeds), enumerate(few)
    ):
        cell = cell_of(candidate, (prompt, seed))
        cell = replace(cell, sheet=sheet, row=row, column=column)
        cells.append(cell)
        found.append(placed(_at(candidate, (prompt, seed), made), cell))
    grid = Grid(tuple(columns), tuple(rows), tuple(sheets), tuple(cells), plan.common)
    return Sweep(grid, tuple(found), title)


def _labels(few: Sequence[Scored]) -> list[str]:
    """Return a heading for each column: place, settings, score."""
    labels = []
    for place, each in enumerate(few):
        score = "" if each.score is None else f" = {each.score:.3g}"
        labels.append(f"{place}: {each.label}{score}" if place else f"{each.label}{score}")
    return labels


def _at(
    candidate: Candidate, case: Case, made: Mapping[tuple[Candidate, Case], SweptCell]
) -> SweptCell:
    """Return a candidate's cell; for a candidate that failed before, that failure."""
    if (candidate, case) in made:
        return made[candidate, case]
    (failure,) = [m for (c, _), m in made.items() if c is candidate and m.picture is None][:1]
    return failure
