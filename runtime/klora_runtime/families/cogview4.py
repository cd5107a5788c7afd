"""CogView4 in diffusers' names alone: no trainer is known to write others.

finetrainers (``models/cogview4``) trains diffusers' model with PEFT and writes its names after
``transformer.``, as its LoRA loader expects them.
"""

from __future__ import annotations

from klora_runtime.families.family import Family
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
    layouts=(DIFFUSERS,),
    blocks={"transformer_blocks": 28},
    missing={
        "marks": "Cosmos-Predict1 and GLM-Image have layers of these names and widths",
        "tag": "diffusers has no trainer for it",
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
