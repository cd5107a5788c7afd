"""FLUX.1 in the names of its authors (black-forest-labs/flux), and as XLabs' trainer writes it.

The mapping to diffusers' names follows ``scripts/convert_flux_to_diffusers.py`` there.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import chain

from klora_runtime.families.family import SD_SCRIPTS, Family, Kohya, Mark, Script, TextEncoder
from klora_runtime.families.rows import (
    Layout,
    Row,
    renamed,
    square_thirds_and_rest,
    swapped_halves,
    thirds,
    with_ratios,
)
from klora_runtime.families.text_encoders import CLIP, T5

_DOUBLE, _SINGLE = "double_blocks.{}", "single_blocks.{}"
_JOINT, _ONE = "transformer_blocks.{}", "single_transformer_blocks.{}"

_QKV = tuple(f"{_JOINT}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_ADDED_QKV = tuple(f"{_JOINT}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
_LINEAR1 = tuple(f"{_ONE}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))

#: Ratios of the feed-forward layers, which distinguish FLUX.1 from FLUX.2.
_RATIOS: Mapping[str, Fraction | int] = {
    "_mlp.0": 4,
    "_mlp.2": Fraction(1, 4),
    "linear1": 7,
    "linear2": Fraction(1, 5),
}

_ROWS = (
    Row(f"{_DOUBLE}.img_attn.qkv", _QKV, thirds),
    Row(f"{_DOUBLE}.txt_attn.qkv", _ADDED_QKV, thirds),
    *renamed(
        _DOUBLE,
        _JOINT,
        {
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
        },
    ),
    Row(f"{_SINGLE}.linear1", _LINEAR1, square_thirds_and_rest),
    *renamed(
        _SINGLE,
        _ONE,
        {
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
    ),
    *chain.from_iterable(
        renamed(
            embedder,
            f"time_text_embed.{target}",
            {"in_layer": "linear_1", "out_layer": "linear_2"},
        )
        for embedder, target in {
            "time_in": "timestep_embedder",
            "vector_in": "text_embedder",
            "guidance_in": "guidance_embedder",
        }.items()
    ),
    Row("img_in", ("x_embedder",)),
    Row("txt_in", ("context_embedder",)),
    Row("final_layer.linear", ("proj_out",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped_halves),
)

BFL = Layout(
    name="bfl",
    family="flux.1",
    component="transformer",
    rows=tuple(with_ratios(_ROWS, _RATIOS)),
)

XLABS = Layout(
    name="xlabs",
    family="flux.1",
    component="transformer",
    rows=(
        Row(f"{_DOUBLE}.processor.qkv_lora1", _QKV, thirds),
        Row(f"{_DOUBLE}.processor.qkv_lora2", _ADDED_QKV, thirds),
        Row(f"{_DOUBLE}.processor.proj_lora1", (f"{_JOINT}.attn.to_out.0",)),
        Row(f"{_DOUBLE}.processor.proj_lora2", (f"{_JOINT}.attn.to_add_out",)),
        Row(f"{_SINGLE}.processor.qkv_lora", _LINEAR1[:3], thirds),
        Row(f"{_SINGLE}.processor.proj_lora", (f"{_ONE}.proj_out",)),
    ),
    is_whole=False,
    spelling="xlabs",
)

#: SplitFlux (Yang et al., "SplitFlux: Learning to Decouple Content and Style from a Single Image",
#: CVPR 2026, arXiv 2511.15258) finds that the first 10 single-stream blocks mainly control content
#: and the other 28 style, and that the double-stream blocks hardly matter to either. It trains
#: LoRAs of some blocks only. Here each LoRA acts with 0.5 in the blocks of the other role; that
#: weight is klora's choice and was not judged.
_SPLIT = {
    "style *.single_transformer_blocks.[0-9].*": "0:0.5",
    "content *.single_transformer_blocks.[123][0-9].*": "0:0.5",
}

FAMILY = Family(
    key="flux.1",
    title="FLUX.1",
    pipeline="FluxPipeline",
    hub="black-forest-labs/FLUX.1-dev",
    models=("FluxTransformer2DModel",),
    tag="flux",
    layouts=(BFL, XLABS),
    blocks={"transformer_blocks": 19, "single_transformer_blocks": 38},
    widths={r"^(single_)?transformer_blocks\.\d+\.attn\.(to|add)_[qkv]": (3072,)},
    # Other models have blocks of the same names and widths.
    marks=(Mark(r"^time_text_embed\.text_embedder\.linear_1$", (768,)),),
    stated=r"flux(-?1)?",
    script=Script("networks.lora_flux", SD_SCRIPTS),
    kohya=Kohya(
        (BFL,),
        {"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"},
    ),
    text_encoders=(
        TextEncoder("text_encoder", CLIP, kohya="lora_te1_", comfy="clip_l"),
        TextEncoder("text_encoder_2", T5, kohya="lora_te3_", others=("lora_te2_",), comfy="t5xxl"),
    ),
    block_weights={"flux-blocks": _SPLIT},
)
