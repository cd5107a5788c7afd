"""Parts of pipelines around ``UNet2DConditionModel``, which have a tiny one that takes prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    MotionAdapter,
    SparseControlNetModel,
    T2IAdapter,
    UNet2DConditionModel,
)
from support.sd_families import controlnet_of
from support.sweep.shrinking import tiny
from support.sweep.words import tiny_encoder, tiny_processor
from tiny_pipeline import OUTPUT_SCALE, SD_BETAS, TEXT_WIDTH, tiny_pipeline
from transformers import CLIPImageProcessorPil

_UNCLIP = {
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2 * TEXT_WIDTH,
}

#: Pipeline -> settings of its UNet.
UNET: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionInstructPix2PixPipeline": {"in_channels": 8},
    "StableDiffusionXLInstructPix2PixPipeline": {"in_channels": 8},
    "MarigoldDepthPipeline": {"in_channels": 8},
    "MarigoldNormalsPipeline": {"in_channels": 8},
    "MarigoldIntrinsicsPipeline": {"in_channels": 12, "out_channels": 8},
    "PaintByExamplePipeline": {"in_channels": 9},
    "StableDiffusionDepth2ImgPipeline": {"in_channels": 5},
    "StableDiffusionUpscalePipeline": {"in_channels": 7, "num_class_embeds": 1000},
    "StableDiffusionLatentUpscalePipeline": {
        "in_channels": 8,
        "out_channels": 5,
        "time_cond_proj_dim": 160,
    },
    "LatentConsistencyModelPipeline": {"time_cond_proj_dim": 8},
    "LatentConsistencyModelImg2ImgPipeline": {"time_cond_proj_dim": 8},
    "StableDiffusionControlNetXSPipeline": {"layers_per_block": 2},
    "StableDiffusionXLControlNetXSPipeline": {"layers_per_block": 2},
    "StableUnCLIPPipeline": _UNCLIP,
    "StableUnCLIPImg2ImgPipeline": _UNCLIP,
    "StableDiffusionGLIGENPipeline": {"attention_type": "gated"},
    "StableDiffusionGLIGENTextImagePipeline": {"attention_type": "gated-text-image"},
}

#: Pipeline -> its scheduler, where it has to be one of some.
SCHEDULERS: Mapping[str, Callable[[], Any]] = {
    **dict.fromkeys(
        (
            "StableDiffusionSAGPipeline",
            "StableDiffusionPix2PixZeroPipeline",
            *("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"),
            *("StableDiffusionAttendAndExcitePipeline", "StableDiffusionDiffEditPipeline"),
        ),
        lambda: DDIMScheduler(**SD_BETAS, steps_offset=1, clip_sample=False),
    ),
    "CycleDiffusionPipeline": lambda: DDIMScheduler(
        **SD_BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False
    ),
    **dict.fromkeys(
        ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        lambda: LCMScheduler(**SD_BETAS),
    ),
    **dict.fromkeys(
        ("LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL"),
        lambda: DPMSolverMultistepScheduler(
            **SD_BETAS, algorithm_type="sde-dpmsolver++", solver_order=2
        ),
    ),
    "StableDiffusionParadigmsPipeline": lambda: DDIMParallelScheduler(**SD_BETAS, steps_offset=1),
}


def unet_of(base: UNet2DConditionModel, **settings: Any) -> UNet2DConditionModel:
    """The tiny UNet with other settings."""
    if not settings:
        return base
    known = {name: value for name, value in base.config.items() if not name.startswith("_")}
    unet = tiny(UNet2DConditionModel, **{**known, **settings})
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():
            parameter.mul_(OUTPUT_SCALE)
    return unet


def is_stable_diffusion(kind: type[DiffusionPipeline]) -> bool:
    """Whether a pipeline is one around its UNet, its decoder, and CLIP if it reads words."""
    named = inspect.signature(kind.__init__).parameters
    words = str(named.get("text_encoder", "CLIP"))
    return "UNet2DConditionModel" in str(named.get("unet")) and "vae" in named and "CLIP" in words


def stable_diffusion(kind: type[DiffusionPipeline]) -> dict[str, Any]:
    """The parts that a pipeline of this class shares with Stable Diffusion, and what follows them.

    There is nothing for a pipeline that is built in another way.
    """
    named = inspect.signature(kind.__init__).parameters
    if not is_stable_diffusion(kind):
        return {}
    base = tiny_pipeline("sdxl" if "text_encoder_2" in named else "sd1")
    unet = unet_of(base.unet, **UNET.get(kind.__name__, {}))
    given: dict[str, Any] = {
        **base.components,
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(**SD_BETAS, steps_offset=1),
        "requires_safety_checker": False,
        "add_watermarker": False,
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "image_encoder": None,
        "low_res_scheduler": DDPMScheduler(),
        "image_noising_scheduler": DDPMScheduler(),
        "inverse_scheduler": DDIMInverseScheduler(**SD_BETAS, clip_sample=False),
    }
    if "image_encoder" in named and "None" not in str(named["image_encoder"]):
        given["image_encoder"] = tiny_encoder(
            named["image_encoder"].annotation, projection_dim=TEXT_WIDTH
        )
        given["feature_extractor"] = tiny_processor(CLIPImageProcessorPil)
    if kind.__name__ in SCHEDULERS:
        given["scheduler"] = SCHEDULERS[kind.__name__]()
    annotation = str(named.get("controlnet"))
    if "controlnet" in named:
        given["controlnet"] = _control(annotation, unet)
    if "motion_adapter" in named:
        given["motion_adapter"] = tiny(
            MotionAdapter,
            block_out_channels=unet.config.block_out_channels,
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            conv_in_channels=9 if kind.__name__ == "PIAPipeline" else None,
        )
    if "adapter" in named:
        is_xl = unet.config.addition_embed_type is not None
        given["adapter"] = tiny(
            T2IAdapter,
            channels=list(unet.config.block_out_channels),
            num_res_blocks=1,
            downscale_factor=4 if is_xl else 2,
            adapter_type="full_adapter_xl" if is_xl else "full_adapter",
        )
    return {name: value for name, value in given.items() if name in named}


#: Settings that a ControlNet has from its UNet.
SHARED = (
    *("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups"),
    *("cross_attention_dim", "attention_head_dim", "transformer_layers_per_block"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    "use_linear_projection",
)


def _control(annotation: str, unet: UNet2DConditionModel) -> Any:
    if "ControlNetXSAdapter" in annotation:
        return ControlNetXSAdapter.from_unet(
            unet,
            size_ratio=1,
            learn_time_embedding=True,
            conditioning_embedding_out_channels=(8, 8),
        )
    if "ControlNetUnionModel" in annotation:
        return tiny(
            ControlNetUnionModel,
            **{name: unet.config[name] for name in SHARED},
            conditioning_embedding_out_channels=(8, 8),
            num_trans_channel=unet.config.block_out_channels[0],
            num_proj_channel=unet.config.block_out_channels[0],
            num_trans_head=2,
        )
    if "SparseControlNetModel" in annotation:
        return tiny(
            SparseControlNetModel,
            conditioning_channels=3,
            block_out_channels=unet.config.block_out_channels,
            down_block_types=("CrossAttnDownBlockMotion",) * 2,
            cross_attention_dim=unet.config.cross_attention_dim,
            conditioning_embedding_out_channels=(8, 8),
            norm_num_groups=8,
            layers_per_block=1,
            attention_head_dim=8,
            motion_num_attention_heads=2,
            use_simplified_condition_embedding=False,
        )
    return controlnet_of(unet)
