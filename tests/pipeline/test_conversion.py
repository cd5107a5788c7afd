"""A pipeline that is converted while it carries a fusion: its layers follow at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.generation import TWO_STEPS, build, generate, scheduler
from support.handmade import ATTENTION, State, fusion_for, hand_fusion

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import IncompatibleModelError

CONSTANT = (f"unet.{ATTENTION}.to_q", "text_encoder.encoder.layers.0.self_attn.q_proj")
MODES = ("merge", "branch")


def constant_fusion(pipe: Any) -> Fusion:
    """Nothing in it switches, so no clock is asked."""
    return fusion_for(pipe, CONSTANT, switch=None)


def converted(*dtypes: torch.dtype) -> Any:
    pipe = build(TWO_STEPS)
    for dtype in dtypes:
        pipe.to(dtype)
    return pipe


def numbers(pipe: Any) -> dict[str, Any]:
    """Dtype, strides and bits of every parameter."""
    return {name: bits[2:] for name, bits in State.of(pipe).bits.items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_pipeline_that_shares_the_models_follows_too(mode: str) -> None:
    """It has a scheduler of its own, and the one that carries the fusion has not run since."""
    pipe, same = converted(), converted(torch.bfloat16)
    fusion = constant_fusion(pipe)
    apply_fusion(pipe, fusion, mode)
    pipe.to(torch.bfloat16)
    apply_fusion(same, fusion, mode)

    parts = {**pipe.components, "scheduler": scheduler(TWO_STEPS.scheduler, 2)}
    sibling = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)

    assert torch.equal(generate(sibling, TWO_STEPS), generate(same, TWO_STEPS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("enabled", [True, False])
def test_what_was_rounded_in_between_stays_rounded(enabled: bool, mode: str) -> None:
    pipe, same = converted(), converted(torch.bfloat16, torch.float32)
    before, fusion = numbers(same), constant_fusion(pipe)
    handle = apply_fusion(pipe, fusion, mode)
    handle.enabled = enabled

    pipe.to(torch.bfloat16)
    pipe.to(torch.float32)

    handle.enabled = True
    with apply_fusion(same, fusion, mode):
        assert numbers(pipe) == numbers(same)
        assert torch.equal(generate(pipe, TWO_STEPS), generate(same, TWO_STEPS))
    handle.remove()
    assert numbers(pipe) == before


@pytest.mark.parametrize("mode", MODES)
def test_a_dtype_that_cannot_hold_it_is_refused_at_the_next_run(mode: str) -> None:
    pipe = converted()
    strong = fusion_for(pipe, CONSTANT[:1], switch=None, size=1e6)
    handle = apply_fusion(pipe, hand_fusion(*strong.entries), mode)

    pipe.to(torch.float16)

    with pytest.raises(IncompatibleModelError, match="too strong for the dtype"):
        generate(pipe, TWO_STEPS)
    handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), generate(converted(torch.float16), TWO_STEPS))
