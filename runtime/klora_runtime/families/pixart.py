"""PixArt-alpha and PixArt-Sigma in diffusers' names, which all trainers of LoRAs keep.

OneTrainer (``modules/modelSaver/pixartAlpha``) writes them with underscores after
``lora_transformer_``, SimpleTuner after ``lycoris_`` or ``transformer.``. The authors' own trainer
(PixArt-alpha/PixArt-sigma, ``train_scripts/train_pixart_lora_hf.py``) also wraps diffusers' model.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark, TextEncoder
from klora_runtime.families.rows import Layout, parameters, same
from klora_runtime.families.text_encoders import T5

_BLOCK = "transformer_blocks.{}"
_EMBEDDERS = ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder")

DIFFUSERS = Layout(
    name="diffusers",
    family="pixart",
    component="transformer",
    rows=(
        *(
            row
            for attention in ("attn1", "attn2")
            for row in same("to_q", "to_k", "to_v", "to_out.0", under=f"{_BLOCK}.{attention}")
        ),
        *same("ff.net.0.proj", "ff.net.2", under=_BLOCK),
        *(
            row
            for embedder in _EMBEDDERS
            for row in same("linear_1", "linear_2", under=f"adaln_single.emb.{embedder}")
        ),
        *same("linear_1", "linear_2", under="caption_projection"),
        *same("adaln_single.linear", "pos_embed.proj", "proj_out"),
        *parameters(f"{_BLOCK}.scale_shift_table", "scale_shift_table"),
    ),
)

FAMILY = Family(
    key="pixart",
    title="PixArt",
    pipeline="PixArtSigmaPipeline",
    hub="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    models=("PixArtTransformer2DModel",),
    layouts=(DIFFUSERS,),
    blocks={"transformer_blocks": 28},
    # Attention of DiT, Latte and Sana of 0.6 billion weights is as wide.
    marks=(Mark(r"^transformer_blocks\.\d+\.attn[12]\.to_[qkv]$", (1152,)),),
    stated=r"pixart(-alpha|-sigma)?",
    text_encoders=(TextEncoder("text_encoder", T5, others=("lora_te_", "lora_te1_")),),
    missing={
        "tag": "diffusers has no trainer for it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
    },
)
