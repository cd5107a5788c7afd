"""Which evaluation belongs to which step, told by a rehearsal and by real runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.comfyui.kits import CHECKOUT, NEEDS_COMFYUI, Comfy, Double
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


#: ComfyUI's schedulers; all but the first run where slow tests do.
SCHEDULERS = (
    "simple",
    "sgm_uniform",
    "karras",
    "exponential",
    "ddim_uniform",
    "beta",
    "normal",
    "linear_quadratic",
    "kl_optimal",
)


@pytest.mark.skipif(not CHECKOUT, reason=NEEDS_COMFYUI)
@pytest.mark.parametrize(
    "scheduler",
    [SCHEDULERS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULERS[1:])],
)
@pytest.mark.parametrize("family", ["flux", "sd1"])
def test_every_sampler_of_comfyui_is_told_right_or_refused(
    rehearsal: Any, monkeypatch: pytest.MonkeyPatch, family: str, scheduler: str
) -> None:
    """Its own samplers around the double's small models, whose evaluations take no time."""
    comfy = Comfy()
    import comfy.samplers as samplers

    refused = set()
    model = getattr(comfy, family)()
    cheap = getattr(Double(), family)()
    patcher = comfy.patcher(model)

    def denoise(guider: Any, x: Any, timestep: Any, options: Any = None, seed: Any = None) -> Any:
        found = cheap.denoised(x, timestep)
        for function in (options or {}).get("sampler_post_cfg_function", ()):
            told = {"denoised": found, "uncond_denoised": found, "sigma": timestep}
            found = function({**told, "cond_scale": 1.0, "input": x, "cond_denoised": found})
        return found

    monkeypatch.setattr(samplers.CFGGuider, "predict_noise", denoise)
    for name in samplers.KSampler.SAMPLERS:
        events = observed(comfy, patcher, name, scheduler=scheduler)
        runner = samplers.KSampler(
            patcher, 5, torch.device("cpu"), name, scheduler, None, patcher.model_options
        )
        guider = samplers.CFGGuider(patcher)
        guider.inner_model = patcher.model
        noise = torch.ones(1, 16 if family == "flux" else 4, 8, 8)
        try:
            found = rehearsal.rehearse(
                samplers.sampler_object(name),
                guider,
                runner.sigmas,
                {"model_options": {}, "seed": 0},
                noise,
            )
        except IncompatibleModelError:
            refused.add(name)
            continue
        steps = [each.step for each in found.evaluations]
        assert steps == events.steps, name
        assert [each.sigma for each in found.evaluations] == pytest.approx(events.sigmas), name
    assert refused == {"dpm_adaptive"}
    assert len(samplers.KSampler.SAMPLERS) > 35


@pytest.mark.skipif(not CHECKOUT, reason=NEEDS_COMFYUI)
def test_the_schedulers_of_these_tests_are_all_that_comfyui_has() -> None:
    Comfy()
    import comfy.samplers

    assert sorted(SCHEDULERS) == sorted(comfy.samplers.SCHEDULER_NAMES)


def test_a_sampler_without_a_function_is_named_by_its_class(rehearsal: Any) -> None:
    assert rehearsal.name_of(SimpleNamespace()) == "SimpleNamespace"
