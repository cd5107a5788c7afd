"""Noise levels of schedulers, for the clock that follows the noise.

A noise level is 1 where a sample is noise and 0 where it is the picture. Every kind of scheduler
states it in its own way:

* flow matching: sigma, as the scheduler has it, its shift included;
* a training table (``alphas_cumprod``): the timestep as a share of the training steps. Where the
  timesteps are no indices of the table: the index whose noise equals sigma, interpolated;
* neither: sigma / (1 + sigma), or a time between 0 and 1.

Schedulers are known by the names of their classes and base classes. One that is not known, and has
no training table, is refused: a wrong level would give a wrong picture without a word.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from klora_runtime.artifact.timeline import progress_between
from klora_runtime.errors import IncompatibleModelError
from klora_runtime.pipeline.timesteps import evaluations_of

#: How far a level may be out of [0, 1]: some schedulers round their first timestep up.
_SLACK = 0.01


@dataclass(frozen=True)
class NoiseLevel:
    """A way in which schedulers state their noise level."""

    text: str
    """What the level is, in a few words."""
    read: Callable[[Any], list[float]]
    """Return the level at each place of a scheduler's list, and at its end where it lists that."""


def noise_level_of(scheduler: Any) -> NoiseLevel:
    """Return how a scheduler states its noise level.

    Raises:
        IncompatibleModelError: that is not known; the message names the scheduler.
    """
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    for name in names:
        if name in _NONE:
            raise _unknown(scheduler, _NONE[name])
    config = getattr(scheduler, "config", None)
    if getattr(config, "use_flow_sigmas", False):
        return SIGMA
    for name in names:
        if name in _BY_CLASS:
            level = _BY_CLASS[name]
            return _of_flow(config) if level is SIGMA else level
    if _training_steps(scheduler) is None or getattr(scheduler, "alphas_cumprod", None) is None:
        raise _unknown(scheduler, "its noise levels are not known")
    continuous = getattr(config, "timestep_type", None) == "continuous"
    if continuous and getattr(config, "prediction_type", None) == "v_prediction":
        return INDEX_OF_SIGMA
    return TIMESTEP


def _of_flow(config: Any) -> NoiseLevel:
    """Return the level of a class of flow matching, which its configuration may turn round."""
    if getattr(config, "invert_sigmas", False):
        return INVERTED_SIGMA
    spaced = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    most = getattr(config, "sigma_max", None)
    beyond = most is not None and most > 1.0 and any(getattr(config, each, 0) for each in spaced)
    return RATIO if beyond else SIGMA


@dataclass(frozen=True)
class NoiseSteps:
    """The progress of each step of a scheduler by noise, read from its lists as they were."""

    progress: tuple[float, ...]
    writes: tuple[int, ...]
    """How often the lists had been written by then; some pipelines change an element later."""

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSteps:
        """Read the lists of a scheduler; see :func:`progress_by_noise`."""
        return cls(progress_by_noise(scheduler), _writes(scheduler))

    def hold(self, scheduler: Any, steps: int) -> bool:
        """Return whether a scheduler still has these lists, of as many steps; waits for nothing."""
        return len(self.progress) == steps and self.writes == _writes(scheduler)


def _writes(scheduler: Any) -> tuple[int, ...]:
    """Return how often each list was written; tensors of inference mode do not count that."""
    lists = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    tensors = (each for each in lists if isinstance(each, torch.Tensor))
    return tuple(each._version for each in tensors if not each.is_inference())


def progress_by_noise(scheduler: Any) -> tuple[float, ...]:
    """Return the progress of each step of a scheduler whose timesteps are set.

    The level after the last step is 0, unless the scheduler lists it. A step of two evaluations has
    one progress. If the lists are on a GPU, this waits for it once.

    Raises:
        IncompatibleModelError: see :func:`noise_level_of`; or a level is out of range, or noise
            rises.
    """
    evaluations, order = evaluations_of(scheduler), order_of(scheduler)
    if evaluations == 0:
        return ()
    levels = noise_level_of(scheduler).read(scheduler)[: evaluations + 1]
    for index, level in enumerate(levels):
        if not -_SLACK <= level <= 1.0 + _SLACK:
            raise _unknown(
                scheduler, f"its noise level at timestep {index + 1} would be {level:g}, not 0 to 1"
            )
    first, last = levels[0], levels[:evaluations][-1]
    if last > first + _SLACK:
        raise _unknown(scheduler, f"its noise would rise, from {first:g} to {last:g}")
    ends = [*(min(max(level, 0.0), 1.0) for level in levels[::order]), 0.0]
    return tuple(map(progress_between, ends, ends[1:]))[: -(-evaluations // order)]


def order_of(scheduler: Any) -> int:
    """Return how many evaluations a step of a scheduler takes."""
    return max(1, int(getattr(scheduler, "order", 1)))


def _unknown(scheduler: Any, why: str) -> IncompatibleModelError:
    return IncompatibleModelError(
        f"the clock of this fusion follows the noise, which this {type(scheduler).__name__} does "
        f"not tell: {why}. Use another scheduler, or give the artifact the clock of the steps: "
        "klora recompile FILE -o NEW --clock step."
    )


# --- kinds of levels ----------------------------------------------------------------------------


def _numbers(values: Any) -> list[float]:
    """Return a list of numbers as they are; waits for a GPU if it is there."""
    return [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def _training_steps(scheduler: Any) -> int | None:
    found = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    return int(found) if found else None


def _sigmas(scheduler: Any) -> list[float]:
    return _numbers(scheduler.sigmas)


def _inverted(scheduler: Any) -> list[float]:
    return [1.0 - sigma for sigma in _numbers(scheduler.sigmas)]


def _ratios(scheduler: Any) -> list[float]:
    return [sigma / (1.0 + sigma) for sigma in _numbers(scheduler.sigmas)]


def _shares(scheduler: Any) -> list[float]:
    steps = _training_steps(scheduler) or 1
    return [timestep / steps for timestep in _numbers(scheduler.timesteps)]


def _indices(scheduler: Any) -> list[float]:
    kept = _numbers(scheduler.alphas_cumprod)
    noise = [math.log((1.0 - each) / each) / 2.0 for each in kept]  # log sigma, ascending
    steps = _training_steps(scheduler) or len(noise)
    return [_place(noise, sigma) / steps for sigma in _numbers(scheduler.sigmas)]


def _place(noise: Sequence[float], sigma: float) -> float:
    """Return the index, in between too, at which ascending log sigmas have a sigma."""
    wanted = math.log(sigma) if sigma > 0.0 else -math.inf
    above = bisect_right(noise, wanted)
    if above == 0 or above == len(noise):
        return float(min(above, len(noise) - 1))
    low, high = noise[above - 1], noise[above]
    return above - 1 + (wanted - low) / (high - low)


def _times(scheduler: Any) -> list[float]:
    return _numbers(scheduler.timesteps)


def _rising_times(scheduler: Any) -> list[float]:
    return [1.0 - time for time in _numbers(scheduler.timesteps)]


def _angles(scheduler: Any) -> list[float]:
    angles = _numbers(scheduler.timesteps)
    return [math.sin(each) / (math.sin(each) + math.cos(each)) for each in angles]


SIGMA = NoiseLevel("sigma", _sigmas)
INVERTED_SIGMA = NoiseLevel("1 - sigma", _inverted)
TIMESTEP = NoiseLevel("timestep / training steps", _shares)
INDEX_OF_SIGMA = NoiseLevel("training step of sigma", _indices)
RATIO = NoiseLevel("sigma / (1 + sigma)", _ratios)
TIME = NoiseLevel("time", _times)
RISING_TIME = NoiseLevel("1 - time", _rising_times)
ANGLE = NoiseLevel("sigma / (1 + sigma), sigma = tan t", _angles)

#: Class of diffusers -> its level; others have a training table, whose index their timestep is.
_BY_CLASS: Mapping[str, NoiseLevel] = {
    "CMStochasticIterativeScheduler": RATIO,
    "ConsistencyDecoderScheduler": TIMESTEP,
    "CosineDPMSolverMultistepScheduler": RATIO,
    "DDPMWuerstchenScheduler": TIME,
    "EDMDPMSolverMultistepScheduler": RATIO,
    "EDMEulerScheduler": RATIO,
    "FlowMapEulerDiscreteScheduler": SIGMA,
    "FlowMatchEulerDiscreteScheduler": SIGMA,
    "FlowMatchHeunDiscreteScheduler": SIGMA,
    "FlowMatchLCMScheduler": SIGMA,
    "HeliosDMDScheduler": SIGMA,
    "HeliosScheduler": SIGMA,
    "IPNDMScheduler": TIME,
    "LTXEulerAncestralRFScheduler": SIGMA,
    "MiniMaxH3Scheduler": SIGMA,
    "PiflowScheduler": SIGMA,
    "RFD4ProteinaScheduler": RISING_TIME,
    "SCMScheduler": ANGLE,
}

_TOKENS = "it replaces tokens, and adds no noise to them"
_INVERSE = "it goes from the picture to noise"

#: Class of diffusers -> why it has no level.
_NONE: Mapping[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "KarrasVeScheduler": "it adds noise inside a step",
    "RePaintScheduler": "it goes back to more noise in between",
    "VQDiffusionScheduler": _TOKENS,
}
