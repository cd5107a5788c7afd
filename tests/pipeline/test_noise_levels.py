"""The clock that follows the noise: its numbers, and where it reads and refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AmusedScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LTXEulerAncestralRFScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from support.handmade import ATTENTION, State, fusion_for
from support.other_device import OtherDevice
from tiny_pipeline import SD_BETAS

from klora_runtime import apply_fusion
from klora_runtime.artifact.timeline import progress_between, progress_of_step
from klora_runtime.errors import IncompatibleModelError
from klora_runtime.pipeline import clock as clock_module
from klora_runtime.pipeline.clock import Clock
from klora_runtime.pipeline.noise_levels import progress_by_noise
from klora_runtime.pipeline.occupancy import Occupancy

TO_Q = f"unet.{ATTENTION}.to_q"

#: Schedulers of every kind of level, with what is not their default.
EVERY_KIND = {
    "sigma": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "order 2": FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow sigmas": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "timestep": DDIMScheduler(**SD_BETAS),
    "consistency": LCMScheduler(**SD_BETAS),
    "Karras": HeunDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True),
    "continuous": EulerDiscreteScheduler(
        **SD_BETAS, timestep_type="continuous", prediction_type="v_prediction"
    ),
    "ratio": EDMEulerScheduler(),
}


def by_noise(followed: Any) -> tuple[Clock, list[float]]:
    """A clock of the noise on a scheduler, and what it says."""
    told: list[float] = []
    clock = Clock(told.append, Occupancy())
    clock.name = "noise"
    clock.attach(followed)
    return clock, told


def run(clock: Clock, followed: Any, timesteps: Any) -> Iterator[float | None]:
    """Progress at each evaluation of a loop."""
    sample = torch.ones_like(timesteps[0].expand(1, 4), dtype=torch.float32)
    for t in timesteps:
        if hasattr(followed, "scale_model_input"):
            followed.scale_model_input(sample, t)
        clock.evaluate(t)
        yield clock.progress
        followed.step(0.1 * sample, t, sample)


# The numbers.


def test_linear_noise_is_the_clock_of_the_steps() -> None:
    for steps in range(1, 201):
        levels = [1 - step / steps for step in range(steps + 1)]
        for step in range(steps):
            found = progress_between(levels[step], levels[step + 1])
            assert found == pytest.approx(progress_of_step(step, steps), rel=0, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 28, 50])
def test_the_own_sigmas_of_flux_at_shift_1_are_the_clock_of_the_steps(steps: int) -> None:
    """From 1 to 1 / N: to 1e-12 where sigmas are float64, else as far as they are told."""
    middles = [progress_of_step(step, steps) for step in range(steps)]
    exact, rounded = FlowMapEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()
    exact.set_timesteps(steps)
    rounded.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    assert progress_by_noise(exact) == pytest.approx(middles, rel=0, abs=1e-12)
    assert progress_by_noise(rounded) == pytest.approx(middles, rel=0, abs=6e-8)


def test_the_shift_of_the_scheduler_counts() -> None:
    followed = FlowMatchEulerDiscreteScheduler(shift=5.0)
    followed.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    shifted = [5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    expected = [1 - (a + b) / 2 for a, b in pairwise(shifted)]
    assert progress_by_noise(followed) == pytest.approx(expected, abs=1e-6)


def test_a_timestep_is_a_share_of_the_training() -> None:
    followed = DDIMScheduler(**SD_BETAS, steps_offset=1)
    followed.set_timesteps(4)
    assert followed.timesteps.tolist() == [751, 501, 251, 1]
    expected = [1 - sum(pair) / 2000 for pair in ((751, 501), (501, 251), (251, 1), (1, 0))]
    assert progress_by_noise(followed) == pytest.approx(expected, abs=1e-12)


def test_a_step_of_two_evaluations_has_one_progress() -> None:
    followed = FlowMatchHeunDiscreteScheduler(shift=3.0)
    clock, told = by_noise(followed)
    followed.set_timesteps(4)
    seen = list(run(clock, followed, followed.timesteps))
    assert len(seen) == 7
    assert seen[::2] == list(progress_by_noise(followed)) == told
    assert seen[1::2] == seen[:-1:2]


@pytest.mark.parametrize("karras", [False, True])
def test_sigma_has_the_training_step_of_its_noise(karras: bool) -> None:
    """A scheduler with continuous timesteps goes as the one whose timesteps are indices."""
    own = {**SD_BETAS, "use_karras_sigmas": karras, "prediction_type": "v_prediction"}
    indexed = EulerDiscreteScheduler(**own)
    continuous = EulerDiscreteScheduler(**own, timestep_type="continuous")
    for followed in (indexed, continuous):
        followed.set_timesteps(7)
    assert continuous.timesteps[0] < 1
    # Without Karras, diffusers interpolates sigma linearly between two training steps.
    tolerance = 1e-6 if karras else 1e-4
    assert progress_by_noise(continuous) == pytest.approx(progress_by_noise(indexed), abs=tolerance)


def test_a_sigma_beyond_the_training_has_its_last_step() -> None:
    """As Stable Video Diffusion has."""
    followed = EulerDiscreteScheduler(
        **SD_BETAS,
        use_karras_sigmas=True,
        timestep_type="continuous",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
    )
    followed.set_timesteps(4)
    assert followed.sigmas[0] == 700
    first, *_, last = progress_by_noise(followed)
    assert first == pytest.approx(1 - 0.999, abs=1e-3)
    assert last == pytest.approx(1.0, abs=1e-2)


def test_noise_without_an_end_is_a_ratio() -> None:
    followed = EDMEulerScheduler()
    followed.set_timesteps(3)
    levels = [sigma / (1 + sigma) for sigma in followed.sigmas.tolist()]
    assert levels[-1] == 0
    expected = [1 - (a + b) / 2 for a, b in pairwise(levels)]
    assert progress_by_noise(followed) == pytest.approx(expected, abs=1e-12)


def test_sigmas_of_flow_matching_above_1_are_ratios() -> None:
    """As Cosmos-Predict 2 has them in its configuration."""
    cosmos = {"sigma_max": 80.0, "sigma_min": 0.002, "use_karras_sigmas": True}
    followed = FlowMatchEulerDiscreteScheduler.from_config(cosmos)
    followed.set_timesteps(sigmas=[0.0, 0.3, 0.6, 1.0])
    sigmas = followed.sigmas.tolist()
    assert sigmas[0] == pytest.approx(80)
    levels = [sigma / (1 + sigma) for sigma in sigmas]
    expected = [1 - (a + b) / 2 for a, b in pairwise(levels)]
    assert progress_by_noise(followed) == pytest.approx(expected, abs=1e-12)
    unused = FlowMatchEulerDiscreteScheduler.from_config(cosmos | {"use_karras_sigmas": False})
    unused.set_timesteps(sigmas=[1.0, 0.5])
    assert progress_by_noise(unused) == (0.25, 0.75)


def test_flow_sigmas_spaced_by_karras_are_sigmas() -> None:
    """UniPC makes ratios of them itself, as for Cosmos-Predict 2.5."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    followed = UniPCMultistepScheduler(
        **flow, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01
    )
    followed.set_timesteps(4)
    assert 0.99 < followed.sigmas[0] < 1
    expected = [1 - (a + b) / 2 for a, b in pairwise(followed.sigmas.tolist())]
    assert progress_by_noise(followed) == pytest.approx(expected, abs=1e-12)


def test_an_angle_tells_sigma() -> None:
    followed = SCMScheduler()
    followed.set_timesteps(2)
    levels = [math.tan(t) / (1 + math.tan(t)) for t in followed.timesteps.double().tolist()]
    assert levels[0] > 1  # its first angle is rounded up
    levels[0] = 1
    expected = [1 - (a + b) / 2 for a, b in pairwise(levels)]
    assert progress_by_noise(followed) == pytest.approx(expected, abs=1e-6)
    assert levels[-1] == 0  # this one lists the end


def test_a_listed_end_is_the_end() -> None:
    followed = LTXEulerAncestralRFScheduler()
    followed.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    assert progress_by_noise(followed) == (0.25, 0.625)


def test_progress_is_below_1() -> None:
    assert progress_between(0.0, 0.0) == math.nextafter(1, 0)
    assert progress_between(1.1, 1.0) == 0.0


# Following a loop.


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_run_may_start_in_the_middle(kind: str) -> None:
    followed = copy.deepcopy(EVERY_KIND[kind])
    clock, _ = by_noise(followed)
    followed.set_timesteps(8)
    whole = list(run(clock, followed, followed.timesteps))
    start = 3 * followed.order
    followed.set_timesteps(8)
    assert list(run(clock, followed, followed.timesteps[start:])) == whole[start:]
    steps = [moment for moment in whole[:: followed.order] if moment is not None]
    assert steps == sorted(set(steps))
    assert all(0 <= moment < 1 for moment in steps)


def test_each_run_has_its_own_levels() -> None:
    """Also where it has as many steps as the last one."""
    followed = FlowMatchEulerDiscreteScheduler()
    clock, _ = by_noise(followed)
    for second, expected in ((0.5, [0.25, 0.75]), (0.25, [0.375, 0.875])):
        followed.set_timesteps(sigmas=[1.0, second])
        assert list(run(clock, followed, followed.timesteps)) == expected


def test_each_copy_has_steps_of_its_own() -> None:
    """As pipelines have that make pictures and sound."""
    followed = FlowMatchEulerDiscreteScheduler(shift=3.0)
    clock, _ = by_noise(followed)
    followed.set_timesteps(4)
    other = copy.deepcopy(followed)
    other.set_timesteps(8)
    own = list(run(clock, followed, followed.timesteps)), list(run(clock, other, other.timesteps))
    assert own == (list(progress_by_noise(followed)), list(progress_by_noise(other)))


@pytest.mark.parametrize("inference", [False, True])
def test_a_list_that_was_changed_since_is_read_again(inference: bool) -> None:
    """As Cosmos 2 does, after its timesteps are set: the last step ends with some noise."""
    followed = FlowMatchEulerDiscreteScheduler()
    clock, _ = by_noise(followed)
    with torch.inference_mode(inference):  # whose tensors do not say that they were written
        followed.set_timesteps(sigmas=[1.0, 0.5])
        if not inference:
            followed.sigmas[-1] = followed.sigmas[-2]
        expected = [0.25, 0.75 if inference else 0.5]
        assert list(run(clock, followed, followed.timesteps)) == expected


# Reading.


class Reads(OtherDevice):
    """A GPU that counts how often the host waits for what it holds."""

    _WAIT = ("tolist", "item", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__")

    def __init__(self) -> None:
        super().__init__("cuda:0", float64=True)
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        there = bool(args) and isinstance(args[0], torch.Tensor) and self.holds(args[0])
        home = func.__name__ == "to" and any(str(each) == "cpu" for each in args[1:])
        self.count += there and (func.__name__ in self._WAIT or home)
        return super().__torch_function__(func, types, args, kwargs)


def _reads(scheduler: Any, *, follow: bool) -> tuple[int, int]:
    """How often the host waits when timesteps are set, and in the loop."""
    followed = copy.deepcopy(scheduler)
    clock, _ = by_noise(followed)
    if not follow:
        clock.detach()
        followed = copy.deepcopy(scheduler)
    with Reads() as device:
        followed.set_timesteps(4, device="cuda:0")
        setting = device.count
        sample = torch.ones(1, 4, device="cuda:0")
        for t in followed.timesteps:
            if hasattr(followed, "scale_model_input"):
                followed.scale_model_input(sample, t)
            if follow:
                clock.evaluate(t)
            followed.step(0.1 * sample, t, sample)
        return setting, device.count - setting


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_gpu_is_read_once_when_timesteps_are_set(kind: str) -> None:
    """And not in the loop. What the scheduler reads itself is not counted."""
    plain = _reads(EVERY_KIND[kind], follow=False)
    setting, looping = _reads(EVERY_KIND[kind], follow=True)
    assert looping == plain[1]
    assert setting - plain[0] <= 1


def test_the_count_sees_a_clock_that_reads_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Clock, scheduler: Any, index: int) -> float:
        return progress_by_noise(scheduler)[index]

    monkeypatch.setattr(Clock, "_progress_at", forgetful)
    plain, found = (_reads(EVERY_KIND["sigma"], follow=follow) for follow in (False, True))
    assert found[1] - plain[1] == 3


# Refusing.


class Foreign(FlowMatchEulerDiscreteScheduler):
    """A scheduler of someone else, of a class that diffusers has."""


class Unknown:
    """A scheduler of someone else that tells nothing."""

    timesteps = torch.tensor([3.0, 2.0, 1.0])

    def set_timesteps(self, steps: int) -> None: ...

    def step(self, output: Any, timestep: Any, sample: Any) -> None: ...


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (DDIMInverseScheduler(), "it goes from the picture to noise"),
        (AmusedScheduler(mask_token_id=1), "it replaces tokens, and adds no noise to them"),
        (Unknown(), "its noise levels are not known"),
    ],
)
def test_a_scheduler_that_does_not_tell_its_noise_is_refused(scheduler: Any, why: str) -> None:
    kind = type(scheduler)
    with pytest.raises(IncompatibleModelError) as error:
        by_noise(scheduler)
    assert str(error.value) == (
        f"the clock of this fusion follows the noise, which this {kind.__name__} does not tell: "
        f"{why}. Use another scheduler, or give the artifact the clock of the steps: klora "
        "recompile FILE -o NEW --clock step."
    )
    assert type(scheduler) is kind
    Clock(lambda _: None, Occupancy()).attach(scheduler)  # the clock of the steps takes it


def test_a_class_of_someone_else_is_known_by_its_base() -> None:
    by_noise(Foreign())


def test_levels_out_of_range_are_refused() -> None:
    followed = FlowMatchEulerDiscreteScheduler()
    by_noise(followed)
    with pytest.raises(IncompatibleModelError, match="at timestep 1 would be 7, not 0 to 1"):
        followed.set_timesteps(sigmas=[7.0, 0.5])


def test_noise_that_rises_is_refused() -> None:
    followed = FlowMatchEulerDiscreteScheduler()
    by_noise(followed)
    with pytest.raises(IncompatibleModelError, match=r"its noise would rise, from 0.1 to 0.9\."):
        followed.set_timesteps(sigmas=[0.1, 0.9], timesteps=[900.0, 100.0])


def test_it_is_refused_when_applied_and_when_assigned(pipe: Any) -> None:
    steps = fusion_for(pipe, [TO_Q])
    noise = replace(steps, clock="noise")
    known, unknown = pipe.scheduler, DDIMInverseScheduler(**SD_BETAS)
    pipe.scheduler = unknown
    before = State.of(pipe)
    with pytest.raises(IncompatibleModelError, match="which this DDIMInverseScheduler does not"):
        apply_fusion(pipe, noise)
    assert State.of(pipe) == before
    with apply_fusion(pipe, steps) as handle:
        with pytest.raises(IncompatibleModelError, match="which this DDIMInverseScheduler does"):
            handle.swap(noise)
        assert handle.fusion is steps
        pipe.scheduler = known
        handle.swap(noise)
        with pytest.raises(IncompatibleModelError, match="which this DDIMInverseScheduler does"):
            pipe.scheduler = unknown
        assert pipe.scheduler is known
    assert clock_module.noise_level_of(known)


def test_a_fusion_that_never_switches_needs_no_noise(pipe: Any) -> None:
    pipe.scheduler = DDIMInverseScheduler(**SD_BETAS)
    apply_fusion(pipe, replace(fusion_for(pipe, [TO_Q], switch=None), clock="noise")).remove()


def test_a_swap_within_a_loop_goes_on_at_the_same_step(pipe: Any) -> None:
    steps = fusion_for(pipe, [TO_Q])
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True)
    handle = apply_fusion(pipe, steps)
    scheduler, sample = pipe.scheduler, torch.ones(1, 4, 8, 8)
    scheduler.set_timesteps(4)
    first, second = scheduler.timesteps[:2]
    scheduler.scale_model_input(sample, first)
    assert handle.report().progress == 0.125
    handle.swap(replace(steps, clock="noise"))
    scheduler.step(sample, first, sample)
    scheduler.scale_model_input(sample, second)
    assert handle.report().progress == progress_by_noise(scheduler)[1] != 0.375
    handle.remove()
