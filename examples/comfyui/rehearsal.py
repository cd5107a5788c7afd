"""Rehearsal: which evaluation of the model belongs to which step of a sampler.

ComfyUI's samplers do not say this. They evaluate once or several times in a step, sometimes at the
noise level of a later step, and report a step after its first evaluation. So a sampler is run once
beforehand, on a latent of a few numbers and with a stand-in for the model, and every evaluation and
report is recorded. A sampler whose evaluations depend on the numbers is recognised by a second run
with another stand-in; it has no such steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from klora_runtime.errors import IncompatibleModelError, shown

#: What the stand-in returns, as shares of its input; one for each rehearsal.
_SHARES = (0.5, 0.9)
#: More evaluations than this for each step are no sampler of steps.
_MOST_PER_STEP = 32
#: Greatest relative difference between two equal noise levels.
_CLOSE = 1e-3
#: Size of the latent in each dimension after the channels.
_SIZE = 2


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model."""

    sigma: float
    """Noise level at which the model is asked."""
    step: int
    """Number of its step, from 0."""

    def is_at(self, sigma: float) -> bool:
        """Return whether it is at this noise level."""
        return abs(sigma - self.sigma) <= _CLOSE * max(abs(sigma), abs(self.sigma))


@dataclass(frozen=True)
class Rehearsal:
    """What a sampler does with a list of noise levels."""

    sampler: str
    """Its name, for errors."""
    sigmas: tuple[float, ...]
    """The list, from the noisiest; its last one is the level at the end."""
    evaluations: tuple[Evaluation, ...]

    @property
    def steps(self) -> int:
        """Number of steps that the sampler reports."""
        return self.evaluations[-1].step + 1 if self.evaluations else 0

    @property
    def first_sigmas(self) -> tuple[float, ...]:
        """Noise level at the begin of each step, and the one at the end of the last."""
        firsts: dict[int, float] = {}
        for each in self.evaluations:
            firsts.setdefault(each.step, each.sigma)
        return (*firsts.values(), self.sigmas[-1])


@dataclass
class _Record:
    """What happened, in order: a noise level for an evaluation, None for a report."""

    most: int
    events: list[float | None] = field(default_factory=list)

    def evaluated(self, sigma: float) -> None:
        self.events.append(sigma)
        if len(self.events) > self.most:
            raise _EndlessError

    def reported(self, *_: Any) -> None:
        self.events.append(None)


class _EndlessError(Exception):
    """A sampler evaluates without end."""


class _StandIn:
    """A guider that asks no model: it returns a share of its input, and has all else of the real.

    Args:
        guider: the real one.
        known: functions of the real run that are not to be called here.
    """

    def __init__(
        self, guider: Any, record: _Record, share: float, known: Sequence[Callable[..., Any]]
    ) -> None:
        self._guider = guider
        self._record = record
        self._share = share
        self._known = {id(function) for function in known}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        self._record.evaluated(sigma_of(timestep))
        denoised = x * self._share
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            if id(function) not in self._known:  # a sampler added it, to see the prediction
                denoised = function(
                    {
                        "denoised": denoised,
                        "cond_denoised": denoised,
                        "uncond_denoised": denoised,
                        "cond_scale": 1.0,
                        "sigma": timestep,
                        "input": x,
                        "model": self._guider,
                        "model_options": model_options,
                        "cond": None,
                        "uncond": None,
                    }
                )
        return denoised


def rehearse(
    sampler: Any,
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any],
    noise: torch.Tensor,
) -> Rehearsal:
    """Return what a sampler will do, without a change to anything, the random state included.

    Args:
        sampler: an object with ComfyUI's ``Sampler.sample``.
        guider: the guider of the run.
        sigmas: noise levels, (steps + 1,).
        extra_args: see ``KSAMPLER.sample``.
        noise: the run's noise, for shape, dtype and device.

    Raises:
        IncompatibleModelError: the sampler has no fixed steps or cannot be run in this way, or the
            noise levels are no numbers.
    """
    name = name_of(sampler)
    levels = tuple(float(sigma) for sigma in sigmas)
    if not all(map(math.isfinite, levels)):
        raise IncompatibleModelError(
            "the scheduler of this run made noise levels that are no numbers. Use more steps, or "
            "another scheduler."
        )
    runs = [_run(sampler, name, guider, sigmas, extra_args, noise, share) for share in _SHARES]
    if not _same(*runs):
        raise _refusal(name, "its evaluations depend on the picture, so it has no steps")
    if len(sigmas) > 1 and None not in runs[0]:
        raise _refusal(name, "it reports no steps")
    return Rehearsal(name, levels, evaluations_of(runs[0]))


def evaluations_of(events: Sequence[float | None]) -> tuple[Evaluation, ...]:
    """Return the evaluations with their steps.

    A report ends the first evaluation of a step. So a step begins at the evaluation before its
    report; evaluations before the first report all belong to step 0.

    Args:
        events: noise level of each evaluation, None for each report, in order.
    """
    begins = {index - 1 for index, event in enumerate(events) if event is None}
    found: list[Evaluation] = []
    step = -1
    for index, event in enumerate(events):
        if event is None:
            continue
        step += index in begins
        found.append(Evaluation(event, max(step, 0)))
    return tuple(found)


def sigma_of(timestep: Any) -> float:
    """Return the noise level of an evaluation; the batch has one."""
    return float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)


def name_of(sampler: Any) -> str:
    """Return the name of a sampler as users know it."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", None) or type(sampler).__name__
    return name.removeprefix("sample_").removesuffix("_function")


def _run(
    sampler: Any,
    name: str,
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any],
    noise: torch.Tensor,
    share: float,
) -> list[float | None]:
    record = _Record(_MOST_PER_STEP * max(1, len(sigmas)))
    options = dict(extra_args.get("model_options", {}))
    stand_in = _StandIn(guider, record, share, options.get("sampler_post_cfg_function", ()))
    shape = (1, *noise.shape[1:2], *(min(size, _SIZE) for size in noise.shape[2:]))
    small = torch.ones(shape, dtype=noise.dtype, device=noise.device)
    given = {**extra_args, "model_options": options}
    try:
        with _random_state_kept(noise.device):
            sampler.sample(
                stand_in, sigmas, given, record.reported, small, torch.zeros_like(small), None, True
            )
    except _EndlessError:
        raise _refusal(name, f"it evaluates more than {record.most} times") from None
    except Exception as error:
        raise _refusal(name, f"it cannot be rehearsed ({shown(error)})") from error
    return record.events


def _random_state_kept(device: torch.device) -> Any:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _same(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    if len(one) != len(other):
        return False
    for mine, its in zip(one, other, strict=True):
        if (mine is None) != (its is None):
            return False
        if mine is not None and its is not None and not Evaluation(mine, 0).is_at(its):
            return False
    return True


def _refusal(name: str, why: str) -> IncompatibleModelError:
    return IncompatibleModelError(
        f"klora cannot follow the sampler {shown(name)}: {why}. Use another sampler, such as euler."
    )
