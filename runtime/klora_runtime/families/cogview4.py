"""CogView4 in diffusers' names alone: no trainer is known to write others.

finetrainers (``models/cogview4``) trains diffusers' model with PEFT and writes its names after
``transformer.``, as its LoRA loader expects them.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, same

DIFFUSERS = Layout(
    name="diffusers",
    family="cogview-4",
    component="transformer",
    rows=(
        *same(
            "norm1.linear",
            "attn1.to_q",
            "attn1.to_k",
            "attn1.to_v",
            "attn1.to_out.0",
            "ff.net.0.proj",
            "ff.net.2",
            under="transformer_blocks.{}",
        ),
        *same("proj", "text_proj", under="patch_embed"),
        *same("linear_1", "linear_2", under="time_condition_embed.timestep_embedder"),
        *same("linear_1", "linear_2", under="time_condition_embed.condition_embedder"),
        *same("norm_out.linear", "proj_out"),
    ),
)

FAMILY = Family(
    key="cogview-4",
    title="CogView4",
    pipeline="CogView4Pipeline",
    hub="THUDM/CogView4-6B",
    models=("CogView4Transformer2DModel",),
    layouts=(DIFFUSERS,),
    blocks={"transformer_blocks": 28},
    # The width of the time's embedding; attention as wide as its own other models have too.
    marks=(Mark(r"^transformer_blocks\.\d+\.norm1\.linear$", (512,)),),
    missing={
        "tag": "diffusers has no trainer for it",
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
