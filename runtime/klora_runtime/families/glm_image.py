"""GLM-Image in diffusers' names alone: its pipeline loads no LoRAs, and no trainer has other names.

Its blocks are CogView4's, of the same authors (zai-org).
"""

from __future__ import annotations

from klora_runtime.families import cogview4
from klora_runtime.families.family import Family
from klora_runtime.families.rows import Layout, same

_OTHERS = ("patch_embed.",)

DIFFUSERS = Layout(
    name="diffusers",
    family="glm-image",
    component="transformer",
    rows=(
        *(row for row in cogview4.DIFFUSERS.rows if not row.source.startswith(_OTHERS)),
        *same("image_projector.proj", "prior_token_embedding"),
        *same("net.0.proj", "net.2", under="glyph_projector"),
        *same("net.0.proj", "net.2", under="prior_projector"),
    ),
)

FAMILY = Family(
    key="glm-image",
    title="GLM-Image",
    pipeline="GlmImagePipeline",
    hub="zai-org/GLM-Image",
    models=("GlmImageTransformer2DModel",),
    layouts=(DIFFUSERS,),
    blocks={"transformer_blocks": 30},
    marks=cogview4.FAMILY.marks,
    missing={
        "tag": "diffusers has no trainer for it",
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
