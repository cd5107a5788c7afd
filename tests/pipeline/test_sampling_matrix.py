"""Latents equal the literal reference's, over a table that covers every pair of settings."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest
from reference import sampling
from support.generation import LEAST_EFFECT, TOLERANCE, Case, LoraPair, build, generate, progress
from tiny_pipeline import Family, relative_difference

from klora_runtime import apply_fusion

SETTINGS: dict[str, tuple[Any, ...]] = {
    "steps": (1, 4, 20, 50),
    "scheduler": ("DDIM", "PNDM", "Euler", "DPM++ 2M", "Heun"),
    "guidance": ("off", "batched"),
    "kind": ("sd1", "sd2", "sdxl", "img2img", "inpaint", "sdxl-split"),
    "pattern": ("s", "s*"),
    "semantics": ("paper", "authors"),
}

#: Fewer steps, of which layers switch at each, for ``make test``.
FEW_STEPS = {**SETTINGS, "steps": (1, 4)}

#: One step cannot be split over two pipelines.
IMPOSSIBLE = {(("steps", 1), ("kind", "sdxl-split"))}

#: The two settings with the most values. klora follows a scheduler in the same way in every kind
#: of pipeline, so ``make test`` has not every pair of these.
LARGE = {"scheduler", "kind"}

Settings = dict[str, tuple[Any, ...]]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(row: tuple[Any, ...]) -> set[Pair]:
    return set(combinations(zip(SETTINGS, row, strict=True), 2))


def all_pairs(settings: Settings) -> set[Pair]:
    pairs = {
        ((one, x), (other, y))
        for one, other in combinations(settings, 2)
        for x in settings[one]
        for y in settings[other]
    }
    return pairs - IMPOSSIBLE


def few_pairs(settings: Settings) -> set[Pair]:
    return {(one, other) for one, other in all_pairs(settings) if {one[0], other[0]} != LARGE}


def covering_rows(settings: Settings, missing: set[Pair]) -> Iterator[Case]:
    """Greedily: always the row that covers the most pairs not covered yet."""
    rows = [row for row in product(*settings.values()) if not pairs_of(row) & IMPOSSIBLE]
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing = missing - pairs_of(best)
        yield Case(*best)


QUICK = list(covering_rows(FEW_STEPS, few_pairs(FEW_STEPS)))
WHOLE = covering_rows(SETTINGS, all_pairs(SETTINGS))
CASES = {**dict.fromkeys(WHOLE, pytest.mark.slow), **dict.fromkeys(QUICK, ())}


@pytest.mark.parametrize(
    ("pairs", "cases", "most"),
    [(few_pairs(FEW_STEPS), QUICK, 20), (all_pairs(SETTINGS), list(CASES), 80)],
    ids=["few steps", "all"],
)
def test_the_cases_cover_every_pair_of_settings(
    pairs: set[Pair], cases: list[Case], most: int
) -> None:
    covered = set().union(*(pairs_of(tuple(vars(case).values())) for case in cases))

    assert covered >= pairs
    assert len(cases) < most


@pytest.mark.parametrize("case", [pytest.param(c, marks=m, id=str(c)) for c, m in CASES.items()])
def test_latents_equal_the_reference(case: Case, lora_pairs: dict[Family, LoraPair]) -> None:
    loras = lora_pairs[case.family]
    fusion = loras.fusion(case)
    assert sum(entry.timeline.switches for entry in fusion.entries) > 20
    other = build(case)
    bare = generate(other, case)
    with sampling(other, loras.reference(case), progress(case)):
        expected = generate(other, case)

    assert relative_difference(expected, bare) >= LEAST_EFFECT
    pipe = build(case)
    for mode in ("merge", "branch"):
        with apply_fusion(pipe, fusion, mode=mode):
            found = generate(pipe, case)
        assert relative_difference(found, expected) <= TOLERANCE, mode
