"""Stable Diffusion XL, base. kohya trains it in the names of its authors."""

from __future__ import annotations

from klora_runtime.families.family import SD_SCRIPTS, Family, Kohya, Mark, Script, TextEncoder
from klora_runtime.families.text_encoders import CLIP
from klora_runtime.families.unet import KERNELS, POINTWISE, UNetStructure

_STRUCTURE = UNetStructure((1, 2, 4), transformers=(0, 2, 10), middle=10, size_and_crop=True)
LDM = _STRUCTURE.layout("sdxl")

FAMILY = Family(
    key="sdxl",
    title="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    hub="stabilityai/stable-diffusion-xl-base-1.0",
    models=("UNet2DConditionModel",),
    tag="stable-diffusion-xl",
    denoisers=("unet",),
    layouts=(LDM,),
    blocks=_STRUCTURE.blocks,
    marks=(Mark(r"\.attn2\.to_[kv]$", (2048,)),),
    stated=r"stable-diffusion-xl|sdxl",
    script=Script("networks.lora", SD_SCRIPTS),
    kohya=Kohya(
        (LDM,),
        {
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        },
    ),
    text_encoders=(
        TextEncoder("text_encoder", CLIP, kohya="lora_te1_", comfy="clip_l"),
        TextEncoder("text_encoder_2", CLIP, kohya="lora_te2_", comfy="clip_g"),
    ),
    kernels=KERNELS,
    pointwise=POINTWISE,
)
