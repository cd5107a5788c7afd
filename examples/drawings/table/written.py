"""The table as text, and how many subjects it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import stdev

from drawings.table.intervals import by_subject, difference, interval
from drawings.table.kept import Results
from drawings.table.rows import REFERENCE, ROWS
from klora_compile.report.table import markdown_table

#: Key in a verdict -> heading, digits, and whether the difference to the reference is shown.
_COLUMNS = (
    ("both", "both (harmonic mean)", 2, True),
    ("subject", "subject", 2, False),
    ("style", "style", 2, False),
    ("distance", "ST-LPIPS", 2, True),
    ("flow", "flow loss", 3, True),
)


def markdown(results: Results) -> str:
    """Return the rows of these results, mean and 95 % interval over subjects.

    A difference is over the same subjects as the reference, so ceilings, which are drawn with other
    prompts, have none.
    """
    heads = ["rule"]
    for _, heading, _, apart in _COLUMNS:
        heads += [heading, f"{heading}, minus {REFERENCE}"] if apart else [heading]
    lines = []
    reference = results.get(REFERENCE, {})
    for row in ROWS:
        found = results.get(row.name)
        if not found:
            continue
        cells = [row.name]
        for key, _, digits, apart in _COLUMNS:
            cells.append(interval(found, key).text(f".{digits}f"))
            if apart:
                same = found.keys() == reference.keys() and row.name != REFERENCE
                form = f"+.{digits}f"
                cells.append(difference(found, reference, key).text(form) if same else "")
        lines.append(cells)
    return markdown_table(heads, lines) + "\n"


def side_by_side(regimes: Mapping[str, Results]) -> str:
    """Return the short table of several regimes: ``both``, and its difference to the reference.

    Args:
        regimes: regime -> its rows.
    """
    heads = ["rule"]
    for regime in regimes:
        heads += [f"{regime}: both", f"minus {REFERENCE}"]
    lines = []
    for row in ROWS:
        if not any(row.name in found for found in regimes.values()):
            continue
        cells = [row.name]
        for found in regimes.values():
            cells += _both(found, row.name)
        lines.append(cells)
    return markdown_table(heads, lines) + "\n"


def _both(found: Results, row: str) -> tuple[str, str]:
    """Return a row's ``both`` and its difference to the reference, as far as there is one."""
    cells, reference = found.get(row), found.get(REFERENCE, {})
    if not cells:
        return "", ""
    same = cells.keys() == reference.keys() and row != REFERENCE
    apart = difference(cells, reference, "both").text("+.3f") if same else ""
    return interval(cells, "both").text(".3f"), apart


def spread(results: Results, row: str, key: str = "both") -> float:
    """Return the standard deviation over subjects of a row's difference to the reference."""
    here, there = by_subject(results[row], key), by_subject(results[REFERENCE], key)
    return stdev(here[subject] - there[subject] for subject in here)


def subjects_needed(deviation: float, half_width: float = 0.02) -> int:
    """Return how many subjects a 95 % interval of this half-width takes.

    Args:
        deviation: of the paired difference over subjects, by a pilot.
        half_width: of the interval of its mean.
    """
    return max(2, math.ceil((1.96 * deviation / half_width) ** 2))


def pilot(results: Results, rows: Sequence[str]) -> str:
    """Say how many subjects each row's difference to the reference takes; ceilings have none."""
    reference = results[REFERENCE]
    return "\n".join(
        f"{row}: sd {(found := spread(results, row)):.3f}, {subjects_needed(found)} subjects for "
        "a half-width of 0.02"
        for row in rows
        if row != REFERENCE and row in results and results[row].keys() == reference.keys()
    )
