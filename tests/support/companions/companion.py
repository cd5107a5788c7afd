"""One row of the table of companions: what it is, how it is put on a pipeline and taken off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from support.families import FamilyCase

#: Steps of a generation: enough for caches to skip some between switches.
STEPS = 6


def _no_arguments() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class On:
    """A companion that is on a pipeline."""

    take_off: Callable[[], object]
    arguments: Callable[[], Mapping[str, Any]] = _no_arguments
    """What the pipeline is called with while it is on, made anew for each generation."""


@dataclass(frozen=True)
class Companion:
    """One companion, and a pipeline that it is made for."""

    name: str
    case: FamilyCase
    """The pipeline, and a generation with it."""
    put_on: Callable[[Any], On]
    """Puts it on a pipeline."""
    package: str = "diffusers"
    """What has to be installed, by its import name."""
    library: str = "diffusers"
    """What it is part of, as `constraints.txt` pins it."""
    evaluations: int | Sequence[int] | None = None
    """Of the denoiser in each step, with it on; None: as many as without."""
    components: tuple[str, str] | None = None
    """For a fusion of each: the one that it acts on, and another. None: the pipeline has one."""
    lossless: bool = False
    """Whether the bare pipeline makes the same with it."""
    after_a_branch: str | None = None
    """What is said of it where it is put on after a fusion in mode branch and cannot be; None: it
    can."""
    quick: bool = True
    """Whether ``make test`` has it too: not where another row does the same to a pipeline."""

    def __str__(self) -> str:
        return self.name

    def generate(self, pipe: Any, on: On | None = None) -> torch.Tensor:
        """Latents, with the companion or without."""
        extra = {} if on is None else on.arguments()
        case = replace(self.case, arguments={**self.case.arguments, **extra})
        return case.generate(pipe, STEPS)

    def moments(self, *, on: bool) -> list[float]:
        """The progress of each evaluation of the denoiser, with the companion or without."""
        counts = self.evaluations if on and self.evaluations else self.case.evaluations
        each = [counts] * STEPS if isinstance(counts, int) else counts
        return [(step + 0.5) / STEPS for step, count in enumerate(each) for _ in range(count)]
