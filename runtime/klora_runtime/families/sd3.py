"""Stable Diffusion 3 and 3.5 in the names of their authors (Stability-AI/sd3.5), as kohya trains.

The way into diffusers' names is that of ``convert_sd3_transformer_checkpoint_to_diffusers`` in its
``loaders/single_file_utils.py``. Three facts that names do not show:

* The last block's text half has only ``attn.qkv`` and a modulation of two parts, shift and scale,
  which diffusers stores the other way round; the other blocks' modulations have six or nine parts
  and stay as they are.
* Only SD3.5 medium has ``x_block.attn2``, in its first thirteen blocks, and a modulation of nine.
* ``pos_embed`` is no module and is never trained.
"""

from __future__ import annotations

from klora_runtime.families.rows import (
    Layout,
    Row,
    renamed,
    swapped_halves,
    swapped_where_two,
    thirds,
)

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
