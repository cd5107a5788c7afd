"""Runs that reports assume: a compiler knows no scheduler, and so not where its steps are.

By the clock of the steps, step i of N is at the same progress in every run. By the clock of the
noise it depends on the shift of the run's schedule. A report then assumes one: sigma before step i
of N is

    sigma_i = shift * u / (1 + (shift - 1) * u),   u = 1 - i / N

as flow matching has it; at shift 1 the steps are where the clock of the steps has them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from klora_runtime.artifact.timeline import ClockName, progress_between, progress_of_step
from klora_runtime.errors import ConfigError
from klora_runtime.linking.breakpoints import NEAR

#: Shifts that a report assumes if none is named.
SHIFTS = (1.0, 3.0)

#: Least and greatest shift that may be named.
MIN_SHIFT, MAX_SHIFT = 0.01, 1000.0

#: Greatest number of steps of runs in which ties are looked for.
_MOST_STEPS = 100


@dataclass(frozen=True)
class Run:
    """A kind of run: where its steps are, for any number of them."""

    shift: float | None = None
    """Shift of its schedule by the clock of the noise; None by the clock of the steps."""

    @property
    def text(self) -> str:
        """What it assumes, such as ``shift 3``; empty by the clock of the steps."""
        return "" if self.shift is None else f"shift {self.shift:g}"

    def progress(self, steps: int) -> tuple[float, ...]:
        """Return the progress of each of a number of steps."""
        if self.shift is None:
            return tuple(progress_of_step(index, steps) for index in range(steps))
        levels = [self.noise(index / steps) for index in range(steps + 1)]
        return tuple(progress_between(before, after) for before, after in pairwise(levels))

    def noise(self, done: float) -> float:
        """Return the noise level where a share of the steps is done, both from 0 to 1."""
        shift = 1.0 if self.shift is None else self.shift
        left = 1.0 - done
        return shift * left / (1.0 + (shift - 1.0) * left)

    def done(self, noise: float) -> float:
        """Return the share of the steps that is done at a noise level; inverse of :meth:`noise`."""
        shift = 1.0 if self.shift is None else self.shift
        return 1.0 - noise / (shift - (shift - 1.0) * noise)

    def near(self, progress: float) -> tuple[int, int] | None:
        """Return a step (index, N) with N <= 100 within 1e-6 of a breakpoint, or None."""
        places = _all_steps(self)
        first, last = (bisect_left(places, (progress + way * 2 * NEAR, 0, 0)) for way in (-1, 1))
        close = [
            (steps, index)
            for place, steps, index in places[first:last]
            if abs(place - progress) <= NEAR
        ]
        if not close:
            return None
        steps, index = min(close)
        return index, steps


def runs_of(clock: ClockName, shift: float | None = None) -> tuple[Run, ...]:
    """Return the runs that a report about a fusion assumes.

    Args:
        clock: what the progress of the fusion follows.
        shift: the shift to assume, 0.01 to 1000; by default 1 and 3, side by side.

    Raises:
        ConfigError: the shift is out of range, or the clock follows the steps.
    """
    if shift is None:
        return (Run(),) if clock == "step" else tuple(map(Run, SHIFTS))
    if clock == "step":
        raise ConfigError(
            "shift: the clock of this fusion follows the steps, which are at the same progress "
            "under every shift. Leave the shift out, or take --clock noise."
        )
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise ConfigError(
            f"shift: expected a number from {MIN_SHIFT:g} to {MAX_SHIFT:g}, found {shift!r}."
        )
    return (Run(float(shift)),)


@cache
def _all_steps(run: Run) -> list[tuple[float, int, int]]:
    """Return (progress, N, index) of each step of each number of steps, sorted."""
    return sorted(
        (place, steps, index)
        for steps in range(1, _MOST_STEPS + 1)
        for index, place in enumerate(run.progress(steps))
    )
