"""Z-Image in the names of its authors' single files, and of trainers that mix both namings.

musubi-tuner and ai-toolkit train in diffusers' names. ComfyUI's names have a joined query, key and
value, and ``attention.out``; musubi-tuner's ``networks/convert_z_image_lora_to_comfy.py`` writes
them. ``mixed`` has ``attention.out`` next to separate ``to_q``, ``to_k``, ``to_v``, which
diffusers' ``_convert_non_diffusers_z_image_lora_to_diffusers`` also reads. The mapping to
diffusers' names follows ``convert_z_image_transformer_checkpoint_to_diffusers`` in its
``loaders/single_file_utils.py``; the released model has one patch size, hence ``2-1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from klora_runtime.families.family import MUSUBI_TUNER, Family, Kohya, Mark, Script
from klora_runtime.families.rows import Layout, Row, renamed, same, thirds, with_ratios

_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
_QKV = ("to_q", "to_k", "to_v")
_SAME = (
    *(f"feed_forward.w{i}" for i in (1, 2, 3)),
    *(f"{part}_norm{i}" for part in ("attention", "ffn") for i in (1, 2)),
)
#: Ratios that distinguish Z-Image from Lumina 2, which has three query heads for each key head.
_RATIOS: Mapping[str, Fraction | int] = {
    "attention.qkv": 3,
    "feed_forward.w1": Fraction(8, 3),
    "feed_forward.w2": Fraction(3, 8),
    "feed_forward.w3": Fraction(8, 3),
}
_ATTENTION = {
    "attention.k_norm": "attention.norm_k",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
}


def _rest() -> Iterator[Row]:
    for block in _BLOCKS:
        yield from renamed(block, block, _ATTENTION)
        yield from same(*(f"{block}.{name}" for name in _SAME))
    yield from same("layers.{}.adaLN_modulation.0", "noise_refiner.{}.adaLN_modulation.0")
    yield from same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")
    yield Row("x_embedder", ("all_x_embedder.2-1",))
    yield Row("final_layer.linear", ("all_final_layer.2-1.linear",))
    yield Row("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",))


def _layout(name: str, attention: Iterator[Row], *, is_whole: bool) -> Layout:
    rows = tuple(with_ratios((*attention, *_rest()), _RATIOS))
    return Layout(name, "z-image", "transformer", rows, is_whole)


COMFY = _layout(
    "comfy",
    (
        Row(f"{block}.attention.qkv", tuple(f"{block}.attention.{n}" for n in _QKV), thirds)
        for block in _BLOCKS
    ),
    is_whole=True,
)
MIXED = _layout(
    "mixed",
    same(*(f"{block}.attention.{n}" for block in _BLOCKS for n in _QKV)),
    is_whole=False,
)

FAMILY = Family(
    key="z-image",
    title="Z-Image",
    pipeline="ZImagePipeline",
    hub="Tongyi-MAI/Z-Image-Turbo",
    models=("ZImageTransformer2DModel",),
    tag="z-image",
    layouts=(COMFY, MIXED),
    blocks={"noise_refiner": 2, "context_refiner": 2, "layers": 30},
    marks=(Mark(r"^layers\.\d+\.attention\.to_[qkv]$", (3840,)),),
    stated=r"z-?image",
    script=Script("networks.lora_zimage", MUSUBI_TUNER),
    kohya=Kohya(
        (COMFY,), {"ss_base_model_version": "z_image", "modelspec.architecture": "Z-Image/lora"}
    ),
    missing={"text_encoders": "none of the trainers whose files klora reads adapts its own"},
)
