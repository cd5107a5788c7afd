"""The base of drawings, distilled into a LoRA of few steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import drawings
import pytest
import torch
from diffusers import StableDiffusionPipeline
from drawings.accelerator.training import Plan, distil
from drawings.accelerator.trajectories import Trajectories, few_step_scheduler, trajectories
from drawings.base.train import trained
from drawings.loras.training import remove
from support.tiny_drawings import tiny_drawings

from klora_compile import compile_fusion
from klora_runtime import apply_fusion

DRAWINGS = Path(drawings.__file__).parent
STEPS = 3


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_drawings()


@pytest.fixture(scope="module")
def paths(pipe: StableDiffusionPipeline) -> Trajectories:
    prompts = ["a fox", "a fox, noto style", "a fox, noto style"]
    return trajectories(pipe, prompts, STEPS, torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_paths_lead_from_noise_to_drawings_at_the_levels_of_the_sampler(
    pipe: StableDiffusionPipeline, paths: Trajectories
) -> None:
    scheduler = few_step_scheduler(pipe)
    scheduler.set_timesteps(STEPS)
    assert paths.latents.shape == (STEPS + 1, 3, 8, 12, 12)
    assert torch.equal(paths.sigmas, scheduler.sigmas)
    assert paths.sigmas[-1] == 0
    noise = torch.randn(3, 8, 12, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(paths.latents[0], noise)


def test_flows_at_every_level_take_the_sampler_along_the_path(
    pipe: StableDiffusionPipeline, paths: Trajectories
) -> None:
    scheduler = few_step_scheduler(pipe)
    scheduler.set_timesteps(STEPS)
    some = torch.tensor([2, 0])
    now = paths.latents[0, some]
    for step, t in enumerate(scheduler.timesteps):
        assert t == paths.timesteps[step]
        now = scheduler.step(paths.flow(step, some), t, now).prev_sample
        assert torch.allclose(now, paths.latents[step + 1, some], atol=1e-4)


def test_paths_are_guided_and_end_where_many_steps_of_the_base_end(
    pipe: StableDiffusionPipeline, paths: Trajectories
) -> None:
    """The tiny denoiser is smooth, so Euler's method in ten steps is near the sampler in fifty."""
    drawn = {
        guidance: pipe(
            "a fox",
            num_inference_steps=50,
            guidance_scale=guidance,
            latents=paths.latents[0, :1].clone(),
            output_type="latent",
        ).images
        for guidance in (1.0, 3.0)
    }
    apart = {g: (each - paths.latents[-1, :1]).square().mean() for g, each in drawn.items()}
    assert apart[3.0] < 0.05 * drawn[3.0].square().mean()
    assert apart[3.0] < 0.5 * apart[1.0]


@pytest.mark.slow
def test_the_lora_learns_the_flows_and_nothing_else_of_the_base_changes(
    pipe: StableDiffusionPipeline, paths: Trajectories
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    losses = []
    for updates in (1, 40):
        losses.append(distil(pipe, paths, Plan(updates, batch=3, rank=4, rate=1e-2)))
        remove(pipe)
    assert losses[1] < 0.9 * losses[0]
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_kept_lora_draws_in_four_steps_what_the_base_draws_in_many() -> None:
    file = DRAWINGS / "accelerator" / "weights" / "accelerator-4.safetensors"
    assert file.stat().st_size < 2e6
    pipe = trained(DRAWINGS / "base" / "weights")

    def drawn(steps: int, guidance: float) -> torch.Tensor:
        found: torch.Tensor = pipe(
            ["a crab, noto style", "a pizza, twemoji style"],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
            output_type="pt",
        ).images
        return found

    many = drawn(16, 3.0)
    pipe.scheduler = few_step_scheduler(pipe)
    bare = drawn(4, 1.0)
    with apply_fusion(pipe, compile_fusion(file, device="cpu")):
        fast = drawn(4, 1.0)
    far, near = ((each - many).square().mean().sqrt().item() for each in (bare, fast))
    assert near < 0.8 * far
