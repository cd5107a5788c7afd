"""Wrong schedules are seen: each mutant fails the comparison that the right one passes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from reference import sampling
from support.generation import LEAST_EFFECT, TOLERANCE, Case, LoraPair, build, generate, progress
from support.pairs import slow
from tiny_pipeline import Family, relative_difference

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.timeline import Timeline


def moved(entry: Entry, by: float) -> Entry:
    """The entry with every breakpoint later by ``by`` of progress."""
    starts = entry.timeline.starts
    rows = [(0.0 if start == 0 else start + by, i) for i, start in enumerate(starts)]
    rows = [(start, i) for start, i in rows if start < 1 and (i == 0 or start > 0)]
    rows = [max(row for row in rows if row[0] <= 0), *(row for row in rows if row[0] > 0)]
    values = entry.timeline.coefficients.items()
    timeline = Timeline(
        tuple(start for start, _ in rows),
        {slot: tuple(column[i] for _, i in rows) for slot, column in values},
    )
    return replace(entry, timeline=timeline)


def one_layer_late(fusion: Fusion, case: Case) -> Fusion:
    """The largest layer that switches soon after the start switches one step later."""
    start = progress(case)[0]
    switching = [
        entry
        for entry in fusion.entries
        if any(start < moment < start + 0.3 for moment in entry.timeline.starts)
    ]
    late = max(switching, key=lambda entry: math.prod(entry.shape))
    entries = [moved(e, 1 / case.steps) if e is late else e for e in fusion.entries]
    return replace(fusion, entries=tuple(entries))


def half_a_step_late(fusion: Fusion, case: Case) -> Fusion:
    entries = tuple(moved(entry, 0.5 / case.steps) for entry in fusion.entries)
    return replace(fusion, entries=entries)


def half_a_step_early(fusion: Fusion, case: Case) -> Fusion:
    entries = tuple(moved(entry, -0.5 / case.steps) for entry in fusion.entries)
    return replace(fusion, entries=entries)


MUTATIONS = (one_layer_late, half_a_step_late, half_a_step_early)
MUTATED = [
    Case(4, "Euler", "off", "sd1"),
    Case(4, "Heun", "batched", "sd2", "s*"),
    Case(4, "DPM++ 2M", "off", "img2img"),
    slow(Case(4, "PNDM", "batched", "sdxl")),
    slow(Case(10, "DDIM", "off", "inpaint")),
    slow(Case(10, "DDIM", "off", "sdxl-split")),
]


@pytest.mark.parametrize("case", MUTATED, ids=str)
def test_mutants_fail_the_comparison(case: Case, lora_pairs: dict[Family, LoraPair]) -> None:
    loras = lora_pairs[case.family]
    fusion = loras.fusion(case)
    pipe, other = build(case), build(case)
    with sampling(other, loras.reference(case), progress(case)):
        expected = generate(other, case)

    def difference(applied: Fusion) -> float:
        with apply_fusion(pipe, applied):
            return relative_difference(generate(pipe, case), expected)

    assert difference(fusion) <= TOLERANCE
    for mutation in MUTATIONS:
        assert difference(mutation(fusion, case)) > TOLERANCE, mutation.__name__
    assert difference(loras.swapped().fusion(case)) > LEAST_EFFECT
