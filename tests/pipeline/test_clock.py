"""The clock tells the true step with every scheduler, and leaves no trace."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosDMDScheduler,
    HeliosScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
)
from support.generation import SchedulerName, evaluations, scheduler
from tiny_pipeline import SD_BETAS

from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.pipeline import clock as clock_module
from klora_runtime.pipeline.clock import Clock
from klora_runtime.pipeline.occupancy import Occupancy
from klora_runtime.pipeline.timesteps import differ

NAMES: tuple[SchedulerName, ...] = get_args(SchedulerName)
WRAPPED = {"set_timesteps", "set_begin_index", "scale_model_input", "step"}


class Watched:
    """A scheduler under a clock, and what the clock said."""

    def __init__(self, followed: Any) -> None:
        self.told: list[float] = []
        self.occupancy = Occupancy()
        self.clock = Clock(self.told.append, self.occupancy)
        self.clock.attach(followed)

    def run(self, followed: Any, timesteps: Any) -> list[float | None]:
        """Progress at each denoiser evaluation of a loop over these timesteps."""
        latents = torch.ones(1, 4, 8, 8)
        seen = []
        for t in timesteps:
            followed.scale_model_input(latents, t)
            seen.append(self.clock.progress)
            latents = followed.step(torch.ones_like(latents), t, latents).prev_sample
        return seen


def middles(steps: int, order: int = 1) -> list[float]:
    return [(i // order + 0.5) / steps for i in range(order * steps - (order - 1))]


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("name", NAMES)
def test_progress_is_the_middle_of_the_step_at_each_evaluation(
    name: SchedulerName, steps: int
) -> None:
    followed = scheduler(name, steps)
    watched = Watched(followed)
    assert watched.clock.progress is None
    order = 2 if name == "Heun" else 1
    expected = middles((evaluations(name, steps) + order - 1) // order, order)

    for _ in range(2):
        followed.set_timesteps(steps)
        assert watched.run(followed, followed.timesteps) == expected


_NO_STOP = {SCMScheduler: {"intermediate_timesteps": None}}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", [SCMScheduler, DDPMWuerstchenScheduler])
def test_the_end_of_the_last_step_is_no_step(kind: Any, steps: int) -> None:
    """Such schedulers list one timestep more than their pipelines evaluate."""
    followed = kind()
    watched = Watched(followed)
    followed.set_timesteps(steps, **_NO_STOP.get(kind, {}))
    assert len(followed.timesteps) == steps + 1
    latents, seen = torch.ones(1, 4, 8, 8), []
    for t in followed.timesteps[:-1]:
        seen.append(watched.clock.progress)
        latents = followed.step(torch.ones_like(latents), t.expand(1), latents).prev_sample
    assert seen == middles(steps)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_start_in_the_middle_of_the_list(name: SchedulerName) -> None:
    """As image-to-image does; DDIM and PNDM have no set_begin_index to say so."""
    followed = scheduler(name, 10)
    watched = Watched(followed)
    start = 4 * followed.order

    followed.set_timesteps(10)
    if hasattr(followed, "set_begin_index"):
        followed.set_begin_index(start)
    seen = watched.run(followed, followed.timesteps[start:])

    total = evaluations(name, 10)
    steps = (total + followed.order - 1) // followed.order
    assert seen == middles(steps, followed.order)[start:]
    assert len(seen) == total - start


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_other_schedulers_of_diffusers(name: str) -> None:
    kind = getattr(diffusers, name)
    followed = kind() if name.startswith("FlowMatch") else kind(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(6)
    seen = []
    latents = torch.ones(1, 4, 8, 8)
    for t in followed.timesteps:
        if hasattr(followed, "scale_model_input"):
            followed.scale_model_input(latents, t)
        seen.append(watched.clock.progress)
        latents = followed.step(torch.ones_like(latents), t, latents).prev_sample

    assert seen == middles(6, followed.order)[: len(seen)]
    assert seen[-1] == 5.5 / 6


def test_a_switch_never_falls_inside_a_step_of_two_evaluations() -> None:
    followed = HeunDiscreteScheduler(**SD_BETAS)
    watched = Watched(followed)

    followed.set_timesteps(9)
    watched.run(followed, followed.timesteps)

    assert watched.told == middles(9)


def test_step_may_be_called_twice_in_an_iteration() -> None:
    """Some pipelines step two latents with one scheduler."""
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(5)
    latents, seen = torch.ones(1, 4, 8, 8), []

    for t in followed.timesteps:
        followed.scale_model_input(latents, t)
        seen.append(watched.clock.progress)
        followed.step(latents, t, latents)
        followed.step(latents, t, latents)

    assert seen == middles(5)


def test_a_timestep_may_be_another_argument_than_the_second() -> None:
    """As in the scheduler of CogVideoX, which takes what it made of the last step before."""
    followed = CogVideoXDPMScheduler()
    watched = Watched(followed)
    followed.set_timesteps(5)
    latents, made, seen = torch.ones(1, 4, 2, 8, 8), None, []

    for i, t in enumerate(followed.timesteps[2:-1], start=2):
        last = followed.timesteps[i - 1]
        latents, made = followed.step(latents, made, t, last, latents, return_dict=False)
        seen.append(watched.clock.progress)

    assert seen == middles(5)[3:]


def test_keyword_arguments_are_understood() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(num_inference_steps=5)
    latents, seen = torch.ones(1, 4, 8, 8), []

    for t in followed.timesteps[2:]:
        followed.scale_model_input(sample=latents, timestep=t)
        seen.append(watched.clock.progress)
        followed.step(model_output=latents, timestep=t, sample=latents)

    assert seen == middles(5)[2:]


def test_a_scheduler_without_timesteps_yet() -> None:
    """PNDM has None before set_timesteps."""
    followed = PNDMScheduler(**SD_BETAS, skip_prk_steps=True)
    watched = Watched(followed)

    followed.scale_model_input(torch.ones(1), 5)

    assert watched.told == []


# What attaching does to the scheduler.


@pytest.mark.parametrize("name", NAMES)
def test_signatures_stay_true(name: SchedulerName) -> None:
    """diffusers looks into them for ``eta``, ``generator``, ``sigmas`` and ``timesteps``."""
    plain, followed = scheduler(name, 4), scheduler(name, 4)
    Watched(followed)

    for method in WRAPPED & set(dir(plain)):
        assert inspect.signature(getattr(followed, method)) == inspect.signature(
            getattr(plain, method)
        )


@pytest.mark.parametrize("name", NAMES)
def test_detaching_leaves_nothing(name: SchedulerName) -> None:
    followed = scheduler(name, 4)
    before = dict(vars(followed))
    watched = Watched(followed)
    assert type(followed).__name__ == type(scheduler(name, 4)).__name__
    assert vars(followed) == before

    watched.clock.detach()

    assert vars(followed) == before
    assert type(followed) is type(scheduler(name, 4))


def test_other_instances_are_not_followed() -> None:
    watched = Watched(DDIMScheduler(**SD_BETAS))
    other = DDIMScheduler(**SD_BETAS)

    other.set_timesteps(4)

    assert not WRAPPED & set(vars(other))
    assert watched.told == []


def test_a_deep_copy_steps_itself_and_drives_the_same_clock() -> None:
    followed = EulerDiscreteScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(3)

    other = copy.deepcopy(followed)
    other.set_timesteps(5)
    seen = watched.run(other, other.timesteps)

    assert seen == middles(5)
    assert other.step_index == 5
    assert followed.step_index is None
    assert len(followed.timesteps) == 3


def test_deep_copies_are_silent_after_detaching() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    used, unused = copy.deepcopy(followed), copy.deepcopy(followed)
    used.set_timesteps(5)
    watched.clock.detach()
    watched.told.clear()

    for each in (followed, used, unused):
        each.set_timesteps(5)
        watched.run(each, each.timesteps)

    assert watched.told == []
    assert not WRAPPED & (set(vars(followed)) | set(vars(used)))
    again = Watched(unused)  # what is left on a copy that was never used does not pile up
    again.clock.detach()
    assert not WRAPPED & set(vars(unused))


def test_attaching_twice_is_attaching_once() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    first, second = Watched(followed), Watched(followed)
    kind = type(followed)

    first.clock.attach(followed)
    second.clock.attach(followed)

    assert type(followed) is kind


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_clocks_on_one_scheduler(first_out: int) -> None:
    """Two pipelines with their own denoisers may share a scheduler."""
    followed = EulerDiscreteScheduler(**SD_BETAS)
    before = dict(vars(followed))
    both = [Watched(followed), Watched(followed)]

    followed.set_timesteps(4)
    both[0].run(followed, followed.timesteps)
    assert [each.told for each in both] == [middles(4)] * 2

    both[first_out].clock.detach()
    staying = both[1 - first_out]
    followed.set_timesteps(3)
    assert staying.run(followed, followed.timesteps) == middles(3)
    assert both[first_out].told == middles(4)

    staying.clock.detach()
    assert set(vars(followed)) == set(before)


def test_methods_replaced_on_the_instance_are_refused() -> None:
    """They would be called in place of what follows the scheduler."""
    followed = DDIMScheduler(**SD_BETAS)
    followed.step = followed.step

    with pytest.raises(IncompatibleModelError) as error:
        Watched(followed)

    assert str(error.value) == (
        "this DDIMScheduler cannot be followed: its step was replaced on this instance. Use an "
        "unchanged scheduler of diffusers."
    )
    assert type(followed) is DDIMScheduler


@pytest.mark.parametrize("kind", [DDIMParallelScheduler, DDPMParallelScheduler])
def test_several_steps_at_once_are_refused(kind: Any) -> None:
    """No LoRA of a layer is the one of all of them."""
    followed = kind(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(4)
    noise = torch.ones(2, 4, 8, 8)

    with pytest.raises(InUseError, match="samples several steps in one evaluation"):
        followed.batch_step_no_noise(noise, followed.timesteps[:2], noise)

    watched.clock.detach()
    stepped = followed.batch_step_no_noise(noise, followed.timesteps[:2], noise)
    assert stepped.shape == noise.shape


def test_a_denoiser_without_a_timestep_must_begin_at_the_first_step() -> None:
    """Else its first evaluation would have the LoRAs of the first step, whichever it is."""
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    latents = torch.ones(1, 4, 8, 8)
    followed.set_timesteps(4)

    def step(place: int) -> None:
        watched.clock.evaluate(None)
        followed.step(latents, followed.timesteps[place], latents)

    for place in range(4):
        step(place)
    followed.set_timesteps(4)
    with pytest.raises(InUseError, match=r"ran for step 1 of the schedule.* called for step 3"):
        step(2)


@pytest.mark.parametrize("kind", [HeliosScheduler, HeliosDMDScheduler])
def test_a_scheduler_of_several_stages_is_refused(kind: Any) -> None:
    followed = kind(stages=3)
    with pytest.raises(IncompatibleModelError, match="samples in 3 stages"):
        Watched(followed)
    assert type(followed) is kind


def test_what_others_put_on_the_instance_later_is_followed() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    plain, calls = followed.step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return plain(*args, **kwargs)

    followed.step = counted
    followed.set_timesteps(4)
    assert watched.run(followed, followed.timesteps) == middles(4)
    assert len(calls) == 4


def test_a_scheduler_without_steps_is_refused() -> None:
    class NoSteps:
        timesteps = None

    with pytest.raises(IncompatibleModelError, match="it has no set_timesteps; it has no step"):
        Watched(NoSteps())


def test_a_state_copied_from_view_to_view_steps_its_own_scheduler() -> None:
    """As panorama pipelines do: each view has a deep copy of the scheduler's ``__dict__``."""
    followed, plain = scheduler("PNDM", 4), scheduler("PNDM", 4)
    Watched(followed)
    results = []
    for subject in (followed, plain):
        subject.set_timesteps(4)
        views = [copy.deepcopy(vars(subject)) for _ in range(2)]
        samples = [torch.ones(1, 4), 2 * torch.ones(1, 4)]
        for timestep in subject.timesteps:
            for view, state in enumerate(views):
                vars(subject).update(state)
                output = 0.1 * samples[view]
                samples[view] = subject.step(output, timestep, samples[view]).prev_sample
                views[view] = copy.copy(vars(subject))
        results.append(samples)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("as_numbers", [True, False])
def test_timesteps_on_the_host_are_looked_up(as_numbers: bool) -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(10)
    rest = followed.timesteps[4:].tolist()
    assert watched.run(followed, rest if as_numbers else torch.tensor(rest)) == middles(10)[4:]


#: Threads that live until a test ends, for the name of one that is gone goes to the next.
_threads: list[ThreadPoolExecutor] = []


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    while _threads:
        _threads.pop().shutdown()


def elsewhere(act: Callable[[], Any]) -> Any:
    """Result of ``act`` in a thread of its own."""
    _threads.append(ThreadPoolExecutor(1))
    return _threads[-1].submit(act).result()


def test_another_threads_call_keeps_every_method_from_running() -> None:
    followed = EulerDiscreteScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(4)
    sample = torch.ones(1, 4, 8, 8)
    acts = {
        "set_timesteps": lambda: followed.set_timesteps(7),
        "set_begin_index": lambda: followed.set_begin_index(0),
        "scale_model_input": lambda: followed.scale_model_input(sample, followed.timesteps[0]),
        "step": lambda: followed.step(sample, followed.timesteps[0], sample),
    }
    assert set(acts) == WRAPPED
    with watched.occupancy.call():
        before = copy.deepcopy(vars(followed))
        for act in acts.values():
            with pytest.raises(InUseError, match="generating in another thread"):
                elsewhere(act)
        assert str(vars(followed)) == str(before)
    elsewhere(acts["set_timesteps"])
    assert len(followed.timesteps) == 7


def test_a_loop_may_go_on_in_another_thread() -> None:
    """Servers draw from a generator in whichever thread is free."""
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)

    def loop() -> Iterator[float | None]:
        followed.set_timesteps(5)
        latents = torch.ones(1, 4, 8, 8)
        for t in followed.timesteps:
            followed.scale_model_input(latents, t)
            watched.clock.evaluate(t)
            yield watched.clock.progress
            latents = followed.step(torch.ones_like(latents), t, latents).prev_sample

    drawn = loop()
    assert [elsewhere(lambda: next(drawn)) for _ in range(5)] == middles(5)


def test_a_loop_that_is_elsewhere_in_the_list_is_refused_in_another_thread() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(5)
    first, second = followed.timesteps[:2]
    followed.scale_model_input(torch.ones(1), second)
    for act in (
        lambda: followed.scale_model_input(torch.ones(1), first),
        lambda: watched.clock.evaluate(first),
    ):
        with pytest.raises(InUseError, match="generating in another thread"):
            elsewhere(act)
    assert watched.clock.progress == middles(5)[1]


@pytest.mark.parametrize("batch", [1, 2])
def test_an_evaluation_shows_where_a_loop_is(batch: int) -> None:
    """Loops that neither scale their input nor set a begin index, from the middle of the list."""
    followed = FlowMatchEulerDiscreteScheduler()
    watched = Watched(followed)
    followed.set_timesteps(6)
    seen = []
    for t in followed.timesteps[2:]:
        watched.clock.evaluate(t.expand(batch))
        seen.append(watched.clock.progress)
    assert seen == middles(6)[2:]


def test_a_loop_that_nobody_steps_is_refused() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
        watched.clock.evaluate(torch.tensor([999.0]))
    followed.set_timesteps(4)
    others = DDIMScheduler(**SD_BETAS)
    others.set_timesteps(4)
    watched.clock.evaluate(others.timesteps[0])
    watched.clock.evaluate(others.timesteps[0].clone())  # the other half of guidance
    with pytest.raises(InUseError, match="went from one timestep to another"):
        watched.clock.evaluate(others.timesteps[1])
    followed.set_timesteps(4)
    for t in followed.timesteps.clone():  # no views, but told
        watched.clock.evaluate(t / 1000)
        followed.step(torch.ones(1), t, torch.ones(1))
    with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
        watched.clock.evaluate(others.timesteps[0])


def test_a_call_may_evaluate_before_its_loop() -> None:
    """That is at progress 0, whatever the last image ended with; at one timestep."""
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(4)
    watched.run(followed, followed.timesteps)
    followed.set_timesteps(4)
    watched.clock.evaluate(torch.tensor(7.0))  # of a loop that is abandoned here
    with watched.occupancy.call():
        watched.clock.rewind()
        assert watched.told[-1] == 0.0
        for timestep in (torch.tensor(1.0), torch.tensor([1.0, 1.0]), None):
            watched.clock.evaluate(timestep)
        with pytest.raises(InUseError, match="went from one timestep to another"):
            watched.clock.evaluate(torch.tensor(2.0))
    assert not watched.occupancy.going_on


def test_a_call_may_fill_caches_with_what_is_clean() -> None:
    """Timestep 0, in numbers of its own: the end of the schedule, before the loop and after it."""
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    clean = torch.zeros(2, 3, dtype=torch.int64)
    for _ in range(2):
        with watched.occupancy.call():
            watched.clock.rewind()
            for _ in range(2):  # two chunks
                watched.clock.evaluate(clean)
                assert watched.told[-1] == watched.clock.progress == 1.0
                followed.set_timesteps(4)
                for step, t in enumerate(followed.timesteps):
                    watched.clock.evaluate((t - t).expand(1))  # whatever the denoiser is told
                    assert watched.told[-1] == watched.clock.progress == (step + 0.5) / 4
                    followed.step(torch.ones(1), t, torch.ones(1))
    with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
        watched.clock.evaluate(clean)


def test_several_images_with_one_list_of_timesteps() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(3)
    seen = []
    for t in [*followed.timesteps, *followed.timesteps]:
        watched.clock.evaluate(t)
        seen.append(watched.clock.progress)
        followed.step(torch.ones(1), t, torch.ones(1))
    assert seen == middles(3) * 2


@pytest.mark.parametrize("passed", [lambda t: t.expand(2), lambda t: (t / 1000).expand(2)])
def test_a_loop_may_change_its_thread_between_two_steps(passed: Callable[[Any], Any]) -> None:
    """Servers that stream send what a step gave, and draw the next one anywhere."""
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)

    def loop() -> Iterator[float | None]:
        followed.set_timesteps(5)
        for t in followed.timesteps:
            watched.clock.evaluate(passed(t))
            seen = watched.clock.progress
            followed.step(torch.ones(1), t, torch.ones(1))
            yield seen

    drawn = loop()
    assert [elsewhere(lambda: next(drawn)) for _ in range(5)] == middles(5)


def test_loops_over_two_copies_in_one_thread() -> None:
    followed = FlowMatchEulerDiscreteScheduler()
    watched = Watched(followed)

    def loop(own: Any, steps: int) -> Iterator[float | None]:
        own.set_timesteps(steps)
        for t in own.timesteps:
            watched.clock.evaluate(t)
            yield watched.clock.progress
            own.step(torch.ones(1), t, torch.ones(1))

    one, other = loop(followed, 4), loop(copy.deepcopy(followed), 2)
    seen = [next(drawn) for drawn in (one, other, one, other, one, one)]
    assert seen == [0.125, 0.25, 0.375, 0.75, 0.625, 0.875]


def test_a_copy_in_another_thread_does_not_take_over() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    other = copy.deepcopy(followed)
    followed.set_timesteps(4)
    sample = torch.ones(1)
    elsewhere(lambda: other.set_timesteps(4))  # takes over: the first loop is refused
    with pytest.raises(InUseError, match="generating in another thread"):
        followed.scale_model_input(sample, followed.timesteps[0])
    with pytest.raises(InUseError, match="generating in another thread"):
        watched.clock.evaluate(followed.timesteps[0])


def test_a_copy_goes_on_from_where_the_scheduler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TextToVideoZero does; on a GPU timesteps cannot be looked up by value."""
    monkeypatch.setattr(clock_module, "index_by_value", lambda *_: None)
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    followed.set_timesteps(8)
    first, second = followed.timesteps[:3].clone(), followed.timesteps[3:].clone()
    assert watched.run(followed, first) == middles(8)[:3]
    twin = copy.deepcopy(followed)
    assert watched.run(twin, second) == middles(8)[3:]
    assert watched.occupancy.going_on  # the last word is the scheduler's that began
    assert watched.run(followed, second) == middles(8)[3:]
    assert not watched.occupancy.going_on


def test_a_scheduler_that_leads_back_to_itself_can_be_copied() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    Watched(followed)
    followed.mine = [followed.step]
    twin = copy.deepcopy(followed)
    assert twin.mine[0].__self__ is twin


def test_timesteps_that_could_not_be_set_begin_no_loop() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    with pytest.raises(ValueError, match="num_inference_steps"):
        followed.set_timesteps(5000)
    assert not watched.occupancy.going_on


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        (1, torch.tensor(1.9), True),
        (torch.tensor(1.9), torch.tensor(1), True),
        (torch.tensor([2.0, 2.0]), 2, False),
        (torch.tensor([2.0]), torch.tensor([2, 2, 2]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]]), False),
    ],
)
def test_timesteps_differ(one: Any, other: Any, different: bool) -> None:
    assert differ(one, other, wait=False) == different


def test_a_gpu_is_only_waited_for_where_that_is_allowed() -> None:
    timesteps = torch.empty(4, device="meta")  # whose values cannot be read
    assert differ(timesteps[0], timesteps[1], wait=False)
    assert not differ(timesteps[1].expand(2), timesteps[1], wait=False)
    assert not differ(timesteps[1], torch.empty(2, device="meta"), wait=False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        differ(timesteps[1], torch.empty(2, device="meta"), wait=True)


def test_what_is_made_from_a_followed_scheduler_is_not_followed() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    made = [
        followed.from_config(followed.config),
        type(followed)(**SD_BETAS),
        pickle.loads(pickle.dumps(followed)),
    ]
    for each in made:
        assert type(each) is DDIMScheduler
        assert each.config.beta_end == SD_BETAS["beta_end"]
        each.set_timesteps(4)
    assert watched.told == []


def test_a_shallow_copy_is_followed() -> None:
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)
    copy.copy(followed).set_timesteps(4)
    assert watched.told == [0.125]


@pytest.mark.parametrize("again", ["the same step", "a new run"])
def test_a_progress_that_could_not_be_taken_is_told_again(again: str) -> None:
    followed = DDIMScheduler(**SD_BETAS)
    told: list[float] = []

    def fail_once(progress: float) -> None:
        told.append(progress)
        if len(told) == 1:
            raise RuntimeError("out of memory")

    clock = Clock(fail_once, Occupancy())
    clock.attach(followed)
    with pytest.raises(RuntimeError, match="out of memory"):
        followed.set_timesteps(4)
    if again == "a new run":
        followed.set_timesteps(4)
    else:
        followed.scale_model_input(torch.ones(1), followed.timesteps[0])

    assert told == [0.125, 0.125]
    assert clock.progress == 0.125


def test_each_run_tells_its_first_progress() -> None:
    """Also where the last run ended there; what came in between is not the clock's to know."""
    followed = DDIMScheduler(**SD_BETAS)
    watched = Watched(followed)

    for _ in range(2):
        followed.set_timesteps(1)
        watched.run(followed, followed.timesteps)

    assert watched.told == [0.5, 0.5]


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("name", ["Euler", "Heun"])
def test_steps_are_counted_where_timesteps_tell_nothing(name: SchedulerName, start: int) -> None:
    """Values that are not in the list: from the begin index on, else from the first."""
    followed = scheduler(name, 6)
    watched = Watched(followed)

    for _ in range(2):
        followed.set_timesteps(6)
        followed.set_begin_index(start)
        seen = watched.run(followed, followed.timesteps[start:] + 0.25)
        assert seen == middles(6, followed.order)[start:]
