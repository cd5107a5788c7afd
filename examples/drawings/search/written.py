"""What a search picked, as a file that is committed, and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from drawings.search.drawing import JUDGES, PLAIN_SUM
from drawings.table.candidates import commit_of
from drawings.table.intervals import Cells, difference, interval
from drawings.table.kept import Results
from klora_compile.report.table import markdown_table
from klora_compile.searching.space import Candidate

#: Keys of a verdict -> heading.
_COLUMNS = {
    "truth": "by the true drawing",
    "own-pictures": "by own pictures",
    "subject": "subject",
    "style": "style",
}


@dataclass(frozen=True)
class Pick:
    """The settings that one judge picked."""

    judge: str
    label: str
    settings: Mapping[str, Any]

    @property
    def candidate(self) -> Candidate:
        """The candidate of these settings."""
        return Candidate(self.label, self.settings)


def picked_file(picks: Sequence[Pick], path: Path) -> None:
    """Write picks for a commit."""
    text = json.dumps([asdict(pick) for pick in picks], indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def picks_of(file: Path) -> tuple[tuple[Pick, ...], str]:
    """Read committed picks; return them and the commit.

    Raises:
        ValueError: the file differs from its last commit, or holds no picks.
    """
    commit = commit_of(file)
    try:
        picks = tuple(Pick(**each) for each in json.loads(file.read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{file} holds no picks. Commit what the search wrote.") from error
    return picks, commit


def tuning_text(found: Results, picks: Sequence[Pick]) -> str:
    """Return tables of the candidates that met most pairs, and what the judges have in common."""
    most = max(map(len, found.values()))
    last = [label for label, cells in found.items() if len(cells) == most]
    first = {label: cells for label, cells in found.items() if label != PLAIN_SUM.label}
    shared = set.intersection(*(set(cells) for cells in found.values()))
    means = [
        [fmean(v[judge] for pair in shared for v in cells[pair]) for cells in first.values()]
        for judge in JUDGES
    ]
    picked = "\n".join(f"* Picked by `{pick.judge}`: {pick.label}" for pick in picks)
    return (
        f"{_table({label: found[label] for label in last})}\n{picked}\n* Of {len(first)} "
        f"candidates on the {len(shared)} pairs that all met, the judges' ranks correlate by "
        f"{rank_correlation(*means):.2f} (Spearman).\n"
    )


def reported_text(found: Results, picks: Sequence[Pick]) -> str:
    """Return the table of the picks beside the plain sum."""
    picked = "\n".join(f"* Picked by `{pick.judge}`: {pick.label}" for pick in picks)
    return f"{_table(found)}\n{picked}\n"


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Sequence[float]) -> Any:
    array = np.asarray(values)
    below, not_above = (array[:, None] > array).sum(1), (array[:, None] >= array).sum(1)
    return (below + not_above) / 2


def _table(found: Results) -> str:
    """Return rows with means, and paired differences to the plain sum over the same pairs."""
    reference = found[PLAIN_SUM.label]
    heads = ["settings", "pairs"]
    for heading in _COLUMNS.values():
        heads += [heading, f"{heading}, minus plain sum"]
    lines = []
    for label, cells in found.items():
        line = [label, str(len(cells))]
        for key in _COLUMNS:
            line += [interval(cells, key).text(".3f"), _apart(label, cells, reference, key)]
        lines.append(line)
    return markdown_table(heads, lines) + "\n"


def _apart(label: str, cells: Cells, reference: Cells, key: str) -> str:
    if label == PLAIN_SUM.label:
        return ""
    same = {pair: reference[pair] for pair in cells}
    return difference(cells, same, key).text("+.3f")
