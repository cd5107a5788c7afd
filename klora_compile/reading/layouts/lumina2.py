"""Lumina-Image 2.0 in the names of its authors (Alpha-VLLM/Lumina-Image-2.0), as kohya trains it.

sd-scripts builds them in ``library/lumina_models.py``. The way into diffusers' names is that of
``convert_lumina2_to_diffusers`` in its ``loaders/single_file_utils.py``. A query is as wide as the
model and has three heads for each of key and value. Z-Image's single files have nearly the same
names with three equal parts, and ``x_embedder`` and ``layers.N.feed_forward.w1`` in both: there
widths tell (2304 here, 3840 there).
"""

from __future__ import annotations

from collections.abc import Iterator

from klora_compile.reading.layouts.rows import Layout, Row, renamed, same, square_and_halves

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
_MODULATION = {"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"}


def _block(block: str, norm: dict[str, str]) -> Iterator[Row]:
    qkv = tuple(f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
    yield Row(f"{block}.attention.qkv", qkv, square_and_halves)
    yield from renamed(block, block, _NAMES | norm)


ORIGINAL = Layout(
    name="lumina",
    family="lumina2",
    component="transformer",
    rows=(
        *(row for block in _MODULATED for row in _block(block, _MODULATION)),
        *_block(_PLAIN, {"attention_norm1": "norm1"}),
        *renamed(
            "t_embedder.mlp",
            "time_caption_embed.timestep_embedder",
            {"0": "linear_1", "2": "linear_2"},
        ),
        *renamed(
            "cap_embedder",
            "time_caption_embed.caption_embedder",
            {"0": "0", "1": "1"},
        ),
        *renamed(
            "final_layer",
            "norm_out",
            {"adaLN_modulation.1": "linear_1", "linear": "linear_2"},
        ),
        *same("x_embedder"),
    ),
)
