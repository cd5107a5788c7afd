"""FIBO and FIBO Edit of BRIA in diffusers' names, built as FLUX.1 is.

The authors' model (briaai/FIBO) is diffusers' own, and its pipelines load LoRAs as FLUX.1's do, so
that trainers write diffusers' names; none with others is known.
"""

from __future__ import annotations

from dataclasses import replace

from klora_runtime.families import bria, flux1
from klora_runtime.families.family import Mark
from klora_runtime.families.rows import Layout, same

_CAPTIONS = "caption_projection.{}.linear"

DIFFUSERS = Layout(
    name="diffusers",
    family="fibo",
    component="transformer",
    rows=(*bria.DIFFUSERS.rows, *same(_CAPTIONS)),
)

FAMILY = replace(
    bria.FAMILY,
    key="fibo",
    title="FIBO",
    pipeline="BriaFiboPipeline",
    hub="briaai/FIBO",
    models=("BriaFiboTransformer2DModel",),
    layouts=(DIFFUSERS,),
    # Of mflux' `fibo_transformer/transformer.py`, with FLUX.1's heads.
    blocks={"transformer_blocks": 8, "single_transformer_blocks": 38},
    widths=flux1.FAMILY.widths,
    # The projections of every layer of its text encoder.
    marks=(Mark(r"^caption_projection\.\d+\.linear$", (2048,)),),
    missing={name: why for name, why in bria.FAMILY.missing.items() if name != "marks"},
)
