"""Successive halving: who meets which cases, and who is left."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from klora_compile.searching.halving import Round, halved, in_order, rounds_of

BLOCKS = [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]


@pytest.mark.parametrize(
    ("candidates", "blocks", "keep", "expected"),
    [
        (24, 4, 5, [(24, 1), (11, 2), (5, 4)]),
        (40, 10, 5, [(40, 2), (20, 3), (10, 5), (5, 10)]),
        (3, 4, 5, [(3, 4)]),  # nothing to drop
        (9, 1, 2, [(9, 1)]),  # no further cases
        (6, 3, 1, [(6, 2), (1, 3)]),
        (1, 1, 1, [(1, 1)]),
    ],
)
def test_candidates_halve_and_cases_double(
    candidates: int, blocks: int, keep: int, expected: list[tuple[int, int]]
) -> None:
    assert rounds_of(candidates, blocks, keep) == tuple(Round(*each) for each in expected)


def test_all_meet_the_same_cases_and_the_better_ones_meet_more() -> None:
    asked: list[tuple[list[int], list[str]]] = []

    def score(some: Sequence[int], cases: Sequence[str]) -> dict[int, list[float]]:
        asked.append((list(some), list(cases)))
        return {each: [float(each)] * len(cases) for each in some}

    found = halved([3, 1, 4, 2], BLOCKS, 1, score)
    assert asked == [
        ([3, 1, 4, 2], ["a", "b"]),
        ([4, 3], ["c", "d"]),
        ([4], ["e", "f", "g", "h"]),
    ]
    assert {each: len(scores) for each, scores in found.items()} == {3: 4, 1: 2, 4: 8, 2: 2}
    assert in_order([1, 2, 3, 4], found) == [4, 3, 2, 1]


def test_one_lucky_case_does_not_win() -> None:
    """Who shines on the first cases alone falls behind when it meets the others."""
    lucky, steady = {"a": 9.0, "b": 9.0}, {}

    def score(some: Sequence[str], cases: Sequence[str]) -> dict[str, list[float]]:
        of = {"lucky": lucky, "steady": steady}
        return {
            each: [of[each].get(case, 1.0 if each == "lucky" else 4.0) for case in cases]
            for each in some
        }

    found = halved(["lucky", "steady"], BLOCKS, 2, score)
    assert in_order(["lucky", "steady"], found) == ["steady", "lucky"]


def test_who_fails_is_out_and_the_rest_goes_on() -> None:
    asked: list[list[int]] = []

    def score(some: Sequence[int], cases: Sequence[str]) -> dict[int, list[float]]:
        asked.append(list(some))
        return {each: [float(each)] * len(cases) for each in some if each != 4}

    found = halved([1, 2, 3, 4], BLOCKS, 1, score)
    assert found[4] == []
    assert asked[1] == [3, 2]
    assert in_order([4, 3, 2, 1], found)[-1] == 4


def test_who_fails_later_loses_the_scores_so_far() -> None:
    def score(some: Sequence[int], cases: Sequence[str]) -> dict[int, list[float]]:
        late = "a" not in cases
        return {each: [float(each)] * len(cases) for each in some if each != 4 or not late}

    found = halved([1, 2, 3, 4], BLOCKS, 1, score)
    assert found[4] == []
    assert in_order([4, 3, 2, 1], found)[0] == 3
