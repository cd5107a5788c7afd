"""Sana-Video in diffusers' names: its layers are Sana's with norms of queries and keys.

No trainer of LoRAs with names of its own is known; diffusers' loader of Sana's loads its files too.
The way of a checkpoint into these names is that of diffusers'
``scripts/convert_sana_video_to_diffusers.py``.
"""

from __future__ import annotations

from klora_runtime.families import sana
from klora_runtime.families.family import Family
from klora_runtime.families.rows import Layout, parameters, same

_BLOCK = "transformer_blocks.{}"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")

DIFFUSERS = Layout(
    name="diffusers",
    family="sana-video",
    component="transformer",
    rows=(
        *same(*_ATTENTION, under=f"{_BLOCK}.attn1"),
        *same(*_ATTENTION, under=f"{_BLOCK}.attn2"),
        *same("conv_inverted", "conv_depth", "conv_point", "conv_temp", under=f"{_BLOCK}.ff"),
        *same("linear_1", "linear_2", under="time_embed.emb.timestep_embedder"),
        *same("linear_1", "linear_2", under="caption_projection"),
        *same("time_embed.linear", "caption_norm", "patch_embedding", "proj_out"),
        *parameters(f"{_BLOCK}.scale_shift_table", "scale_shift_table"),
    ),
)

FAMILY = Family(
    key="sana-video",
    title="Sana-Video",
    pipeline="SanaVideoPipeline",
    hub="Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
    models=("SanaVideoTransformer3DModel",),
    task="text-to-video",
    layouts=(DIFFUSERS,),
    blocks={"transformer_blocks": 20},
    marks=sana.FAMILY.marks,
    missing={
        "tag": "diffusers has no trainer for it",
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
