"""Lumina-Image 2.0 in the names of its authors (Alpha-VLLM/Lumina-Image-2.0), as kohya trains it.

sd-scripts builds them in ``library/lumina_models.py``. The mapping to diffusers' names follows
``convert_lumina2_to_diffusers`` in its ``loaders/single_file_utils.py``. The query is as wide as
the model and has three heads for each head of key and value. Z-Image's single files have nearly the
same names with three equal parts; the widths tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from klora_runtime.families.family import SD_SCRIPTS, Family, Kohya, Mark, Script, TextEncoder
from klora_runtime.families.rows import (
    Layout,
    Row,
    renamed,
    same,
    square_and_halves,
    with_ratios,
)
from klora_runtime.families.text_encoders import GEMMA2

_MODULATED = ("layers.{}", "noise_refiner.{}")
_PLAIN = "context_refiner.{}"
_NAMES = {
    "attention.k_norm": "attn.norm_k",
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention_norm2": "norm2",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
#: Ratios that distinguish Lumina 2 from Z-Image.
_RATIOS: Mapping[str, Fraction | int] = {
    "attention.qkv": Fraction(5, 3),
    "feed_forward.w1": 4,
    "feed_forward.w2": Fraction(1, 4),
    "feed_forward.w3": 4,
}
_MODULATION = {"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"}


def _block(block: str, norm: dict[str, str]) -> Iterator[Row]:
    qkv = tuple(f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
    yield Row(f"{block}.attention.qkv", qkv, square_and_halves)
    yield from renamed(block, block, _NAMES | norm)


def _rows() -> Iterator[Row]:
    for block in _MODULATED:
        yield from _block(block, _MODULATION)
    yield from _block(_PLAIN, {"attention_norm1": "norm1"})
    yield from renamed(
        "t_embedder.mlp",
        "time_caption_embed.timestep_embedder",
        {"0": "linear_1", "2": "linear_2"},
    )
    yield from renamed("cap_embedder", "time_caption_embed.caption_embedder", {"0": "0", "1": "1"})
    yield from renamed(
        "final_layer", "norm_out", {"adaLN_modulation.1": "linear_1", "linear": "linear_2"}
    )
    yield from same("x_embedder")


ORIGINAL = Layout(
    name="lumina",
    family="lumina2",
    component="transformer",
    rows=tuple(with_ratios(_rows(), _RATIOS)),
)

FAMILY = Family(
    key="lumina2",
    title="Lumina 2",
    pipeline="Lumina2Pipeline",
    hub="Alpha-VLLM/Lumina-Image-2.0",
    models=("Lumina2Transformer2DModel",),
    tag="lumina2",
    layouts=(ORIGINAL,),
    blocks={"context_refiner": 2, "noise_refiner": 2, "layers": 26},
    marks=(Mark(r"^layers\.\d+\.attn\.to_[qkv]$", (2304,)),),
    stated=r"lumina(-?2)?",
    script=Script("networks.lora_lumina", SD_SCRIPTS),
    kohya=Kohya(
        (ORIGINAL,),
        {"ss_base_model_version": "lumina2", "modelspec.architecture": "lumina-2/lora"},
    ),
    text_encoders=(TextEncoder("text_encoder", GEMMA2, kohya="lora_te_", comfy="gemma2_2b"),),
)
