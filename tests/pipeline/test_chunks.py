"""A video in chunks (AnyFlow's FAR): between them the denoiser fills a cache, at timestep 0.

The cache holds keys and values of the finished chunk, and every step of the next one attends to
them. The chunk is clean by then, and the denoiser is told timestep 0, the end of the schedule. So
the LoRAs of the last step act there, and not those of the first step that comes next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnyFlowFARPipeline
from reference import KLora, sampling
from support.generation import LEAST_EFFECT, TOLERANCE
from support.sweep.arguments import arguments_of
from support.sweep.inputs import STEPS
from support.sweep.pipelines import build
from tiny_pipeline import relative_difference, tiny_lora

from klora_compile import compile_fusion
from klora_runtime import apply_fusion

MOMENTS = [(step + 0.5) / STEPS for step in range(STEPS)]
LAST, FIRST = MOMENTS[-1], MOMENTS[0]

pytestmark = pytest.mark.slow


def generate(pipe: Any) -> torch.Tensor:
    own = {"chunk_partition": [1, 2], "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(7)
    frames = pipe(generator=generator, **{**arguments_of(pipe), **own}).frames
    assert isinstance(frames, torch.Tensor)
    return frames


def test_the_cache_between_two_chunks_is_filled_with_the_last_steps_loras(tmp_path: Path) -> None:
    pipe = build(AnyFlowFARPipeline)
    files = [
        tiny_lora(pipe, tmp_path / f"{rank}.safetensors", seed=rank, rank=rank, modules=("",))
        for rank in (4, 3)
    ]
    bare = generate(pipe)
    with sampling(pipe, KLora(*files), [*MOMENTS, LAST, *MOMENTS]):
        expected = generate(pipe)
    with sampling(pipe, KLora(*files), [*MOMENTS, FIRST, *MOMENTS]):
        otherwise = generate(pipe)
    assert relative_difference(bare, expected) >= LEAST_EFFECT
    assert relative_difference(otherwise, expected) >= 10 * TOLERANCE

    for mode in ("merge", "branch"):
        with apply_fusion(pipe, compile_fusion(*files, device="cpu"), mode):
            assert relative_difference(generate(pipe), expected) <= TOLERANCE
    assert torch.equal(generate(pipe), bare)
