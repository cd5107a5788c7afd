"""The candidates of the search, and the order in which pairs of LoRAs score them."""

from __future__ import annotations

from drawings.search.drawing import ANY_PROMPT, Pair
from drawings.table.rows import Material
from klora_compile.searching.space import Candidate, candidates_of, usual_axes

#: Candidates that are drawn, two of each rule; and how many the last round has.
CANDIDATES, KEPT = 28, 5


def candidates(count: int) -> tuple[Candidate, ...]:
    """Return those of a search that names no axes: rule, bias and weights."""
    axes = usual_axes(("content", "style"), ANY_PROMPT)
    return candidates_of(axes, ANY_PROMPT, count, seed=0)


def blocks_of(material: Material, turns: int) -> list[list[Pair]]:
    """Return pairs in blocks: each has half of the subjects, in styles that take turns.

    Args:
        material: subjects and styles.
        turns: how many styles each subject has.
    """
    styles = [style.name for style in material.styles]
    subjects = [subject.name for subject in material.subjects]
    every = set(material.pairs)
    blocks = []
    for turn in range(min(turns, len(styles))):
        for half in (0, 1):
            block = [
                (subject, styles[(place + turn) % len(styles)])
                for place, subject in enumerate(subjects)
                if place % 2 == half
            ]
            blocks.append([pair for pair in block if pair in every])
    return [block for block in blocks if block]
