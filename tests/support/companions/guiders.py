"""How modular pipelines of diffusers guide: each of its guiders in the place of the default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from bare_pipelines import noise
from diffusers import WanTransformer3DModel
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    LTX2Guidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines.ltx2.modular_blocks_ltx2 import LTX2CoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import (
    QwenImageCoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from support.companions.companion import STEPS, Companion, On
from support.families import (
    ATTENTION,
    TOKENS,
    WIDTH,
    FamilyCase,
    flow_scheduler,
    masks,
    modular_latents,
    prompts,
    qwen_image,
    square,
)
from support.sd_families import sd
from support.video_families import ltx2, wan
from tiny_pipeline import TEXT_WIDTH


def qwen_image_modular() -> Any:
    parts = qwen_image().components
    return _modular(QwenImageCoreDenoiseStep(), parts["transformer"], parts["scheduler"])


def wan_modular() -> Any:
    """As wide as the latents that the pipeline makes."""
    config = {**wan().transformer.config, "in_channels": 16, "out_channels": 16}
    transformer = WanTransformer3DModel.from_config(config)
    return _modular(WanCoreDenoiseStep(), transformer, flow_scheduler(shift=3.0))


def sdxl_modular() -> Any:
    parts = sd("sdxl").components
    pipe = StableDiffusionXLCoreDenoiseStep().init_pipeline()
    pipe.update_components(**{name: parts[name] for name in ("unet", "scheduler", "vae")})
    return pipe


def ltx2_modular() -> Any:
    """Video and sound have a guider each; without the companion both are free of a classifier."""
    parts = ltx2().components
    pipe = LTX2CoreDenoiseStep().init_pipeline()
    pipe.update_components(
        **{name: parts[name] for name in ("transformer", "scheduler", "audio_vae")},
        guider=LTX2Guidance(guidance_scale=3.0),
        audio_guider=LTX2Guidance(guidance_scale=3.0),
    )
    return pipe


def _modular(blocks: Any, transformer: Any, scheduler: Any) -> Any:
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=transformer, scheduler=scheduler)
    return pipe


def _case(name: str, build: Callable[[], Any], **arguments: Any) -> FamilyCase:
    return FamilyCase(name, build, arguments, evaluations=2, call=modular_latents)


_QWEN = _case(
    "Qwen-Image modular",
    qwen_image_modular,
    **prompts(),
    **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"),
    **square(64),
)
_WAN = _case("Wan modular", wan_modular, **prompts(), **square(32), num_frames=5)
_LTX2 = _case(
    "LTX-2 modular",
    ltx2_modular,
    **{
        f"{sign}connector_{name}": noise(1, TOKENS, WIDTH, seed=2 * second + seed)
        for second, sign in enumerate(("", "negative_"))
        for seed, name in enumerate(("prompt_embeds", "audio_prompt_embeds"))
    },
    connector_attention_mask=torch.ones(1, TOKENS, dtype=torch.long),
    negative_connector_attention_mask=torch.ones(1, TOKENS, dtype=torch.long),
    batch_size=1,
    dtype=torch.float32,
    **square(64),
    num_frames=9,
)
_SDXL = replace(
    _case(
        "SDXL modular",
        sdxl_modular,
        **{
            f"{sign}{name}": noise(*shape, seed=seed)
            for seed, sign in enumerate(("", "negative_"))
            for name, shape in {
                "prompt_embeds": (1, TOKENS, 2 * TEXT_WIDTH),
                "pooled_prompt_embeds": (1, TEXT_WIDTH),
            }.items()
        },
        **square(),
    ),
    modules=ATTENTION,
    ran={"unet": range(STEPS)},
)


def _guided(guider: Callable[[], Any]) -> Callable[[Any], On]:
    def put_on(pipe: Any) -> On:
        before = pipe.guider
        pipe.update_components(guider=guider())
        return On(lambda: pipe.update_components(guider=before))

    return put_on


def _row(
    guider: Callable[..., Any],
    case: FamilyCase = _QWEN,
    evaluations: int | Sequence[int] = 2,
    package: str = "diffusers",
    quick: bool = False,
    **settings: Any,
) -> Companion:
    put_on = _guided(lambda: guider(**settings))
    return Companion(guider.__name__, case, put_on, package, evaluations=evaluations, quick=quick)


#: One evaluation more in each step but the first.
_FROM_THE_SECOND = (2, *[3] * (STEPS - 1))

GUIDERS = (
    _row(AdaptiveProjectedGuidance, adaptive_projected_guidance_momentum=-0.5),
    _row(AdaptiveProjectedMixGuidance, adaptive_projected_guidance_start_step=2),
    _row(AutoGuidance, _WAN, auto_guidance_config=LayerSkipConfig([1], "blocks")),
    _row(ClassifierFreeGuidance, evaluations=(1, 1, 1, 2, 2, 2), start=0.5),
    _row(ClassifierFreeZeroStarGuidance, _WAN),
    _row(FrequencyDecoupledGuidance, _SDXL, package="kornia"),
    _row(
        LTX2Guidance,
        _LTX2,
        evaluations=4,
        guidance_scale=3.0,
        stg_scale=1.0,
        modality_scale=3.0,
        spatio_temporal_guidance_blocks=[0],
    ),
    _row(MagnitudeAwareGuidance),
    _row(
        PerturbedAttentionGuidance,
        quick=True,
        evaluations=_FROM_THE_SECOND,
        perturbed_guidance_layers=[1],
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
    ),
    _row(
        SkipLayerGuidance,
        _WAN,
        evaluations=_FROM_THE_SECOND,
        skip_layer_config=LayerSkipConfig([1], "blocks"),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    ),
    _row(SmoothedEnergyGuidance, evaluations=_FROM_THE_SECOND, seg_guidance_layers=[1]),
    _row(TangentialClassifierFreeGuidance),
)
