"""HunyuanImage 2.1 in the names of its authors (Tencent-Hunyuan/HunyuanImage-2.1) and in ComfyUI's.

sd-scripts (``library/hunyuan_image_models.py``) and diffusion-pipe
(``models/hunyuan_image_modeling.py``) write the authors', which are HunyuanVideo's except for
ByT5's embedder. ComfyUI builds the model from FLUX.1's blocks, like HunyuanVideo. The mapping to
diffusers' names follows its ``scripts/convert_hunyuan_image_to_diffusers.py``.
"""

from __future__ import annotations

from klora_runtime.families import flux1, hunyuan_video, hunyuan_video_15
from klora_runtime.families.family import SD_SCRIPTS, Family, Mark, Script
from klora_runtime.families.rows import Layout, renamed

_BLOCKS = ("double_blocks.{}", "single_blocks.{}", "txt_in.")
_EMBEDDERS = {
    "time_in": "timestep_embedder",
    "time_r_in": "timestep_embedder_r",
    "guidance_in": "guidance_embedder",
}

ORIGINAL = Layout(
    name="hunyuan",
    family="hunyuan-image",
    component="transformer",
    rows=(
        *(
            row
            for row in hunyuan_video.ORIGINAL.rows
            if row.source.startswith((*_BLOCKS, "img_in.", "final_layer."))
        ),
        *(
            row
            for source, target in _EMBEDDERS.items()
            for row in renamed(
                source,
                f"time_guidance_embed.{target}",
                {"mlp.0": "linear_1", "mlp.2": "linear_2"},
            )
        ),
        *hunyuan_video_15.BYT5,
    ),
)

COMFY = Layout(
    name="comfy",
    family="hunyuan-image",
    component="transformer",
    rows=tuple(row for row in hunyuan_video.COMFY.rows if row.source.startswith(_BLOCKS)),
    is_whole=False,
)

FAMILY = Family(
    key="hunyuan-image",
    title="HunyuanImage 2.1",
    pipeline="HunyuanImagePipeline",
    hub="hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
    models=("HunyuanImageTransformer2DModel",),
    layouts=(ORIGINAL, COMFY),
    blocks={
        "context_embedder.token_refiner.refiner_blocks": 2,
        "transformer_blocks": 20,
        "single_transformer_blocks": 40,
    },
    marks=(
        Mark(r"^(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj)$", (3584,)),
        Mark(r"^context_embedder\.token_refiner\.", (3584,)),
    ),
    named_after=flux1.FAMILY,
    stated=r"hunyuan-image(-2-1)?",
    script=Script("networks.lora_hunyuan_image", SD_SCRIPTS),
    missing={
        "tag": "diffusers has no trainer for it",
        "kohya": "no tool is known here to read them",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
