"""Caches of what is clean already: pipelines fill them outside of their loops, at timestep 0.

AnyFlow's FAR makes a video in chunks and keeps keys and values of each finished chunk, and of a
video that it is given; GLM-Image keeps those of the images that it is given. Every step then
attends to them. The denoiser is told timestep 0, the end of the schedule, so the LoRAs of its end
act there: not those of the first step, which comes next, and not those of the last one, which is
half a step before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnyFlowFARPipeline, GlmImagePipeline
from reference import KLora, sampling
from support.generation import LEAST_EFFECT, TOLERANCE
from support.sweep.arguments import arguments_of
from support.sweep.inputs import FEW, STEPS, picture
from support.sweep.pipelines import build
from tiny_pipeline import relative_difference, tiny_lora

from klora_compile import compile_fusion
from klora_runtime import apply_fusion

MOMENTS = [(step + 0.5) / STEPS for step in range(STEPS)]
FIRST, LAST, END = MOMENTS[0], MOMENTS[-1], 1.0

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Filling:
    """A pipeline that fills caches, and what its denoiser is evaluated for."""

    name: str
    pipeline: Callable[[], Any]
    arguments: dict[str, Any]
    evaluations: Callable[[float], Sequence[float]]
    """Progress at a cache's filling -> progress at every evaluation."""

    def generate(self, pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        made = pipe(generator=generator, **{**arguments_of(pipe), **self.arguments})[0]
        assert isinstance(made, torch.Tensor)
        return made

    def __str__(self) -> str:
        return self.name


def far() -> Any:
    return build(AnyFlowFARPipeline)


def glm_image() -> Any:
    pipe = build(GlmImagePipeline)
    channels = pipe.vae.config.latent_channels
    pipe.vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    return pipe


GUIDED = {"guidance_scale": 3.0, "return_dict": False}
VIDEO = torch.rand(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
CLEAN = {
    "image": [[picture(FEW)]],
    "prior_token_image_ids": [torch.arange((FEW // 16) ** 2)],
    "source_image_grid_thw": [torch.tensor([[1, FEW // 16, FEW // 16]])],
}

FILLINGS = (
    Filling(
        "a chunk of FAR",
        far,
        {**GUIDED, "chunk_partition": [1, 2]},
        lambda clean: [*MOMENTS, clean, *MOMENTS],
    ),
    Filling(
        "a video given to FAR",
        far,
        {**GUIDED, "chunk_partition": [1, 1, 1], "video": VIDEO},
        lambda clean: [clean, *MOMENTS, clean, *MOMENTS],
    ),
    Filling(
        "an image given to GLM-Image",
        glm_image,
        {**GUIDED, **CLEAN},
        lambda clean: [clean, *(moment for moment in MOMENTS for _ in range(2))],
    ),
)


@pytest.mark.parametrize("filling", FILLINGS, ids=str)
def test_a_cache_of_clean_input_is_filled_with_the_loras_of_the_end(
    filling: Filling, tmp_path: Path
) -> None:
    pipe = filling.pipeline()
    files = [
        tiny_lora(pipe, tmp_path / f"{seed}.safetensors", seed=seed, rank=rank, modules=("",))
        for seed, rank in ((1, 4), (2, 3))
    ]
    bare = filling.generate(pipe)
    literal = {}
    for clean in (FIRST, LAST, END):
        with sampling(pipe, KLora(*files), filling.evaluations(clean)):
            literal[clean] = filling.generate(pipe)
    expected = literal[END]
    assert relative_difference(bare, expected) >= LEAST_EFFECT
    for other in (FIRST, LAST):
        assert relative_difference(literal[other], expected) >= 10 * TOLERANCE

    for mode in ("merge", "branch"):
        with apply_fusion(pipe, compile_fusion(*files, device="cpu"), mode):
            for _ in range(2):
                assert relative_difference(filling.generate(pipe), expected) <= TOLERANCE
    assert torch.equal(filling.generate(pipe), bare)
