"""The refiner of Stable Diffusion XL, which improves a picture of another model."""

from __future__ import annotations

from klora_runtime.families.family import Family, Kohya, Mark
from klora_runtime.families.unet import KERNELS, POINTWISE, UNetStructure

_STRUCTURE = UNetStructure((1, 2, 4, 4), transformers=(0, 4, 4, 0), middle=4, size_and_crop=True)
LDM = _STRUCTURE.layout("sdxl-refiner")

FAMILY = Family(
    key="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    hub="stabilityai/stable-diffusion-xl-refiner-1.0",
    models=("UNet2DConditionModel",),
    task="image-to-image",
    tag="stable-diffusion-xl",
    denoisers=("unet",),
    layouts=(LDM,),
    blocks=_STRUCTURE.blocks,
    marks=(Mark(r"\.attn2\.to_[kv]$", (1280,)),),
    stated=r"stable-diffusion-xl-v1-refiner",
    kohya=Kohya((LDM,), {"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}),
    kernels=KERNELS,
    pointwise=POINTWISE,
    missing={
        "script": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its text encoder",
    },
)
