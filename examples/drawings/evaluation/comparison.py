"""The comparison of every rule on every pair, drawn and judged in several processes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch

from drawings.evaluation.judges import Judges
from drawings.evaluation.pictures import Studio
from drawings.evaluation.plots import plot_curves, plot_plane
from drawings.evaluation.results import Verdicts, best, markdown
from drawings.evaluation.rules import SWEEPS, TABLE, Rule
from drawings.pipeline import load
from drawings.subjects import HELD_OUT_STYLES

#: The rule that all others are compared with.
_REFERENCE = "direct sum 1 : 1"


def tuned(tuning: Mapping[str, Verdicts]) -> list[Rule]:
    """Return the best point of each curve, on the tuning subjects."""
    chosen = []
    for sweep in dict.fromkeys(rule.sweep for rule in SWEEPS):
        points = {rule.name: rule for rule in SWEEPS if rule.sweep == sweep}
        chosen.append(points[best({name: tuning[name] for name in points})])
    return chosen


def verdicts(
    pool: Executor,
    rules: Iterable[Rule],
    subjects: Sequence[str],
    seeds: int,
    styles: Sequence[str] | None = None,
    kept: Mapping[str, Verdicts] | None = None,
) -> dict[str, Verdicts]:
    """Return rule -> "subject, style" -> one verdict per seed; styles of None means all held-out.

    Args:
        kept: verdicts of an earlier run; their rules are not drawn again.
    """
    tasks = []
    found: dict[str, dict[str, Any]] = {rule.name: {} for rule in rules}
    for name in found:
        for subject, style in itertools.product(subjects, styles or HELD_OUT_STYLES):
            before = (kept or {}).get(name, {}).get(f"{subject}, {style}", ())
            if len(before) == seeds:
                found[name][f"{subject}, {style}"] = before
            else:
                tasks.append((name, subject, style, seeds))
    for task, answer in zip(tasks, pool.map(_verdicts, tasks), strict=True):
        name, subject, style, _ = task
        found[name][f"{subject}, {style}"] = answer
    return dict(found)


def read(file: Path, settings: Mapping[str, int], check: Any) -> dict[str, Any]:
    """Read the results of an earlier run to continue from.

    Args:
        settings: settings of this run.
        check: result of this run's judges on true drawings.

    Raises:
        ValueError: the earlier run had other settings or judges.
    """
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        raise ValueError(f"{file} was made with {results['settings']}, this run has {settings}.")
    if not _near(results["check"], check):
        raise ValueError(f"{file} was made by other judges: leave it out, or take its drawings.")
    return results


def _near(one: Any, other: Any) -> bool:
    """Return whether values are equal except for the last digits, which depend on the machine."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_near(one[key], other[key]) for key in one)
    return (
        isinstance(one, float | int)
        and isinstance(other, float | int)
        and (abs(one - other) < 1e-3)
    )


def write(results: Mapping[str, Any], out: Path) -> None:
    """Write numbers, table and plots."""
    text = json.dumps(results, indent=1)
    (out / "results.json").write_text(f"{text}\n", encoding="utf-8")
    table = markdown(results["reported"], _REFERENCE)
    (out / "table.md").write_text(table, encoding="utf-8")
    plot_curves(results["tuning"], out / "curves.png")
    plot_plane(results["reported"], results["tuning"], out / "plane.png")


#: State of a worker: its judges, its pipeline and its folders.
_worker: dict[str, Any] = {}


def begin(judges: Judges, weights: Path, out: Path, steps: int) -> None:
    """Prepare this process to draw and judge; the first call in a worker."""
    torch.set_num_threads(1)
    _worker.update(judges=judges, pipe=load(weights), weights=weights, out=out, steps=steps)


def _verdicts(task: tuple[str, str, str, int]) -> list[dict[str, float]]:
    name, subject, style, seeds = task
    rule = next(rule for rule in (*TABLE, *SWEEPS) if rule.name == name)  # ways cannot be pickled
    studio = Studio(
        _worker["pipe"], _worker["weights"], _worker["out"], seeds, steps=_worker["steps"]
    )
    pictures = studio.pictures(rule, subject, style)
    judged = _worker["judges"].judge(pictures, [(subject, style)] * seeds)
    return [verdict.json() for verdict in judged]
