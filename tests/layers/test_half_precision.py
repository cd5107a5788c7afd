"""What half precision costs is measured on the weights themselves, and reported."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.generation import TWO_STEPS, generate
from support.handmade import ATTENTION, CROSS_ATTENTION, State, delta_of, fusion_for, weight_of

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion

LAYERS = (
    f"unet.{ATTENTION}.to_q",
    f"unet.{CROSS_ATTENTION}.to_out.0",
    "unet.down_blocks.0.resnets.0.conv1",
    "text_encoder.encoder.layers.0.self_attn.q_proj",
)
HALVES = (torch.float16, torch.bfloat16)


def fusion_of_size(pipe: Any, share: float) -> Fusion:
    """Deltas of this share of their weight's norm, roughly."""
    spread = math.sqrt(sum(float(weight_of(pipe, layer).var()) for layer in LAYERS) / len(LAYERS))
    return fusion_for(pipe, LAYERS, size=share * spread)


def measured_rounding(pipe: Any, fusion: Fusion) -> float:
    """Of the deltas that the live weights really hold, early and late in a schedule."""
    base = {layer: weight_of(pipe, layer).double() for layer in LAYERS}
    errors = norms = 0.0
    with apply_fusion(pipe, fusion, mode="merge"):
        pipe.scheduler.set_timesteps(10)
        for slot in ("content", "style"):
            for entry in fusion.entries:
                exact = delta_of(entry, slot)
                held = weight_of(pipe, entry.layer).double() - base[entry.layer]
                errors += float((held - exact).square().sum())
                norms += float(exact.square().sum())
            pipe.scheduler.scale_model_input(torch.ones(1), pipe.scheduler.timesteps[-1])
    return math.sqrt(errors / norms)


@pytest.mark.parametrize("share", [0.5, 0.013])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_reported_rounding_is_that_of_the_weights(
    dtype: torch.dtype, share: float, pipe: Any
) -> None:
    pipe.to(dtype)
    fusion = fusion_of_size(pipe, share)

    measured = measured_rounding(pipe, fusion)
    with apply_fusion(pipe, fusion, mode="merge") as handle:
        reported = handle.report().rounding

    if dtype in HALVES:
        assert reported == pytest.approx(measured, rel=0.01)
    else:  # the float32 sums themselves round as much
        assert reported == pytest.approx(measured, rel=0.5)


@pytest.mark.parametrize(
    ("dtype", "share", "low", "high"),
    [
        (torch.float32, 0.5, 1e-8, 3e-7),
        (torch.float32, 0.0033, 1e-7, 3e-5),
        (torch.float16, 0.5, 1e-4, 1e-3),
        (torch.float16, 0.013, 0.01, 0.03),
        (torch.bfloat16, 0.5, 1e-3, 1e-2),
        (torch.bfloat16, 0.013, 0.08, 0.2),
        (torch.bfloat16, 0.0033, 0.2, 0.7),
    ],
    ids=str,
)
def test_small_deltas_drown_in_half_precision(
    dtype: torch.dtype, share: float, low: float, high: float, pipe: Any
) -> None:
    fusion = fusion_of_size(pipe, share)
    pipe.to(dtype)

    with apply_fusion(pipe, fusion, mode="merge") as handle:
        assert low < handle.report().rounding < high


def test_rounding_follows_the_weights_of_the_slots(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    handle = apply_fusion(pipe, fusion_of_size(pipe, 0.1), mode="merge")
    full = handle.report().rounding

    handle.set(content=0.1, style=0.1)
    assert handle.report().rounding > 5 * full
    handle.set(content=0, style=0)
    assert handle.report().rounding == 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_weight_is_the_exact_sum_rounded_once(dtype: torch.dtype, pipe: Any) -> None:
    """And not a sum of two roundings."""
    pipe.to(dtype)
    fusion = fusion_of_size(pipe, 0.3)
    base = {layer: weight_of(pipe, layer).double() for layer in LAYERS}

    apply_fusion(pipe, fusion, mode="merge")

    for entry in fusion.entries:
        exact = (base[entry.layer] + delta_of(entry, "content")).to(dtype)
        same = weight_of(pipe, entry.layer) == exact
        assert same.float().mean() > 0.995  # the others are ties of float32's last digit


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_switching_back_and_forth_does_not_drift(dtype: torch.dtype, pipe: Any) -> None:
    pipe.to(dtype)
    apply_fusion(pipe, fusion_of_size(pipe, 0.1), mode="merge")
    generate(pipe, TWO_STEPS)
    after_one = State.of(pipe).bits

    for _ in range(50):
        pipe.scheduler.set_timesteps(10)
        pipe.scheduler.scale_model_input(torch.ones(1), pipe.scheduler.timesteps[-1])

    assert State.of(pipe).bits == after_one
