"""Families with a UNet, as `families` has those with a transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from bare_pipelines import no_text_encoders, noise
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from support.families import (
    ATTENTION,
    IMAGE,
    LEFT_HALF,
    STEPS,
    FamilyCase,
    latents_of,
    square,
)
from tiny_pipeline import SD_BETAS, tiny_pipeline
from torch import nn


def sd(family: Any, **settings: Any) -> Any:
    pipe = tiny_pipeline(family, **settings)
    pipe.scheduler = EulerDiscreteScheduler(**SD_BETAS, steps_offset=1)
    return pipe


def controlnet_of(unet: UNet2DConditionModel) -> ControlNetModel:
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=0.1)  # it begins at zero
    return controlnet


def sd1_controlnet() -> Any:
    parts = sd("sd1").components
    controlnet = controlnet_of(parts["unet"])
    return StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet, requires_safety_checker=False
    )


def sdxl_controlnet() -> Any:
    parts = sd("sdxl").components
    controlnet = controlnet_of(parts["unet"])
    return StableDiffusionXLControlNetPipeline(
        **parts, controlnet=controlnet, add_watermarker=False
    )


def sdxl_inpaint() -> Any:
    parts = sd("sdxl", latent_channels=9).components
    return StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)


def sdxl_refiner() -> Any:
    """With one text encoder, an aesthetic score, and a network of its own."""
    base = sd("sdxl")
    width = base.text_encoder_2.config.hidden_size
    settings = {
        "cross_attention_dim": width,
        "transformer_layers_per_block": 1,
        "projection_class_embeddings_input_dim": 5 * 8 + width,
    }
    unet = UNet2DConditionModel.from_config({**base.unet.config, **settings})
    parts = {**base.components, **no_text_encoders(), "unet": unet}
    return StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    )


def base_then_refiner(
    base: Any, *, height: int, width: int, **arguments: Any
) -> Sequence[torch.Tensor]:
    """The base's half of the schedule, then the refiner's, which carries no fusion."""
    (half,) = latents_of(base, height=height, width=width, denoising_end=0.5, **arguments)
    refiner = SDXL_REFINER.pipeline()
    return latents_of(refiner, **{**arguments, **SDXL_REFINER.arguments, "image": half})


def sd_case(
    name: str,
    build: Callable[[], Any],
    steps: Sequence[int] = range(STEPS),
    *,
    pattern: Literal["s", "s*"] = "s",
    call: Any = None,
    **arguments: Any,
) -> FamilyCase:
    arguments = {"prompt": "a fox", "guidance_scale": 3.0, **arguments}
    return FamilyCase(
        name, build, arguments, ATTENTION, {"unet": steps}, pattern=pattern, call=call
    )


SDXL_REFINER = sd_case(
    "SDXL refiner", sdxl_refiner, range(2, 4), image=noise(1, 4, 8, 8), denoising_start=0.5
)

UNETS = (
    sd_case("SD1", lambda: sd("sd1"), **square()),
    sd_case("SD2", lambda: sd("sd2"), pattern="s*", **square()),
    sd_case("SDXL", lambda: sd("sdxl"), **square()),
    sd_case("SD1 ControlNet", sd1_controlnet, pattern="s*", image=IMAGE, **square()),
    sd_case("SDXL ControlNet", sdxl_controlnet, image=IMAGE, **square()),
    sd_case(
        "SDXL inpaint",
        sdxl_inpaint,
        range(2, 4),
        **{"image": IMAGE, "mask_image": LEFT_HALF, "strength": 0.5, **square()},
    ),
    sd_case("SDXL to refiner", lambda: sd("sdxl"), range(2), call=base_then_refiner, **square()),
    SDXL_REFINER,
)
