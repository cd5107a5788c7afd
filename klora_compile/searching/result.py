"""The result of a search: candidates with their scores, sheets of the best, and a check of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from PIL import Image

from klora_compile.judging.intervals import Interval, bootstrap
from klora_compile.sweeping.result import Sweep


@dataclass(frozen=True)
class Scored:
    """A candidate with its scores."""

    label: str
    settings: Mapping[str, Any]
    """Settings of the fusion and of the sampling, by full name."""
    scores: tuple[float, ...]
    """One for each picture, in the order of :attr:`Search.cases`; empty if a picture failed."""
    error: str | None = None
    """Why a picture failed."""

    @property
    def score(self) -> float | None:
        """The mean of its scores; None without one."""
        return fmean(self.scores) if self.scores else None

    def minus(self, other: Scored) -> Interval | None:
        """Return the mean and the interval of paired differences; None if one has no scores.

        Args:
            other: a candidate that has met the same pictures' prompts and seeds, or more.
        """
        pairs = list(zip(self.scores, other.scores, strict=False))
        return bootstrap([one - two for one, two in pairs]) if pairs else None

    def text(self) -> str:
        """Return score, label and number of pictures in a line."""
        count = f"{len(self.scores)} picture{'' if len(self.scores) == 1 else 's'}"
        return f"{self.score:.4g}  {self.label}, {count}"

    def json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "label": self.label,
            "settings": dict(self.settings),
            "score": self.score,
            "scores": list(self.scores),
            "error": self.error,
        }


@dataclass(frozen=True)
class Check:
    """The best candidate and the plain sum on seeds by which nothing was chosen."""

    seeds: tuple[int, ...]
    best: Scored
    plain_sum: Scored

    def text(self) -> str:
        """Return a line for people."""
        where = f"on seeds {self.seeds[0]} to {self.seeds[-1]}, by which nothing was chosen"
        apart = self.best.minus(self.plain_sum)
        if apart is None:
            return f"{where}, the best one failed: {self.best.error}"
        scores = f"{self.best.score:.4g} and {self.plain_sum.score:.4g}"
        return f"{where}: {scores}, {apart.text('+.3g')}"

    def json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "seeds": list(self.seeds),
            "best": self.best.json(),
            "plain_sum": self.plain_sum.json(),
            "difference": _interval(self.best.minus(self.plain_sum)),
        }


@dataclass(frozen=True)
class Search:
    """All candidates of a search."""

    judge: str
    """The judge's name."""
    cases: tuple[tuple[str, int], ...]
    """Prompt and seed of each picture of a candidate, in the order in which they are scored."""
    plain_sum: Scored
    """The baseline: the direct sum, scored on all cases."""
    ranked: tuple[Scored, ...]
    """All candidates, best first: those that were scored on more pictures come before others, and
        those that failed are last."""
    best_few: Sweep
    """The cells of the plain sum and of the best candidates."""
    check: Check | None
    """None if it was not asked for."""

    @property
    def best(self) -> Scored:
        """The best candidate."""
        return self.ranked[0]

    @property
    def winner(self) -> Scored:
        """What to take: the best candidate if it beats the plain sum, else the plain sum."""
        return self.best if self.beats_plain_sum else self.plain_sum

    @property
    def beats_plain_sum(self) -> bool:
        """Whether the best candidate's mean is above the plain sum's, also in :attr:`check`."""
        found = [self.best.minus(self.plain_sum)]
        if self.check is not None:
            found.append(self.check.best.minus(self.check.plain_sum))
        return all(each is not None and each.mean > 0 for each in found)

    def sheet(self, number: int = 0) -> Image.Image:
        """Return a sheet: the plain sum and the best candidates across, seeds down.

        Args:
            number: which sheet, from 0; there is one for each prompt.
        """
        return self.best_few.sheet(number)

    def json(self) -> dict[str, Any]:
        """Return candidates, scores and the cells of the sheets as JSON values."""
        return {
            "judge": self.judge,
            "cases": [{"prompt": prompt, "seed": seed} for prompt, seed in self.cases],
            "plain_sum": self.plain_sum.json(),
            "candidates": [each.json() for each in self.ranked],
            "difference": _interval(self.best.minus(self.plain_sum)),
            "check": None if self.check is None else self.check.json(),
            "beats_plain_sum": self.beats_plain_sum,
            **self.best_few.json(),
        }

    def text(self) -> str:
        """Return a few lines for people."""
        few = self.ranked[: len(self.best_few.grid.columns) - 1]
        lines = [self.plain_sum.text(), *(each.text() for each in few if each.scores)]
        lines += [f"failed: {each.label}: {each.error}" for each in self.ranked if each.error]
        apart = self.best.minus(self.plain_sum)
        if apart is not None:
            lines.append(f"best minus plain sum: {apart.text('+.3g')}")
        if self.check is not None:
            lines.append(self.check.text())
        if not self.beats_plain_sum:
            lines.append("no candidate beats the plain sum; take the plain sum")
        return "\n".join(lines)


def _interval(found: Interval | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {"mean": found.mean, "low": found.low, "high": found.high}
