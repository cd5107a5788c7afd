"""Wan VACE: Wan with additional blocks for control videos, in the names of its authors.

The authors' ``wan/modules/vace_model.py`` (Wan-Video/Wan2.1) adds ``vace_blocks`` to Wan's model.
Trainers (VideoX-Fun, DiffSynth-Studio) adapt both. The mapping to diffusers' names follows
``convert_wan_transformer_to_diffusers`` in its ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

from dataclasses import replace

from klora_runtime.families import wan
from klora_runtime.families.family import Mark
from klora_runtime.families.rows import Layout, renamed, same

_BLOCK, _VACE = "blocks.{}", "vace_blocks.{}"
#: Names of Wan's image-to-video modules, which VACE lacks.
_OF_IMAGES = ("_img", "img_emb")

_PLAIN = tuple(row for row in wan.ORIGINAL.rows if not any(n in row.source for n in _OF_IMAGES))

ORIGINAL = Layout(
    name="vace",
    family="wan-vace",
    component="transformer",
    rows=(
        *_PLAIN,
        *(
            replace(
                row,
                source=f"vace_{row.source}",
                targets=tuple(f"vace_{target}" for target in row.targets),
            )
            for row in _PLAIN
            if row.source.startswith(_BLOCK)
        ),
        *renamed(_VACE, _VACE, {"before_proj": "proj_in", "after_proj": "proj_out"}),
        *same("vace_patch_embedding"),
    ),
)

FAMILY = replace(
    wan.FAMILY,
    key="wan-vace",
    title="Wan VACE",
    pipeline="WanVACEPipeline",
    hub="Wan-AI/Wan2.1-VACE-1.3B-diffusers",
    models=("WanVACETransformer3DModel",),
    layouts=(ORIGINAL,),
    blocks={**wan.FAMILY.blocks, "vace_blocks": 8},
    smaller=({"blocks": 30, "vace_blocks": 15},),
    widths={r"^blocks\.\d+\.attn[12]\.to_[qkv]$": (1536, 5120)},
    marks=(Mark(r"^vace_blocks\.\d+\.attn[12]\.to_[qkv]$", (1536, 5120)),),
    stated=None,
    script=None,
    kohya=None,
    shares_marks_of=(wan.FAMILY,),
    missing={
        **wan.FAMILY.missing,
        "stated": "none of the trainers whose files klora reads states it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
    },
)
