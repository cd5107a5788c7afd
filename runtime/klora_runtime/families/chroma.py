"""Chroma in the names of its author (lodestone-rock/flow), which are FLUX.1's where both have them.

Chroma is FLUX.1 without the modulations and the embedders of time, guidance and pooled text; a
``distilled_guidance_layer`` replaces them. A file that adapts only blocks fits both tables.
``img_mod``, ``txt_mod`` and ``modulation`` (FLUX.1 only), ``distilled_guidance_layer`` (Chroma
only), or the file's metadata tell them apart. The mapping to diffusers' names follows
``convert_chroma_transformer_checkpoint_to_diffusers`` in its ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

from klora_runtime.families import flux1
from klora_runtime.families.family import Family, Kohya, Mark, TextEncoder
from klora_runtime.families.rows import Layout, renamed, same
from klora_runtime.families.text_encoders import T5

_NOT_IN_CHROMA = (
    "double_blocks.{}.img_mod.",
    "double_blocks.{}.txt_mod.",
    "single_blocks.{}.modulation.",
    "time_in.",
    "vector_in.",
    "guidance_in.",
    "final_layer.adaLN_modulation.",
)
_APPROXIMATOR = "distilled_guidance_layer"

BFL = Layout(
    name="bfl",
    family="chroma",
    component="transformer",
    rows=(
        *(row for row in flux1.BFL.rows if not row.source.startswith(_NOT_IN_CHROMA)),
        *same(*(f"{_APPROXIMATOR}.{name}" for name in ("in_proj", "out_proj", "norms.{}"))),
        *renamed(
            f"{_APPROXIMATOR}.layers.{{}}",
            f"{_APPROXIMATOR}.layers.{{}}",
            {"in_layer": "linear_1", "out_layer": "linear_2"},
        ),
    ),
)

FAMILY = Family(
    key="chroma",
    title="Chroma",
    pipeline="ChromaPipeline",
    hub="lodestones/Chroma1-HD",
    models=("ChromaTransformer2DModel",),
    layouts=(BFL,),
    blocks={**flux1.FAMILY.blocks, f"{_APPROXIMATOR}.layers": 5},
    marks=(Mark(rf"^{_APPROXIMATOR}\.in_proj$", (64,)),),
    stated=r"chroma1?",
    script=flux1.FAMILY.script,
    kohya=Kohya(
        (BFL,), {"ss_base_model_version": "chroma", "modelspec.architecture": "chroma/lora"}
    ),
    text_encoders=(
        TextEncoder(
            "text_encoder",
            T5,
            kohya="lora_te1_",  # the only one that ComfyUI reads too; sd-scripts has FLUX.1's
            others=("lora_te_", "lora_te3_"),
            comfy="t5xxl",
        ),
    ),
    widths=flux1.FAMILY.widths,
    missing={"tag": "diffusers has no trainer for it"},
)
