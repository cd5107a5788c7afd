"""The clock of a run: which progress each evaluation of the model has.

By the clock ``step``, step i of N has progress (i + 1/2) / N. A run of ComfyUI does not know N if
it is a part of a longer one (image to image, the advanced sampler, two models in turn), so the user
states N and the first step. By the clock ``noise``, the progress follows from the noise levels,
which every run knows.
"""

from __future__ import annotations

import itertools
import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klora_runtime.artifact.timeline import ClockName, progress_between, progress_of_step
from klora_runtime.errors import ConfigError, IncompatibleModelError

from .rehearsal import Rehearsal

_LOG = logging.getLogger("klora")

#: Smallest relative difference of two noise levels that are not equal.
_CLOSE = 1e-5


@dataclass(frozen=True)
class Stretch:
    """The steps of a whole schedule that one run samples."""

    steps: int = 0
    """Number of steps of the whole schedule; 0 if a run is the whole."""
    start: int = 0
    """Number of the run's first step, from 0."""

    def __post_init__(self) -> None:
        if self.steps == 0 and self.start > 0:
            raise ConfigError(
                f"start_at_step={self.start} without steps: set steps to the number of steps of "
                "the whole schedule."
            )
        if self.steps and self.start >= self.steps:
            raise ConfigError(f"start_at_step={self.start}: expected less than steps={self.steps}.")


def progress_of_steps(
    rehearsal: Rehearsal, clock: ClockName, stretch: Stretch, sampling: Any
) -> tuple[float, ...]:
    """Return the progress of each step of a run.

    Args:
        clock: the artifact's.
        stretch: what the user said of the run; the clock ``noise`` does not need it.
        sampling: ComfyUI's ``model_sampling``, which knows the noise levels.

    Raises:
        ConfigError: the run has more steps than the user said.
        IncompatibleModelError: the noise of the run rises, or there is none.
    """
    if clock == "noise":
        return _by_noise(rehearsal, sampling)
    listed, steps = len(rehearsal.sigmas) - 1, rehearsal.steps
    whole = stretch.steps or listed
    if stretch.start + listed > whole:
        raise ConfigError(
            f"this run has {listed} steps from step {stretch.start} on, and steps={whole}. Set "
            "steps to the number of steps of the whole schedule."
        )
    if steps == listed:
        return tuple(progress_of_step(stretch.start + i, whole) for i in range(steps))
    # The sampler makes steps of its own, evenly over those of the list.
    return tuple(
        (stretch.start + progress_of_step(i, steps) * listed) / whole for i in range(steps)
    )


def warn_of_a_part(rehearsal: Rehearsal, clock: ClockName, stretch: Stretch, sampling: Any) -> None:
    """Log a warning if a run looks like a part of a schedule and the user did not say so."""
    if clock != "step" or stretch.steps:
        return
    first, last, most = rehearsal.sigmas[0], rehearsal.sigmas[-1], float(sampling.sigma_max)
    if first >= most * (1.0 - _CLOSE) and last <= 0.0:
        return
    if is_whole(rehearsal.sigmas, sampling):
        return
    _LOG.warning(
        "klora: this run goes from noise level %.4g to %.4g, and the model's greatest is %.4g. "
        "If it is a part of a longer schedule (denoise below 1, an advanced sampler), set "
        "steps and start_at_step of Apply fusion; otherwise ignore this.",
        first,
        last,
        most,
    )


def is_whole(sigmas: Sequence[float], sampling: Any) -> bool:
    """Return whether some scheduler of ComfyUI makes this list as a whole schedule.

    A scheduler may begin below the model's greatest noise level (``ddim_uniform``), make more steps
    than it is asked for, and lose the last but one level, which some samplers leave out.

    Args:
        sigmas: noise levels of a run, from the noisiest.
        sampling: ComfyUI's ``model_sampling``.
    """
    from comfy.samplers import SCHEDULER_NAMES

    return any(_makes(name, sigmas, sampling) for name in SCHEDULER_NAMES)


def _makes(scheduler: str, sigmas: Sequence[float], sampling: Any) -> bool:
    from comfy.samplers import calculate_sigmas

    for asked in range(len(sigmas), 0, -1):
        try:
            made = [float(sigma) for sigma in calculate_sigmas(sampling, scheduler, asked)]
        except Exception:  # one of another pack: it need not know this model
            return False
        if len(made) < len(sigmas):
            return False  # fewer steps than asked for make a shorter list
        if _equal(made, sigmas) or _equal([*made[:-2], *made[-1:]], sigmas):
            return True
    return False


def _equal(made: Sequence[float], sigmas: Sequence[float]) -> bool:
    return len(made) == len(sigmas) and all(
        math.isclose(one, other, rel_tol=_CLOSE, abs_tol=_CLOSE)
        for one, other in zip(made, sigmas, strict=True)
    )


def noise_level(sampling: Any, sigma: float) -> float:
    """Return the noise level of a sigma, from 0 for the picture to 1 for noise.

    It is the one that klora takes in diffusers: sigma for flow matching; the share of the training
    steps where the model has a table of them; else sigma / (1 + sigma).

    Args:
        sampling: ComfyUI's ``model_sampling``.
    """
    if any(kind.__name__ == "CONST" for kind in type(sampling).__mro__):
        return min(max(sigma, 0.0), 1.0)
    table = getattr(sampling, "log_sigmas", None)
    if table is None:
        return sigma / (1.0 + sigma)
    return _place(table.tolist(), sigma) / len(table)


def _by_noise(rehearsal: Rehearsal, sampling: Any) -> tuple[float, ...]:
    levels = [noise_level(sampling, sigma) for sigma in rehearsal.first_sigmas]
    if any(after > before for before, after in itertools.pairwise(levels)):
        raise IncompatibleModelError(
            "the clock of this artifact follows the noise, and the noise of this run rises from "
            "step to step. Use another scheduler, or give the artifact the clock of the steps: "
            "klora recompile FILE -o NEW --clock step."
        )
    return tuple(map(progress_between, levels, levels[1:]))


def _place(noise: Sequence[float], sigma: float) -> float:
    """Return the index, in between too, at which ascending log sigmas have a sigma."""
    wanted = math.log(sigma) if sigma > 0.0 else -math.inf
    above = bisect_right(noise, wanted)
    if above == 0 or above == len(noise):
        return float(min(above, len(noise) - 1))
    low, high = noise[above - 1], noise[above]
    return above - 1 + (wanted - low) / (high - low)
