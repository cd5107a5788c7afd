"""FLUX.2 in the names of its authors (black-forest-labs/flux2).

The mapping to diffusers' names follows ``convert_flux2_transformer_checkpoint_to_diffusers`` in
its ``loaders/single_file_utils.py``. Unlike FLUX.1, the modulations belong to the model and not to
its blocks, and diffusers leaves the single blocks' ``linear1`` in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from klora_runtime.families.family import MUSUBI_TUNER, Family, Kohya, Mark, Script
from klora_runtime.families.rows import (
    Layout,
    Row,
    renamed,
    swapped_halves,
    thirds,
    with_ratios,
)

_DOUBLE, _SINGLE = "double_blocks.{}", "single_blocks.{}"
_JOINT, _ONE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}

_QKV = tuple(f"{_JOINT}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_ADDED_QKV = tuple(f"{_JOINT}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))

#: Ratios of the feed-forward layers, which distinguish FLUX.1 from FLUX.2.
_RATIOS: Mapping[str, Fraction | int] = {
    "_mlp.0": 6,
    "_mlp.2": Fraction(1, 3),
    "linear1": 9,
    "linear2": Fraction(1, 4),
}

_ROWS = (
    Row(f"{_DOUBLE}.img_attn.qkv", _QKV, thirds),
    Row(f"{_DOUBLE}.txt_attn.qkv", _ADDED_QKV, thirds),
    *renamed(
        _DOUBLE,
        _JOINT,
        {
            "img_attn.norm.key_norm": "attn.norm_k",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.proj": "attn.to_out.0",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.proj": "attn.to_add_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    *renamed(
        _SINGLE,
        _ONE,
        {
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out",
            "norm.key_norm": "attn.norm_k",
            "norm.query_norm": "attn.norm_q",
        },
    ),
    *renamed("time_in", "time_guidance_embed.timestep_embedder", _EMBEDDER),
    *renamed("guidance_in", "time_guidance_embed.guidance_embedder", _EMBEDDER),
    *(
        Row(f"{name}.lin", (f"{name}.linear",))
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    ),
    Row("img_in", ("x_embedder",)),
    Row("txt_in", ("context_embedder",)),
    Row("final_layer.linear", ("proj_out",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped_halves),
)

BFL = Layout(
    name="bfl",
    family="flux.2",
    component="transformer",
    rows=tuple(with_ratios(_ROWS, _RATIOS)),
)

FAMILY = Family(
    key="flux.2",
    title="FLUX.2",
    pipeline="Flux2Pipeline",
    hub="black-forest-labs/FLUX.2-dev",
    models=("Flux2Transformer2DModel",),
    tag="flux2",
    layouts=(BFL,),
    blocks={"transformer_blocks": 8, "single_transformer_blocks": 48},
    # Of klein with 4 and 9 billion weights.
    smaller=(
        {"transformer_blocks": 5, "single_transformer_blocks": 20},
        {"transformer_blocks": 8, "single_transformer_blocks": 24},
    ),
    # Widths of dev, and of klein with 4 and 9 billion weights; FLUX.1 shares the other names.
    marks=(
        Mark(r"\.attn\.add_[qkv]_proj$", (6144,)),
        Mark(r"\.attn\.to_qkv_mlp_proj$", (6144, 3072, 4096)),
    ),
    stated=r"flux-?2",
    script=Script("networks.lora_flux_2", MUSUBI_TUNER),
    kohya=Kohya((BFL,), {"modelspec.architecture": "Flux.2/lora"}),
    missing={"text_encoders": "none of the trainers whose files klora reads adapts its own"},
)
