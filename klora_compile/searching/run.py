"""The run of a search: candidates and the plain sum are cells of a sweep, and a judge scores them.

candidates x cases --CellMaker--> pictures --judge--> scores --halved--> the best few
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from PIL import Image

from klora_compile.judging.judge import About, verdict
from klora_compile.measured import MeasuredLoras
from klora_compile.searching.halving import halved, in_order
from klora_compile.searching.own import own_cells
from klora_compile.searching.plan import Plan
from klora_compile.searching.result import Check, Scored, Search
from klora_compile.searching.sheets import best_few
from klora_compile.searching.space import Candidate, Case, cell_of
from klora_compile.sweeping.grid import Cell
from klora_compile.sweeping.result import OnPicture, SweptCell
from klora_compile.sweeping.run import CellMaker, How, title_of
from klora_runtime.errors import KloraError

#: Candidate -> its scores, in the order of cases.
Scores = dict[Candidate, list[float]]


def searched(
    pipe: Any,
    loras: MeasuredLoras,
    plan: Plan,
    how: How,
    on_picture: OnPicture | None = None,
) -> Search:
    """Search.

    Args:
        pipe: the pipeline, which is bare again afterwards.
        loras: the LoRAs.
        plan: what to do.
        how: how cells are made.
        on_picture: called before each picture that is made, with how many remain at most.

    Raises:
        KloraError: the folder holds pictures of other inputs, or cannot be written; the judge
            failed; every candidate did; or a picture of the plain sum, or of a LoRA alone, did.
    """
    with CellMaker(pipe, loras, how) as maker:
        result = _Run(maker, plan, on_picture).result(title_of(plan.shared, loras))
        maker.index(result.json())
    return result


class _Run:
    """One run, with the pictures that were made so far."""

    def __init__(self, maker: CellMaker, plan: Plan, on_picture: OnPicture | None) -> None:
        self._maker, self._plan, self._on_picture = maker, plan, on_picture
        self._cells: dict[tuple[Candidate, Case], SweptCell] = {}
        self._errors: dict[Candidate, str] = {}
        self._later = plan.pictures
        self._own = self._own_pictures()

    def result(self, title: str) -> Search:
        """Search, and return what was found.

        Args:
            title: what all cells have in common.
        """
        plan = self._plan
        plain: list[float] = []

        def score(running: Sequence[Candidate], new: Sequence[Case]) -> Scores:
            found = self._scores((plan.baseline, *running), new)
            plain.extend(found.pop(plan.baseline))
            return found

        scores: Scores = halved(plan.candidates, plan.blocks, plan.best, score)
        ranked = self._completed(in_order(plan.candidates, scores), scores)
        told = [self._scored(each, scores[each]) for each in ranked]
        if not told[0].scores:
            raise KloraError(f"every candidate failed; {told[0].label}: {told[0].error}")
        plain_sum = self._scored(plan.baseline, plain)
        few = dict(zip((plan.baseline, *ranked[: plan.best]), (plain_sum, *told), strict=False))
        return Search(
            plan.judge_name,
            tuple(plan.cases),
            plain_sum,
            tuple(told),
            best_few(few, self._cells, plan, title),
            self._check(ranked[0]) if plan.checked else None,
        )

    def _completed(self, ranked: Sequence[Candidate], scores: Scores) -> list[Candidate]:
        """Score the best few on cases that they have not met, as they replace failed ones."""
        cases, ranked = self._plan.cases, list(ranked)
        while lacking := [
            each
            for each in ranked[: self._plan.best]
            if each not in self._errors and len(scores[each]) < len(cases)
        ]:
            for each in lacking:
                found = self._scores([each], cases[len(scores[each]) :])
                scores[each] = [*scores[each], *found[each]] if each in found else []
            ranked = in_order(ranked, scores)
        return ranked

    def _scores(self, candidates: Sequence[Candidate], cases: Sequence[Case]) -> Scores:
        """Make pictures, and let the judge score each as it comes; leave out who failed."""
        cells = [cell_of(*place) for place in product(candidates, cases)]
        places = dict(zip((c.trial.key for c in cells), product(candidates, cases), strict=True))
        found = {}
        for cell, made in self._made(cells):
            candidate, case = place = places[cell.trial.key]
            self._cells[place] = made
            if made.picture is None:
                self._errors.setdefault(candidate, str(made.error))
            else:
                found[place] = self._verdict(candidate, case, made.picture)
        if (error := self._errors.get(self._plan.baseline)) is not None:
            raise KloraError(f"the direct sum, which a search compares with, failed: {error}")
        kept = [each for each in candidates if each not in self._errors]
        return {each: [found[each, case] for case in cases] for each in kept}

    def _verdict(self, candidate: Candidate, case: Case, picture: Image.Image) -> float:
        plan, (prompt, seed) = self._plan, case
        about = About(prompt, seed, candidate.settings, self._own)
        # A judge may change its picture, for instance make it smaller.
        return verdict(plan.judge, plan.judge_name, picture.copy(), about, candidate.label)

    def _check(self, best: Candidate) -> Check:
        """Score the best candidate and the plain sum on seeds by which nothing was chosen."""
        plan = self._plan
        scores = self._scores((plan.baseline, best), plan.fresh)
        seeds = tuple(dict.fromkeys(seed for _, seed in plan.fresh))
        told = [self._scored(each, scores.get(each, [])) for each in (best, plan.baseline)]
        return Check(seeds, *told)

    def _scored(self, candidate: Candidate, scores: Sequence[float]) -> Scored:
        error = self._errors.get(candidate)
        return Scored(candidate.label, candidate.settings, tuple(scores), error)

    def _own_pictures(self) -> Mapping[str, tuple[Image.Image, ...]]:
        """Make the pictures of each LoRA alone."""
        cells = own_cells(self._plan)
        made = {
            cell.trial.key: found
            for cell, found in self._made([cell for own in cells.values() for cell in own])
        }
        pictures: dict[str, list[Image.Image]] = {slot: [] for slot in cells}
        for slot, own in cells.items():
            for cell in own:
                found = made[cell.trial.key]
                if found.picture is None:
                    raise KloraError(f"a picture of {cell.name} failed: {found.error}")
                pictures[slot].append(found.picture)
        return {slot: tuple(own) for slot, own in pictures.items()}

    def _made(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, SweptCell]]:
        """Make pictures, and count those that come later among those that remain."""
        self._later = max(0, self._later - len(cells))
        call, later = self._on_picture, self._later
        told = None if call is None else lambda name, left: call(name, left + later)
        return self._maker.each(cells, told)
