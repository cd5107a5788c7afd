"""Successive halving: many candidates on few cases, then the better part on more.

Jamieson and Talwalkar, arXiv 1502.07943. A case is whatever a candidate is scored on, such as a
prompt with a seed. All candidates of a round meet the same cases, so they are compared in pairs,
and no candidate wins by one lucky case: the last round has seen all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

Candidate = TypeVar("Candidate")
Case = TypeVar("Case")

#: Candidates, new cases -> the scores of each in the order of cases; without those that failed.
Scorer = Callable[[Sequence[Candidate], Sequence[Case]], Mapping[Candidate, Sequence[float]]]


@dataclass(frozen=True)
class Round:
    """One round."""

    candidates: int
    """How many take part."""
    blocks: int
    """Blocks of cases that they have been scored on at its end."""


def rounds_of(candidates: int, blocks: int, keep: int) -> tuple[Round, ...]:
    """Return the rounds: candidates about halve, blocks double.

    Args:
        candidates: how many there are, at least 1.
        blocks: how many there are, at least 1; the last round has met all.
        keep: how many candidates are in the last round, if the blocks suffice for that.
    """
    keep = min(keep, candidates)
    halvings = min(math.ceil(math.log2(candidates / keep)), math.floor(math.log2(blocks)))
    found = []
    for number in range(halvings + 1):
        share = number / halvings if halvings else 0.0
        left = round(candidates * (keep / candidates) ** share)
        found.append(Round(max(keep, left), math.ceil(blocks / 2 ** (halvings - number))))
    return tuple(found)


def halved(
    candidates: Sequence[Candidate],
    blocks: Sequence[Sequence[Case]],
    keep: int,
    score: Scorer[Candidate, Case],
) -> dict[Candidate, list[float]]:
    """Return the scores of all candidates, in the order of cases; empty if a candidate failed.

    Args:
        candidates: at least one.
        blocks: at least one, with the cases of each.
        keep: see :func:`rounds_of`.
        score: scores candidates on new cases.
    """
    scores: dict[Candidate, list[float]] = {each: [] for each in candidates}
    running, done = list(candidates), 0
    for now in rounds_of(len(candidates), len(blocks), keep):
        running = running[: now.candidates]
        cases = [case for block in blocks[done : now.blocks] for case in block]
        found = score(running, cases)
        for each in running:
            scores[each] = [*scores[each], *found[each]] if each in found else []
        running = in_order([each for each in running if scores[each]], scores)
        done = now.blocks
    return scores


def in_order(
    candidates: Sequence[Candidate], scores: Mapping[Candidate, Sequence[float]]
) -> list[Candidate]:
    """Return candidates, best first: by the number of cases that they met, then by their means."""

    def rank(each: Candidate) -> tuple[int, float]:
        found = scores[each]
        return len(found), fmean(found) if found else 0.0

    return sorted(candidates, key=rank, reverse=True)
