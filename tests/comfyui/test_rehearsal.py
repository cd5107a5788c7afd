"""Which evaluation belongs to which step, told by a rehearsal and by real runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.comfyui.literal import observed
from support.comfyui.sampling import Guider, Sampler, sample_euler

from klora_runtime.errors import IncompatibleModelError


@pytest.fixture(scope="session")
def rehearsal(acting: Any) -> Any:
    return sys.modules[f"{acting.__package__}.rehearsal"]


def rehearsed(rehearsal: Any, kit: Any, sampler: Any, sigmas: torch.Tensor) -> Any:
    """A rehearsal in the double, or in ComfyUI if the sampler is one of its own."""
    patcher = kit.patcher(kit.flux())
    guider: Any
    if isinstance(sampler, str):
        import comfy.samplers

        sampler = comfy.samplers.sampler_object(sampler)
        guider = comfy.samplers.CFGGuider(patcher)
        guider.inner_model = patcher.model
    else:
        guider, sampler = Guider(patcher), Sampler(sampler)
    noise = torch.ones(1, 16, 8, 8)
    return rehearsal.rehearse(sampler, guider, sigmas, {"model_options": {}, "seed": 0}, noise)


SIGMAS = torch.linspace(1, 0, 6)


def test_a_step_begins_at_the_evaluation_before_its_report(rehearsal: Any) -> None:
    ahead = [1.0, None, 0.8, 0.8, None, 0.6, 0.6, 0.5, None]
    assert [each.step for each in rehearsal.evaluations_of(ahead)] == [0, 0, 1, 1, 1, 2]
    assert [each.sigma for each in rehearsal.evaluations_of(ahead)][-2:] == [0.6, 0.5]
    late = [1.0, 0.9, None, 0.8, None]
    assert [each.step for each in rehearsal.evaluations_of(late)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        ("euler", [0, 1, 2, 3, 4]),
        ("heun", [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        ("euler_cfg_pp", [0, 1, 2, 3, 4]),
    ],
)
def test_samplers_of_one_and_two_evaluations(
    rehearsal: Any, kit: Any, sampler: str, steps: list[int]
) -> None:
    from support.comfyui.sampling import SAMPLERS

    own = SAMPLERS[sampler] if kit.name == "double" else sampler
    found = rehearsed(rehearsal, kit, own, SIGMAS)
    assert found.sampler == sampler
    assert [each.step for each in found.evaluations] == steps
    assert found.steps == 5
    assert found.first_sigmas == pytest.approx(SIGMAS.tolist())


def test_a_rehearsal_leaves_the_random_state_and_calls_nothing_of_the_run(
    rehearsal: Any, kit: Any
) -> None:
    def draws(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
        x = x + torch.randn(x.shape)
        return sample_euler(model, x, sigmas, extra, report)

    def of_another_pack(told: Any) -> Any:
        raise AssertionError("it was called")

    guider = Guider(kit.patcher(kit.flux()))
    extra = {"model_options": {"sampler_post_cfg_function": [of_another_pack]}, "seed": 0}
    before = torch.get_rng_state()
    rehearsal.rehearse(Sampler(draws), guider, SIGMAS, extra, torch.ones(1, 16, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def never_ends(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
    while True:
        x = model(x, sigmas[:1], **extra)


def fails(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
    raise ValueError("it needs a picture")


def reports_nothing(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
    return model(x, sigmas[:1], **extra)


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        (never_ends, "never_ends: it evaluates more than 192 times"),
        (fails, r"fails: it cannot be rehearsed \(it needs a picture\)"),
        (reports_nothing, "reports_nothing: it reports no steps"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    rehearsal: Any, kit: Any, sampler: Any, why: str
) -> None:
    with pytest.raises(IncompatibleModelError, match=f"cannot follow the sampler {why}"):
        rehearsed(rehearsal, kit, sampler, SIGMAS)


def test_noise_levels_that_are_no_numbers_are_refused(rehearsal: Any, kit: Any) -> None:
    sigmas = torch.tensor([float("nan"), 0.0])
    with pytest.raises(IncompatibleModelError, match=r"levels that are no numbers\. Use"):
        rehearsed(rehearsal, kit, sample_euler, sigmas)


def test_a_run_that_differs_from_its_rehearsal_is_stopped(kit: Any, acting: Any) -> None:
    if kit.name != "double":
        pytest.skip("ComfyUI's samplers do not do this")
    from support.comfyui.literal import flux_fusion, unchanged

    def moody(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
        if x.shape[-1] > 2:
            sigmas = sigmas * 0.5
        return sample_euler(model, x, sigmas, extra, report)

    patcher = kit.patcher(kit.flux())
    own = acting.apply_to(patcher, acting.Applied(flux_fusion()))
    with unchanged(patcher.model), pytest.raises(IncompatibleModelError) as e:
        kit.sample(own, moody)
    assert "its evaluation 1 is at noise level 0.5, and in a rehearsal it was noise level 1" in str(
        e.value
    )


def test_every_sampler_of_comfyui_is_told_right_or_refused(rehearsal: Any, kit: Any) -> None:
    if kit.name == "double":
        pytest.skip("the double has a few samplers only")
    import comfy.samplers

    told = {}
    patcher = kit.patcher(kit.flux())
    for name in comfy.samplers.KSampler.SAMPLERS:
        events = observed(kit, patcher, name)
        runner = comfy.samplers.KSampler(
            patcher, 5, torch.device("cpu"), name, "simple", None, patcher.model_options
        )
        try:
            found = rehearsed(rehearsal, kit, name, runner.sigmas)
        except IncompatibleModelError:
            told[name] = "refused"
            continue
        steps = [each.step for each in found.evaluations]
        assert steps == events.steps, name
        assert [each.sigma for each in found.evaluations] == pytest.approx(events.sigmas), name
        told[name] = "right"
    assert {name for name, how in told.items() if how == "refused"} == {"dpm_adaptive"}
    assert len(told) > 35


def test_a_sampler_without_a_function_is_named_by_its_class(rehearsal: Any) -> None:
    assert rehearsal.name_of(SimpleNamespace()) == "SimpleNamespace"
