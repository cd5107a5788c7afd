"""What happens around one generation and between two: the pipeline stays an ordinary one."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from reference import sampling
from support.generation import TOLERANCE, Case, LoraPair, build, generate, progress
from support.pairs import some_pairs
from tiny_pipeline import Family, parameters, relative_difference

from klora_runtime import apply_fusion
from klora_runtime.errors import InUseError
from klora_runtime.layers.merge import Merge

CASE = Case(6, "DDIM", "batched", "sd1")


@pytest.fixture
def loras(lora_pairs: dict[Family, LoraPair]) -> LoraPair:
    return lora_pairs["sd1"]


def expected_latents(loras: LoraPair, case: Case = CASE, **settings: Any) -> torch.Tensor:
    pipe = build(case)
    with sampling(pipe, loras.reference(case, **settings), progress(case)):
        return generate(pipe, case)


def applied(loras: LoraPair, case: Case = CASE) -> tuple[Any, Any]:
    pipe = build(case)
    return pipe, apply_fusion(pipe, loras.fusion(case))


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return relative_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "Heun"])
def test_every_layer_holds_what_the_rule_says_at_every_evaluation(
    name: Any, loras: LoraPair
) -> None:
    """Also where a late switch has no visible effect on the latents."""
    case = Case(10, name, kind="img2img", pattern="s*")
    klora = loras.reference(case)
    pipe, _ = applied(loras, case)
    found = weights_at_each_evaluation(pipe, klora.layers)
    generate(pipe, case)
    other = build(case)
    with sampling(other, klora, progress(case)):
        expected = weights_at_each_evaluation(other, klora.layers)
        generate(other, case)

    assert len(found) == len(expected) == len(progress(case))
    for one, two in zip(found, expected, strict=True):
        for layer in klora.layers:
            torch.testing.assert_close(one[layer], two[layer], rtol=1e-5, atol=1e-6)


def weights_at_each_evaluation(pipe: Any, layers: list[str]) -> list[dict[str, torch.Tensor]]:
    seen: list[dict[str, torch.Tensor]] = []

    def note(module: torch.nn.Module, args: Any) -> None:
        weights = parameters(pipe)
        seen.append({layer: weights[f"{layer}.weight"] for layer in layers})

    pipe.unet.register_forward_pre_hook(note)
    return seen


def test_one_pipeline_makes_many_images(loras: LoraPair) -> None:
    pipe, _ = applied(loras)

    first, second = generate(pipe, CASE), generate(pipe, CASE)
    longer = replace(CASE, steps=9)
    third = generate(pipe, longer)

    assert torch.equal(first, second)
    assert agree(second, expected_latents(loras))
    assert agree(third, expected_latents(loras, longer))


def test_batches_of_prompts_and_images(loras: LoraPair) -> None:
    batch = {"prompt": ["a fox", "ink, a moon"], "num_images_per_prompt": 3}
    pipe, _ = applied(loras)
    other = build(CASE)
    with sampling(other, loras.reference(CASE), progress(CASE)):
        expected = generate(other, CASE, **batch)

    found = generate(pipe, CASE, **batch)

    assert found.shape[0] == 6
    assert agree(found, expected)


def test_weights_of_slots_act_on_the_deltas_and_not_on_the_choice(loras: LoraPair) -> None:
    expected = expected_latents(loras, content_weight=0.6, style_weight=1.3)
    pipe, handle = applied(loras)

    handle.set(content=0.6, style=1.3)
    found = generate(pipe, CASE)
    handle.remove()
    apply_fusion(pipe, loras.fusion(CASE, content_weight=0.6, style_weight=1.3))
    compiled = generate(pipe, CASE)

    assert agree(found, expected)
    assert agree(compiled, expected)
    assert not agree(expected_latents(loras), expected)


def test_weights_can_change_in_the_middle_of_a_run(loras: LoraPair) -> None:
    """The later steps take the new weights; the choice goes on as before."""
    pipe, handle = applied(loras)

    def strengthen(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            handle.set(style=1.5)
        return values

    found = generate(pipe, CASE, callback_on_step_end=strengthen)
    plain = expected_latents(loras)
    strong = expected_latents(loras, style_weight=1.5)

    assert not agree(found, plain)
    assert not agree(found, strong)
    assert handle.report().progress == progress(CASE)[-1]


# Schedulers that come and go.


def test_a_scheduler_replaced_after_applying_is_followed(loras: LoraPair) -> None:
    pipe, _ = applied(loras, replace(CASE, scheduler="PNDM"))

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected_pipe = build(replace(CASE, scheduler="PNDM"))
    expected_pipe.scheduler = DDIMScheduler.from_config(expected_pipe.scheduler.config)
    with sampling(expected_pipe, loras.reference(CASE), progress(CASE)):
        expected = generate(expected_pipe, CASE)

    assert agree(generate(pipe, CASE), expected)


def test_a_deep_copy_of_the_scheduler_is_followed(loras: LoraPair) -> None:
    pipe, _ = applied(loras)

    pipe.scheduler = copy.deepcopy(pipe.scheduler)

    assert agree(generate(pipe, CASE), expected_latents(loras))


class PipelineWithItsOwnScheduler(StableDiffusionPipeline):
    """Steps a deep copy of its scheduler, as some video pipelines do."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = self.components["scheduler"]
        vars(self)["scheduler"] = copy.deepcopy(original)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            vars(self)["scheduler"] = original


def test_a_pipeline_that_steps_a_copy_of_its_scheduler_is_followed(loras: LoraPair) -> None:
    plain = build(CASE)
    pipe = PipelineWithItsOwnScheduler(**plain.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    apply_fusion(pipe, loras.fusion(CASE))

    assert agree(generate(pipe, CASE), expected_latents(loras))
    assert agree(generate(pipe, CASE), expected_latents(loras))


def test_a_pipeline_made_from_the_applied_one_samples_with_the_fusion(loras: LoraPair) -> None:
    case = replace(CASE, kind="img2img")
    pipe, _ = applied(loras)

    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)

    assert agree(generate(other, case), expected_latents(loras, case))
    assert agree(generate(pipe, CASE), expected_latents(loras))


# Timesteps that are no view of the scheduler's own.


def denoise(pipe: Any, timesteps: Any) -> torch.Tensor:
    """A sampling loop as users write them."""
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * pipe.scheduler.init_noise_sigma
    words = torch.randn(1, 5, pipe.unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        for t in timesteps:
            scaled = pipe.scheduler.scale_model_input(latents, t)
            noise = pipe.unet(scaled, t, encoder_hidden_states=words).sample
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    ("other_form", "name"),
    some_pairs(
        [torch.Tensor.clone, torch.Tensor.tolist], ["DDIM", "PNDM", "Euler", "Heun"], share=2
    ),
)
def test_timesteps_that_are_no_view_are_found_all_the_same(
    name: Any, other_form: Any, loras: LoraPair
) -> None:
    case = replace(CASE, scheduler=name)
    pipe, _ = applied(loras, case)
    other = build(case)
    for each in (pipe, other):
        each.scheduler.set_timesteps(case.steps)
    with sampling(other, loras.reference(case), progress(case)):
        expected = denoise(other, other.scheduler.timesteps)

    for _ in range(2):
        pipe.scheduler.set_timesteps(case.steps)
        assert agree(denoise(pipe, other_form(pipe.scheduler.timesteps)), expected)


def test_a_begin_index_is_where_counting_starts(loras: LoraPair) -> None:
    case = replace(CASE, scheduler="Euler")
    pipe, _ = applied(loras, case)
    other = build(case)
    for each in (pipe, other):
        each.scheduler.set_timesteps(case.steps)
        each.scheduler.set_begin_index(3)
    with sampling(other, loras.reference(case), progress(case)[3:]):
        expected = denoise(other, other.scheduler.timesteps[3:])

    assert agree(denoise(pipe, pipe.scheduler.timesteps[3:].clone()), expected)


# Runs that end early.


def test_a_clean_run_after_an_interrupted_one(loras: LoraPair) -> None:
    pipe, handle = applied(loras)

    def interrupt(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return values

    interrupted = generate(pipe, CASE, callback_on_step_end=interrupt)
    assert handle.report().progress not in (progress(CASE)[0], progress(CASE)[-1])
    clean = generate(pipe, CASE)

    assert not agree(interrupted, clean)
    assert agree(clean, expected_latents(loras))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_clean_run_after_one_that_failed(error: type[BaseException], loras: LoraPair) -> None:
    pipe, _ = applied(loras)

    def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise error("in the middle")
        return values

    with pytest.raises(error, match="in the middle"):
        generate(pipe, CASE, callback_on_step_end=fail)

    assert agree(generate(pipe, CASE), expected_latents(loras))


def test_a_clean_run_after_a_switch_that_failed(
    loras: LoraPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the layers are written when it fails; none of them may stay as it is."""
    pipe, _ = applied(loras)
    generate(pipe, CASE)
    with monkeypatch.context() as patch:
        fail_after(patch, writes=5)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, CASE)  # going back to the first step

    assert agree(generate(pipe, CASE), expected_latents(loras))


def fail_after(patch: pytest.MonkeyPatch, writes: int) -> None:
    """Let writing the layers fail after some of them."""
    original, count = Merge._write_alone, iter(range(writes))

    def write(self: Merge, *args: Any) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt
        original(self, *args)

    patch.setattr(Merge, "_write_alone", write)


# Two generations at a time.


def in_another_thread(work: Any) -> list[BaseException]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


@pytest.mark.parametrize("through", ["the pipeline", "one made from it", "its scheduler"])
def test_a_second_thread_is_refused_and_the_first_ends_right(through: str, loras: LoraPair) -> None:
    pipe, _ = applied(loras)
    sibling = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    work = {
        "the pipeline": lambda: generate(pipe, CASE),
        "one made from it": lambda: generate(sibling, CASE),
        "its scheduler": lambda: pipe.scheduler.set_timesteps(3),
    }[through]
    errors: list[BaseException] = []

    def meddle(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            errors.extend(in_another_thread(work))
        return values

    found = generate(pipe, CASE, callback_on_step_end=meddle)

    assert [type(error) for error in errors] == [InUseError]
    assert str(errors[0]) == (
        "this denoiser is generating in another thread, and one fusion can be at one step only; "
        "wait for it, or give each thread its own pipeline."
    )
    assert agree(found, expected_latents(loras))
    assert in_another_thread(lambda: pipe.scheduler.set_timesteps(3)) == []  # now it may
