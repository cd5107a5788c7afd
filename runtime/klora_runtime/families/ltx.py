"""LTX-Video in the names of its authors (Lightricks/LTX-Video).

The mapping to diffusers' names follows ``convert_ltx_transformer_checkpoint_to_diffusers`` in its
``loaders/single_file_utils.py``: the blocks are called the same but for two norms.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Kohya, Mark
from klora_runtime.families.rows import Layout, Row, parameters, renamed, same

_BLOCK = "transformer_blocks.{}"

ORIGINAL = Layout(
    name="ltx",
    family="ltx",
    component="transformer",
    rows=(
        *same(
            *(
                f"{_BLOCK}.attn{i}.{name}"
                for i in (1, 2)
                for name in ("to_q", "to_k", "to_v", "to_out.0")
            ),
            f"{_BLOCK}.ff.net.0.proj",
            f"{_BLOCK}.ff.net.2",
            "caption_projection.linear_1",
            "caption_projection.linear_2",
            "proj_out",
        ),
        *(
            Row(f"{_BLOCK}.attn{i}.{side}_norm", (f"{_BLOCK}.attn{i}.norm_{side}",))
            for i in (1, 2)
            for side in "qk"
        ),
        *renamed(
            "adaln_single",
            "time_embed",
            {
                "emb.timestep_embedder.linear_1": "emb.timestep_embedder.linear_1",
                "emb.timestep_embedder.linear_2": "emb.timestep_embedder.linear_2",
                "linear": "linear",
            },
        ),
        Row("patchify_proj", ("proj_in",)),
        *parameters(f"{_BLOCK}.scale_shift_table", "scale_shift_table"),
    ),
)

FAMILY = Family(
    key="ltx",
    title="LTX-Video 2B",
    pipeline="LTXPipeline",
    hub="Lightricks/LTX-Video",
    models=("LTXVideoTransformer3DModel",),
    task="text-to-video",
    layouts=(ORIGINAL,),
    blocks={"transformer_blocks": 28},
    widths={r"^transformer_blocks\.\d+\.attn1\.to_[qkv]$": (2048,)},
    # Cosmos-Predict2 2B has a first attention of the same names and widths.
    marks=(Mark(r"^transformer_blocks\.\d+\.attn2\.to_[kv]$", (2048,)),),
    kohya=Kohya((ORIGINAL,)),
    missing={
        "tag": "diffusers has no trainer for it",
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
