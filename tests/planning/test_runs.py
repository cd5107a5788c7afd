"""Runs that reports assume: where their steps are, and which step a breakpoint is near."""

from __future__ import annotations

import math

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from klora_compile.runs import Run, runs_of
from klora_runtime.artifact.timeline import progress_of_step
from klora_runtime.errors import ConfigError
from klora_runtime.pipeline.noise_levels import progress_by_noise

LAST = math.nextafter(1.0, 0.0)
SHIFTS = (0.3, 1.0, 3.0, 5.0, 12.0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 28])
def test_the_steps_are_those_of_the_scheduler(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    assert Run(shift).progress(steps) == pytest.approx(progress_by_noise(scheduler), abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 100])
def test_at_shift_1_both_clocks_are_alike(steps: int) -> None:
    middles = [progress_of_step(index, steps) for index in range(steps)]
    assert list(Run().progress(steps)) == middles
    assert Run(1.0).progress(steps) == pytest.approx(middles, rel=0, abs=1e-12)


@pytest.mark.parametrize("shift", SHIFTS)
def test_what_is_done_and_the_noise_are_inverse(shift: float) -> None:
    run = Run(shift)
    assert (run.noise(0.0), run.noise(1.0)) == (pytest.approx(1.0), 0.0)
    for done in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert run.done(run.noise(done)) == pytest.approx(done, abs=1e-12)


def test_the_runs_that_are_assumed() -> None:
    assert runs_of("step") == (Run(),)
    assert runs_of("noise") == (Run(1.0), Run(3.0))
    assert runs_of("noise", 5) == (Run(5.0),)
    assert [run.text for run in runs_of("noise")] == ["shift 1", "shift 3"]


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf, 1001.0])
def test_a_shift_out_of_range_is_refused(shift: float) -> None:
    with pytest.raises(ConfigError, match=r"shift: expected a number from 0\.01 to 1000, found"):
        runs_of("noise", shift)


def test_a_shift_by_the_clock_of_the_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at the same progress under every shift\. Leave the sh"):
        runs_of("step", 3.0)


# Near ties.


@pytest.mark.parametrize(
    ("progress", "step"),
    [
        (0.5, (0, 1)),
        (0.25, (0, 2)),
        (0.25 + 9e-7, (0, 2)),
        (0.25 - 9e-7, (0, 2)),
        ((99 + 0.5) / 100, (99, 100)),
        ((49 + 0.5) / 100, (49, 100)),
        (0.25 + 2e-6, None),
        ((100 + 0.5) / 101, None),
        (0.0, None),
        (LAST, None),
    ],
)
def test_a_step_is_near(progress: float, step: tuple[int, int] | None) -> None:
    assert Run().near(progress) == step
    assert Run(1.0).near(progress) == step


@settings(max_examples=100, deadline=None)
@given(progress=st.floats(0, 1, exclude_max=True), shift=st.sampled_from((None, 3.0)))
def test_it_is_a_search_over_all_steps(progress: float, shift: float | None) -> None:
    run = Run(shift)
    near = [
        (i, n)
        for n in range(1, 101)
        for i, place in enumerate(run.progress(n))
        if abs(place - progress) <= 1e-6
    ]
    assert run.near(progress) == (near[0] if near else None)


def test_a_shift_moves_the_steps() -> None:
    first = 1 - (1 + 0.75) / 2  # of two steps, at shift 3
    assert Run(3.0).near(first) == (0, 2)
    assert Run().near(0.25) == (0, 2)
    assert Run(3.0).near(0.25) is None
