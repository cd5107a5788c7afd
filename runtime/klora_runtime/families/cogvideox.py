"""CogVideoX in diffusers' names, which its trainers of LoRAs keep.

diffusers' own trainers (``examples/cogvideo``), finetrainers and the authors' (zai-org/CogVideo,
``finetune``) train diffusers' model with PEFT and write its names after ``transformer.``. klora
does not read LoRAs of the authors' older trainer on SAT, which have other names. ConsisID is the
model of 5 billion weights with more layers, for a face.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, same

DIFFUSERS = Layout(
    name="diffusers",
    family="cogvideox",
    component="transformer",
    rows=(
        *same(
            *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
            *(f"{norm}.{name}" for norm in ("norm1", "norm2") for name in ("linear", "norm")),
            *("attn1.norm_q", "attn1.norm_k", "ff.net.0.proj", "ff.net.2"),
            under="transformer_blocks.{}",
        ),
        *same("proj", "text_proj", under="patch_embed"),
        *same("linear_1", "linear_2", under="time_embedding"),
        *same("linear_1", "linear_2", under="ofs_embedding"),
        *same("norm_final", "norm_out.linear", "norm_out.norm", "proj_out"),
    ),
)

FAMILY = Family(
    key="cogvideox",
    title="CogVideoX",
    pipeline="CogVideoXPipeline",
    hub="THUDM/CogVideoX-5b",
    models=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    task="text-to-video",
    tag="cogvideox",
    layouts=(DIFFUSERS,),
    # The models of 5 and 2 billion weights.
    blocks={"transformer_blocks": 42},
    smaller=({"transformer_blocks": 30},),
    widths={r"^transformer_blocks\.\d+\.attn1\.to_[qkv]$": (3072, 1920)},
    # The model of 2 billion weights, then all models.
    marks=(
        Mark(r"^transformer_blocks\.\d+\.attn1\.to_[qkv]$", (1920,)),
        Mark(r"^transformer_blocks\.\d+\.norm[12]\.linear$", (512,)),
    ),
    missing={
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
