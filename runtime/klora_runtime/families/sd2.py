"""Stable Diffusion 2.x: the modules of 1.x, other widths, and linear projections."""

from __future__ import annotations

from klora_runtime.families import sd1
from klora_runtime.families.family import Family, Kohya, Mark, TextEncoder
from klora_runtime.families.text_encoders import CLIP
from klora_runtime.families.unet import KERNELS, POINTWISE

LDM = sd1.STRUCTURE.layout("sd2")

FAMILY = Family(
    key="sd2",
    title="Stable Diffusion 2.x",
    pipeline="StableDiffusionPipeline",
    hub="stabilityai/stable-diffusion-2-1",
    models=("UNet2DConditionModel",),
    tag="stable-diffusion",
    denoisers=("unet",),
    layouts=(LDM,),
    blocks=sd1.STRUCTURE.blocks,
    marks=(Mark(r"\.attn2\.to_[kv]$", (1024,)),),
    stated=r"stable-diffusion-v2|sd-v2|sd-2-1",
    script=sd1.FAMILY.script,
    # Its trainer's architecture string contains the picture's size, which is unknown here.
    kohya=Kohya((LDM.in_diffusers_names(),), {"ss_base_model_version": "sd_v2", "ss_v2": "True"}),
    text_encoders=(TextEncoder("text_encoder", CLIP, kohya="lora_te_", comfy="clip_h"),),
    kernels=KERNELS,
    pointwise=POINTWISE,
)
