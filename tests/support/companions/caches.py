"""What skips work between the steps of a transformer: the caches of diffusers, and cache-dit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
)
from support.companions.companion import STEPS, Companion, On
from support.families import FLUX_BLOCKS, FLUX_PROMPT, FamilyCase, assembled, flux, prompts, square
from support.video_families import VIDEOS, wan


def wan_of_one_transformer() -> Any:
    pipe = wan()
    return assembled(WanPipeline, pipe.transformer, pipe.scheduler)


_FLUX = FamilyCase(
    "FLUX.1",
    lambda: flux(num_layers=2, num_single_layers=4),
    {**FLUX_PROMPT, **square(64)},
    modules=FLUX_BLOCKS,
)


_COGVIDEOX = next(case for case in VIDEOS if case.name == "CogVideoX")
_WAN = FamilyCase(
    "Wan 2.1", wan_of_one_transformer, {**prompts(), **square(32), "num_frames": 5}, evaluations=2
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
    Companion("cache-dit", _FLUX, _cache_dit, "cache_dit", "cache-dit"),
    Companion("FirstBlockCache", _FLUX, _cached(lambda pipe: FirstBlockCacheConfig(0.5))),
    Companion(
        "MagCache",
        _FLUX,
        _cached(
            lambda pipe: MagCacheConfig(
                threshold=1.0,
                max_skip_steps=1,
                num_inference_steps=STEPS,
                mag_ratios=torch.full((STEPS,), 0.9),
            )
        ),
    ),
    Companion(
        "TaylorSeer",
        _FLUX,
        _cached(
            lambda pipe: TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
            )
        ),
    ),
    Companion(
        "TaylorSeer, lite mode",
        _FLUX,
        _cached(
            lambda pipe: TaylorSeerCacheConfig(
                cache_interval=2,
                disable_cache_before_step=2,
                taylor_factors_dtype=torch.float32,
                use_lite_mode=True,
            )
        ),
    ),
    Companion("PyramidAttentionBroadcast", _COGVIDEOX, _cached(_pyramid)),
    Companion("FasterCache", _COGVIDEOX, _cached(_faster)),
    Companion("SeaCache", _WAN, _cached(_sea)),
)
