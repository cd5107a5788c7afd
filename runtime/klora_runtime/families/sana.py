"""Sana in the names of its authors (NVlabs/Sana); trainers of LoRAs write diffusers'.

The authors build it in ``diffusion/model/nets/sana_multi_scale.py``. OneTrainer, SimpleTuner and
diffusers' own trainer train diffusers' model. The mapping to its names follows
``convert_sana_transformer_to_diffusers`` in its ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark, TextEncoder
from klora_runtime.families.rows import Layout, Row, halves, renamed, thirds
from klora_runtime.families.text_encoders import GEMMA2

_BLOCK, _TARGET = "blocks.{}", "transformer_blocks.{}"

ORIGINAL = Layout(
    name="nvlabs",
    family="sana",
    component="transformer",
    rows=(
        Row(f"{_BLOCK}.attn.qkv", tuple(f"{_TARGET}.attn1.to_{n}" for n in "qkv"), thirds),
        Row(
            f"{_BLOCK}.cross_attn.kv_linear",
            (f"{_TARGET}.attn2.to_k", f"{_TARGET}.attn2.to_v"),
            halves,
        ),
        *renamed(
            _BLOCK,
            _TARGET,
            {
                "attn.proj": "attn1.to_out.0",
                "cross_attn.proj": "attn2.to_out.0",
                "cross_attn.q_linear": "attn2.to_q",
                "mlp.depth_conv.conv": "ff.conv_depth",
                "mlp.inverted_conv.conv": "ff.conv_inverted",
                "mlp.point_conv.conv": "ff.conv_point",
            },
        ),
        *renamed(
            "t_embedder.mlp",
            "time_embed.emb.timestep_embedder",
            {"0": "linear_1", "2": "linear_2"},
        ),
        *renamed("y_embedder.y_proj", "caption_projection", {"fc1": "linear_1", "fc2": "linear_2"}),
        Row("attention_y_norm", ("caption_norm",)),
        Row("final_layer.linear", ("proj_out",)),
        Row("t_block.1", ("time_embed.linear",)),
        Row("x_embedder.proj", ("patch_embed.proj",)),
        Row(f"{_BLOCK}.scale_shift_table", (f"{_TARGET}.scale_shift_table",), is_parameter=True),
        Row("final_layer.scale_shift_table", ("scale_shift_table",), is_parameter=True),
    ),
)

FAMILY = Family(
    key="sana",
    title="Sana",
    pipeline="SanaPipeline",
    hub="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    models=("SanaTransformer2DModel",),
    tag="sana",
    layouts=(ORIGINAL,),
    # The model of 4.8 billion weights.
    # Of 4.8 billion weights; then of 1.6 and 0.6.
    blocks={"transformer_blocks": 60},
    smaller=({"transformer_blocks": 20}, {"transformer_blocks": 28}),
    # The models of 0.6, 1.6 and 4.8 billion weights.
    marks=(
        Mark(r"^transformer_blocks\.\d+\.(attn[12]\.to_[qkv]|ff\.conv_inverted)$", (1152, 2240)),
    ),
    stated=r"sana",
    text_encoders=(TextEncoder("text_encoder", GEMMA2, others=("lora_te_",)),),
    missing={
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
    },
)
