"""Ideogram 4 in the names of its authors' checkpoint, which trainers keep.

musubi-tuner (``ideogram4/ideogram4_model.py``, the blocks without modulations) writes them with
underscores after ``lora_unet_``, ai-toolkit (``extensions_built_in/diffusion_models/ideogram4``)
after ``diffusion_model.``. The mapping to diffusers' names follows
``_convert_non_diffusers_ideogram4_lora_to_diffusers`` in its ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

from klora_runtime.families.family import MUSUBI_TUNER, Family, Mark, Script
from klora_runtime.families.rows import Layout, Row, same, thirds

_LAYER = "layers.{}"

ORIGINAL = Layout(
    name="ideogram",
    family="ideogram-4",
    component="transformer",
    rows=(
        Row(f"{_LAYER}.attention.qkv", tuple(f"{_LAYER}.attention.to_{n}" for n in "qkv"), thirds),
        Row(f"{_LAYER}.attention.o", (f"{_LAYER}.attention.to_out.0",)),
        *same(
            *("attention.norm_q", "attention.norm_k"),
            *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
            *("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
            "adaln_modulation",
            under=_LAYER,
        ),
        *same("mlp_in", "mlp_out", under="t_embedding"),
        *same("linear", "adaln_modulation", under="final_layer"),
        *same(
            "adaln_proj", "embed_image_indicator", "input_proj", "llm_cond_norm", "llm_cond_proj"
        ),
    ),
)

FAMILY = Family(
    key="ideogram-4",
    title="Ideogram 4",
    pipeline="Ideogram4Pipeline",
    hub="ideogram-ai/ideogram-v4",
    models=("Ideogram4Transformer2DModel",),
    tag="ideogram4",
    layouts=(ORIGINAL,),
    blocks={"layers": 34},
    marks=(Mark(r"^layers\.\d+\.(attention\.to_[qkv]|feed_forward\.w[13])$", (4608,)),),
    stated=r"ideogram(-?4)?",
    script=Script("networks.lora_ideogram4", MUSUBI_TUNER),
    missing={
        "kohya": "no tool is known here to read them",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
