"""All layouts: the denoisers' in their authors' names and in diffusers', and the text encoders'."""

from __future__ import annotations

from klora_runtime.families import (
    anima,
    auraflow,
    chroma,
    flux1,
    flux2,
    hunyuan_video,
    krea2,
    ltx,
    lumina2,
    qwen_image,
    sd3,
    text_encoders,
    unet,
    wan,
    z_image,
)
from klora_runtime.families.rows import Layout

#: One table per family that names every module of its denoiser.
WHOLE: tuple[Layout, ...] = (
    unet.SD1,
    unet.SD2,
    unet.SDXL,
    unet.SDXL_REFINER,
    sd3.MMDIT,
    flux1.BFL,
    chroma.BFL,
    flux2.BFL,
    qwen_image.DIFFUSERS,
    z_image.COMFY,
    wan.ORIGINAL,
    hunyuan_video.ORIGINAL,
    ltx.ORIGINAL,
    lumina2.ORIGINAL,
    anima.COSMOS,
    anima.LLM_ADAPTER,
    krea2.ORIGINAL,
    auraflow.ORIGINAL,
)

#: Tables of some modules, or of modules that another table names too.
FURTHER: tuple[Layout, ...] = (flux1.XLABS, z_image.MIXED)

#: Files that hold modules of several components under one prefix: their tables as one.
TOGETHER: tuple[Layout, ...] = (anima.TOGETHER,)

TEXT_ENCODERS: tuple[Layout, ...] = (
    text_encoders.CLIP,
    text_encoders.CLIP_INSIDE,
    text_encoders.CLIP_2,
    text_encoders.CLIP_2_INSIDE,
    text_encoders.T5,
    text_encoders.T5_2,
    text_encoders.T5_3,
    text_encoders.QWEN3,
    text_encoders.QWEN3_INSIDE,
    text_encoders.GEMMA2,
    text_encoders.GEMMA2_INSIDE,
)

#: Files in diffusers' names, whose modules are those of the tables above.
IN_DIFFUSERS_NAMES: tuple[Layout, ...] = tuple(
    layout.in_diffusers_names() for layout in WHOLE if layout.name != "diffusers"
)

ALL: tuple[Layout, ...] = (*WHOLE, *FURTHER, *IN_DIFFUSERS_NAMES, *TEXT_ENCODERS)
