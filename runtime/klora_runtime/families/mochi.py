"""Mochi 1 in the names of its authors (genmoai/mochi), whose own trainer writes them.

The authors build it in ``src/genmo/mochi_preview/dit/joint_model/asymm_models_joint.py``.
finetrainers trains diffusers' model. The mapping to its names follows
``convert_mochi_transformer_checkpoint_to_diffusers`` in its ``loaders/single_file_utils.py``: gate
and value of the feed-forward layers swap places, and the last block's text half has a modulation of
one part.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, Row, renamed, swapped_halves, thirds

_BLOCK, _TARGET = "blocks.{}", "transformer_blocks.{}"
_LAST = 47

ORIGINAL = Layout(
    name="genmo",
    family="mochi-1",
    component="transformer",
    rows=(
        Row(f"{_BLOCK}.attn.qkv_x", tuple(f"{_TARGET}.attn1.to_{n}" for n in "qkv"), thirds),
        Row(f"{_BLOCK}.attn.qkv_y", tuple(f"{_TARGET}.attn1.add_{n}_proj" for n in "qkv"), thirds),
        Row(f"{_BLOCK}.mlp_x.w1", (f"{_TARGET}.ff.net.0.proj",), swapped_halves),
        Row(f"{_BLOCK}.mlp_y.w1", (f"{_TARGET}.ff_context.net.0.proj",), swapped_halves),
        Row(f"blocks.{_LAST}.mod_y", (f"transformer_blocks.{_LAST}.norm1_context.linear_1",)),
        *renamed(
            _BLOCK,
            _TARGET,
            {
                "attn.k_norm_x": "attn1.norm_k",
                "attn.k_norm_y": "attn1.norm_added_k",
                "attn.proj_x": "attn1.to_out.0",
                "attn.proj_y": "attn1.to_add_out",
                "attn.q_norm_x": "attn1.norm_q",
                "attn.q_norm_y": "attn1.norm_added_q",
                "mlp_x.w2": "ff.net.2",
                "mlp_y.w2": "ff_context.net.2",
                "mod_x": "norm1.linear",
                "mod_y": "norm1_context.linear",
            },
        ),
        *renamed(
            "t5_y_embedder",
            "time_embed.pooler",
            {"to_kv": "to_kv", "to_out": "to_out", "to_q": "to_q"},
        ),
        *renamed(
            "t_embedder.mlp",
            "time_embed.timestep_embedder",
            {"0": "linear_1", "2": "linear_2"},
        ),
        Row("t5_yproj", ("time_embed.caption_proj",)),
        Row("x_embedder.proj", ("patch_embed.proj",)),
        Row("final_layer.linear", ("proj_out",)),
        Row("final_layer.mod", ("norm_out.linear",), swapped_halves),
    ),
)

FAMILY = Family(
    key="mochi-1",
    title="Mochi 1",
    pipeline="MochiPipeline",
    hub="genmo/mochi-1-preview",
    models=("MochiTransformer3DModel",),
    task="text-to-video",
    layouts=(ORIGINAL,),
    blocks={"transformer_blocks": _LAST + 1},
    marks=(Mark(r"^transformer_blocks\.\d+\.attn1\.add_[qkv]_proj$", (1536,)),),
    missing={
        "tag": "diffusers has no trainer for it",
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
