"""Qwen-Image 2.1 in the names of its authors, which diffusers keeps, and in ComfyUI's.

ComfyUI's files join gate and value of a feed-forward layer, gate first. This, and the mapping to
diffusers' names, follow ``convert_qwen_image21_transformer_checkpoint_to_diffusers`` in its
``loaders/single_file_utils.py``. diffusers' LoRA loader accepts the same prefixes as for the first
Qwen-Image.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, Row, halves, same

_BLOCK = "transformer_blocks.{}"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
_GATED = ("gate_layer", "proj")
_REST = (
    *same(*_ATTENTION, under=f"{_BLOCK}.attn"),
    *same("img_mlp.out", under=_BLOCK),
    *same("linear_1", "linear_2", under="time_text_embed.timestep_embedder"),
    *same("in_layer", "out_layer", "text_norm", under="txt_in"),
    *same("img_in", "modulation.1", "norm_out.linear", "proj_out"),
)

DIFFUSERS = Layout(
    name="diffusers",
    family="qwen-image-2.1",
    component="transformer",
    rows=(*_REST, *same(*_GATED, under=f"{_BLOCK}.img_mlp")),
)

COMFY = Layout(
    name="comfy",
    family="qwen-image-2.1",
    component="transformer",
    rows=(
        *_REST,
        Row(f"{_BLOCK}.img_mlp.gate_up", tuple(f"{_BLOCK}.img_mlp.{n}" for n in _GATED), halves),
    ),
)

FAMILY = Family(
    key="qwen-image-2.1",
    title="Qwen-Image 2.1",
    pipeline="QwenImage21Pipeline",
    hub="Qwen/Qwen-Image-2.1",
    models=("QwenImage21Transformer2DModel",),
    layouts=(DIFFUSERS, COMFY),
    blocks={"transformer_blocks": 32},
    marks=(Mark(r"^transformer_blocks\.\d+\.img_mlp\.(gate_layer|proj)$", (4096,)),),
    stated=r"qwen-image-2-1",
    missing={
        "tag": "diffusers has no trainer for it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
