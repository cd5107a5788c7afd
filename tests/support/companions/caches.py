"""What skips work between the steps of a transformer: the caches of diffusers, and cache-dit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    WanPipeline,
)
from support.companions.companion import STEPS, Companion, On
from support.families import (
    FLUX_BLOCKS,
    FLUX_PROMPT,
    HEADS,
    WIDTH,
    FamilyCase,
    assembled,
    flow_scheduler,
    flux,
    masks,
    prompts,
    square,
)
from support.video_families import VIDEOS, wan
from torch import nn


def wan_of_one_transformer() -> Any:
    pipe = wan()
    return assembled(WanPipeline, pipe.transformer, pipe.scheduler)


FLUX = FamilyCase(
    "FLUX.1",
    lambda: flux(num_layers=2, num_single_layers=4),
    {**FLUX_PROMPT, **square(64)},
    modules=FLUX_BLOCKS,
)


_COGVIDEOX = next(case for case in VIDEOS if case.name == "CogVideoX")
_WAN = FamilyCase(
    "Wan 2.1", wan_of_one_transformer, {**prompts(), **square(32), "num_frames": 5}, evaluations=2
)


def nucleus() -> Any:
    """A mixture of experts, with the text's keys and values apart from the image's."""
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        **HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=1.0,
        mlp_ratio=16.0,
    )
    for parameter in transformer.parameters():
        if parameter.dim() > 1:  # its experts come with whatever was in memory
            nn.init.normal_(parameter, std=0.2)
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    return NucleusMoEImagePipeline(transformer, scheduler, None, None, None)


_NUCLEUS = FamilyCase(
    "NucleusMoE-Image",
    nucleus,
    {
        **prompts(),
        **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"),
        **square(64),
    },
    modules=("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "encoder_proj"),
    evaluations=2,
)


def _cached(config: Callable[[Any], Any]) -> Callable[[Any], On]:
    """Puts on a cache of diffusers.

    Args:
        config: its configuration for a pipeline.
    """

    def put_on(pipe: Any) -> On:
        pipe.transformer.enable_cache(config(pipe))
        return On(pipe.transformer.disable_cache)

    return put_on


def _cache_dit(pipe: Any) -> On:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=2,
        residual_diff_threshold=0.5,
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    return On(lambda: cache_dit.disable_cache(pipe))


def _pyramid(pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _faster(pipe: Any) -> FasterCacheConfig:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _sea(pipe: Any) -> SeaCacheConfig:
    return SeaCacheConfig(
        threshold=10.0,
        raw_vision_callback=lambda module, args, kwargs: list(kwargs["hidden_states"]),
    )


CACHES = (
    Companion("cache-dit", FLUX, _cache_dit, "cache_dit", "cache-dit"),
    Companion("FirstBlockCache", FLUX, _cached(lambda pipe: FirstBlockCacheConfig(0.5))),
    Companion(
        "MagCache",
        FLUX,
        _cached(
            lambda pipe: MagCacheConfig(
                threshold=1.0,
                max_skip_steps=1,
                num_inference_steps=STEPS,
                mag_ratios=torch.full((STEPS,), 0.9),
            )
        ),
        quick=False,
    ),
    Companion(
        "TaylorSeer",
        FLUX,
        _cached(
            lambda pipe: TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
            )
        ),
        quick=False,
    ),
    Companion(
        "TaylorSeer, on single layers",
        FLUX,
        _cached(
            lambda pipe: TaylorSeerCacheConfig(
                cache_interval=2,
                disable_cache_before_step=2,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=[r".*\.to_(q|out\.0)", r".*\.proj_mlp"],
            )
        ),
    ),
    Companion(
        "TaylorSeer, lite mode",
        FLUX,
        _cached(
            lambda pipe: TaylorSeerCacheConfig(
                cache_interval=2,
                disable_cache_before_step=2,
                taylor_factors_dtype=torch.float32,
                use_lite_mode=True,
            )
        ),
        quick=False,
    ),
    Companion("PyramidAttentionBroadcast", _COGVIDEOX, _cached(_pyramid)),
    Companion("FasterCache", _COGVIDEOX, _cached(_faster)),
    Companion("SeaCache", _WAN, _cached(_sea)),
    Companion("TextKVCache", _NUCLEUS, _cached(lambda pipe: TextKVCacheConfig()), lossless=True),
)
