"""Stable Diffusion 3 and 3.5 in the names of their authors (Stability-AI/sd3.5), as kohya trains.

The mapping to diffusers' names follows ``convert_sd3_transformer_checkpoint_to_diffusers`` in its
``loaders/single_file_utils.py``. Three facts that names do not show:

* The last block's text half has only ``attn.qkv`` and a modulation of two parts, shift and scale,
  which diffusers stores in the opposite order; the modulations of other blocks have six or nine
  parts and keep their order.
* Only SD3.5 medium has ``x_block.attn2``, in its first thirteen blocks, and a modulation of nine.
* ``pos_embed`` is not a module and is never trained.
"""

from __future__ import annotations

from klora_runtime.families.family import SD_SCRIPTS, Family, Kohya, Mark, Script, TextEncoder
from klora_runtime.families.rows import (
    Layout,
    Row,
    renamed,
    swapped_halves,
    swapped_where_two,
    thirds,
)
from klora_runtime.families.text_encoders import CLIP, T5

_IMAGE, _TEXT = "joint_blocks.{}.x_block", "joint_blocks.{}.context_block"
_JOINT = "transformer_blocks.{}"


def _qkv(attention: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{_JOINT}.{attention}.{name}" for name in names)


MMDIT = Layout(
    name="mmdit",
    family="sd3",
    component="transformer",
    rows=(
        Row(f"{_IMAGE}.attn.qkv", _qkv("attn", "to_q", "to_k", "to_v"), thirds),
        Row(f"{_IMAGE}.attn2.qkv", _qkv("attn2", "to_q", "to_k", "to_v"), thirds),
        Row(f"{_TEXT}.attn.qkv", _qkv("attn", "add_q_proj", "add_k_proj", "add_v_proj"), thirds),
        Row(f"{_TEXT}.adaLN_modulation.1", (f"{_JOINT}.norm1_context.linear",), swapped_where_two),
        *renamed(
            _IMAGE,
            _JOINT,
            {
                "adaLN_modulation.1": "norm1.linear",
                "attn.ln_k": "attn.norm_k",
                "attn.ln_q": "attn.norm_q",
                "attn.proj": "attn.to_out.0",
                "attn2.ln_k": "attn2.norm_k",
                "attn2.ln_q": "attn2.norm_q",
                "attn2.proj": "attn2.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
            },
        ),
        *renamed(
            _TEXT,
            _JOINT,
            {
                "attn.ln_k": "attn.norm_added_k",
                "attn.ln_q": "attn.norm_added_q",
                "attn.proj": "attn.to_add_out",
                "mlp.fc1": "ff_context.net.0.proj",
                "mlp.fc2": "ff_context.net.2",
            },
        ),
        *renamed(
            "t_embedder.mlp",
            "time_text_embed.timestep_embedder",
            {"0": "linear_1", "2": "linear_2"},
        ),
        *renamed(
            "y_embedder.mlp",
            "time_text_embed.text_embedder",
            {"0": "linear_1", "2": "linear_2"},
        ),
        Row("context_embedder", ("context_embedder",)),
        Row("x_embedder.proj", ("pos_embed.proj",)),
        Row("final_layer.linear", ("proj_out",)),
        Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped_halves),
    ),
)

FAMILY = Family(
    key="sd3",
    title="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    hub="stabilityai/stable-diffusion-3.5-large",
    models=("SD3Transformer2DModel",),
    tag="sd3",
    layouts=(MMDIT,),
    blocks={"transformer_blocks": 38},
    smaller=({"transformer_blocks": 24},),
    # Widths of the released SD3 and SD3.5 medium, and of SD3.5 large.
    marks=(Mark(r"^transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj)$", (1536, 2432)),),
    stated=r"stable-diffusion-v?3|sd-3",
    script=Script("networks.lora_sd3", SD_SCRIPTS),
    # Its trainer's architecture string contains the model's size, which is unknown here.
    kohya=Kohya((MMDIT,)),
    text_encoders=(
        TextEncoder("text_encoder", CLIP, kohya="lora_te1_", comfy="clip_l"),
        TextEncoder("text_encoder_2", CLIP, kohya="lora_te2_", comfy="clip_g"),
        TextEncoder("text_encoder_3", T5, kohya="lora_te3_", comfy="t5xxl"),
    ),
)
