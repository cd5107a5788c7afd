"""The progress of each step of a run, by both clocks."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from support.comfyui.sampling import DiscreteSampling, FlowSampling

from klora_runtime.errors import ConfigError, IncompatibleModelError
from klora_runtime.pipeline.noise_levels import progress_by_noise


@pytest.fixture(scope="session")
def rehearsal(acting: Any) -> Any:
    return sys.modules[f"{acting.__package__}.rehearsal"]


def run_of(rehearsal: Any, sigmas: list[float], steps: list[int] | None = None) -> Any:
    """A run with one evaluation at the begin of each step."""
    own = list(range(len(sigmas) - 1)) if steps is None else steps
    evaluations = tuple(rehearsal.Evaluation(sigmas[step], step) for step in own)
    return rehearsal.Rehearsal("euler", tuple(sigmas), evaluations)


LINE = [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_clock_of_steps(clock: Any, rehearsal: Any) -> None:
    whole = clock.progress_of_steps(
        run_of(rehearsal, LINE), "step", clock.Stretch(), FlowSampling()
    )
    assert whole == (0.125, 0.375, 0.625, 0.875)
    part = run_of(rehearsal, LINE[2:])
    told = clock.progress_of_steps(part, "step", clock.Stretch(4, 2), FlowSampling())
    assert told == whole[2:]
    untold = clock.progress_of_steps(part, "step", clock.Stretch(), FlowSampling())
    assert untold == (0.25, 0.75)


def test_steps_of_a_sampler_s_own_lie_evenly_over_those_of_the_list(
    clock: Any, rehearsal: Any
) -> None:
    run = run_of(rehearsal, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], [0, 0, 1, 1])
    assert clock.progress_of_steps(run, "step", clock.Stretch(), FlowSampling()) == (0.25, 0.75)
    told = clock.progress_of_steps(run, "step", clock.Stretch(10, 5), FlowSampling())
    assert told == pytest.approx((0.625, 0.875))


def test_the_clock_of_noise_is_that_of_diffusers(clock: Any, rehearsal: Any) -> None:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas.tolist()
    found = clock.progress_of_steps(
        run_of(rehearsal, sigmas), "noise", clock.Stretch(), DiscreteSampling()
    )
    assert found == pytest.approx(progress_by_noise(scheduler), abs=2e-3)
    shifted = [1.0, 0.9, 0.75, 0.5, 0.0]
    by_flow = clock.progress_of_steps(
        run_of(rehearsal, shifted), "noise", clock.Stretch(9, 1), FlowSampling()
    )
    assert by_flow == pytest.approx((0.05, 0.175, 0.375, 0.75))


def test_noise_that_rises_is_refused(clock: Any, rehearsal: Any) -> None:
    run = run_of(rehearsal, [0.5, 0.9, 0.2, 0.0])
    with pytest.raises(IncompatibleModelError, match=r"rises from step to step\. Use another"):
        clock.progress_of_steps(run, "noise", clock.Stretch(), FlowSampling())


def test_levels_of_models_without_a_table(clock: Any) -> None:
    assert clock.noise_level(object(), 3.0) == 0.75


@pytest.mark.parametrize(
    ("sigmas", "clock_name", "steps", "warns"),
    [
        (LINE, "step", 0, False),
        (LINE[1:], "step", 0, True),
        (LINE[:-1], "step", 0, True),
        (LINE[1:], "step", 4, False),
        (LINE[1:], "noise", 0, False),
    ],
)
def test_a_run_that_looks_like_a_part_is_warned_of(
    kit: Any,
    clock: Any,
    rehearsal: Any,
    logs: list[str],
    sigmas: list[float],
    clock_name: str,
    steps: int,
    warns: bool,
) -> None:
    run = run_of(rehearsal, sigmas)
    clock.warn_of_a_part(run, clock_name, clock.Stretch(steps), FlowSampling())
    assert ("set steps and start_at_step of Apply fusion" in "".join(logs)) is warns


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 60])
@pytest.mark.parametrize("family", ["flux", "sd1"])
def test_a_whole_run_of_any_scheduler_is_not_warned_of(
    kit: Any, clock: Any, rehearsal: Any, logs: list[str], family: str, steps: int
) -> None:
    import comfy.samplers as samplers

    levels = getattr(kit, family)().model_sampling
    for scheduler in samplers.SCHEDULER_NAMES:
        sigmas = [float(s) for s in samplers.calculate_sigmas(levels, scheduler, steps)]
        if not all(map(math.isfinite, sigmas)):  # kl_optimal with one step; it cannot be sampled
            continue
        for own in (sigmas, [*sigmas[:-2], *sigmas[-1:]]):
            clock.warn_of_a_part(run_of(rehearsal, own), "step", clock.Stretch(), levels)
    assert logs == []


@pytest.mark.parametrize("scheduler", ["simple", "ddim_uniform"])
def test_parts_of_a_schedule_are_warned_of(
    kit: Any, clock: Any, rehearsal: Any, logs: list[str], scheduler: str
) -> None:
    import comfy.samplers as samplers

    levels = kit.flux().model_sampling
    sigmas = [float(s) for s in samplers.calculate_sigmas(levels, scheduler, 20)]
    for part in (slice(8, None), slice(None, 8), slice(4, 12), slice(-5, None)):
        clock.warn_of_a_part(run_of(rehearsal, sigmas[part]), "step", clock.Stretch(), levels)
        assert "set steps and start_at_step" in logs.pop()


def test_a_scheduler_of_another_pack_may_fail(
    kit: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.samplers as samplers

    monkeypatch.setattr(samplers, "SCHEDULER_NAMES", ["broken"])
    assert not clock.is_whole(LINE[1:], kit.flux().model_sampling)


def test_a_stretch_states_both_numbers_or_none(clock: Any) -> None:
    with pytest.raises(ConfigError, match="start_at_step=2 without steps: set steps"):
        clock.Stretch(0, 2)
    with pytest.raises(ConfigError, match="start_at_step=4: expected less than steps=4"):
        clock.Stretch(4, 4)
    assert torch.equal(torch.tensor(clock.Stretch(4, 3).start), torch.tensor(3))
