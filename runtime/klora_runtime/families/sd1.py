"""Stable Diffusion 1.x. kohya trains it in diffusers' names; other files are as in ``unet``."""

from __future__ import annotations

from klora_runtime.families.family import SD_SCRIPTS, Family, Kohya, Mark, Script, TextEncoder
from klora_runtime.families.text_encoders import CLIP
from klora_runtime.families.unet import KERNELS, POINTWISE, UNetStructure

STRUCTURE = UNetStructure((1, 2, 4, 4), transformers=(1, 1, 1, 0), middle=1, size_and_crop=False)
LDM = STRUCTURE.layout("sd1")

FAMILY = Family(
    key="sd1",
    title="Stable Diffusion 1.x",
    pipeline="StableDiffusionPipeline",
    hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
    models=(
        "UNet2DConditionModel",
        "UNetMotionModel",
    ),
    tag="stable-diffusion",
    denoisers=("unet",),
    layouts=(LDM,),
    blocks=STRUCTURE.blocks,
    marks=(Mark(r"\.attn2\.to_[kv]$", (768,)),),
    stated=r"stable-diffusion-v1|sd-v1|sd-1-5",
    script=Script("networks.lora", SD_SCRIPTS),
    kohya=Kohya(
        (LDM.in_diffusers_names(),),
        {
            "ss_base_model_version": "sd_v1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
        },
    ),
    text_encoders=(TextEncoder("text_encoder", CLIP, kohya="lora_te_", comfy="clip_l"),),
    kernels=KERNELS,
    pointwise=(*POINTWISE, "proj_in", "proj_out"),
)
