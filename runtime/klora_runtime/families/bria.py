"""BRIA 3.2 in diffusers' names, built as FLUX.1 is.

The authors' model (briaai/BRIA-3.2) is diffusers' own, so that trainers write its names; none with
others is known.
"""

from __future__ import annotations

from klora_runtime.families import flux1
from klora_runtime.families.family import Family
from klora_runtime.families.rows import Layout, same

DIFFUSERS = Layout(
    name="diffusers",
    family="bria",
    component="transformer",
    rows=(
        *(
            row
            for row in flux1.BFL.in_diffusers_names().rows
            if not row.source.startswith("time_text_embed.")
        ),
        *same("linear_1", "linear_2", under="time_embed.timestep_embedder"),
    ),
)

FAMILY = Family(
    key="bria",
    title="BRIA 3.2",
    pipeline="BriaPipeline",
    hub="briaai/BRIA-3.2",
    models=("BriaTransformer2DModel",),
    layouts=(DIFFUSERS,),
    # Of the authors' `transformer/config.json`: 24 heads of 96.
    blocks={"transformer_blocks": 8, "single_transformer_blocks": 28},
    widths=dict.fromkeys(flux1.FAMILY.widths, (2304,)),
    missing={
        "marks": "its embedder of time is that of Mochi 1 too, and its blocks are those of FLUX.1",
        "tag": "diffusers has no trainer for it",
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
