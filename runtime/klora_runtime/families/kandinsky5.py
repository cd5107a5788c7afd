"""Kandinsky 5 in the names of its authors (kandinskylab/kandinsky-5), which diffusers keeps.

musubi-tuner (``kandinsky5/models/dit.py`` and ``nn.py``, the blocks without modulations) writes
them with underscores after ``lora_unet_``, SimpleTuner and diffusers after ``transformer.``.
"""

from __future__ import annotations

from collections.abc import Iterator

from klora_runtime.families.family import MUSUBI_TUNER, Family, Mark, Script
from klora_runtime.families.rows import Layout, Row, same

_ATTENTION = ("to_query", "to_key", "to_value", "query_norm", "key_norm", "out_layer")


def _rows() -> Iterator[Row]:
    for stream, attentions in (
        ("text", ("self_attention",)),
        ("visual", ("self_attention", "cross_attention")),
    ):
        block = f"{stream}_transformer_blocks.{{}}"
        for attention in attentions:
            yield from same(*_ATTENTION, under=f"{block}.{attention}")
        yield from same("in_layer", "out_layer", under=f"{block}.feed_forward")
        yield from same(f"{stream}_modulation.out_layer", under=block)
    for embedder in ("text_embeddings", "pooled_text_embeddings"):
        yield from same("in_layer", "norm", under=embedder)
    yield from same(
        "time_embeddings.in_layer",
        "time_embeddings.out_layer",
        "visual_embeddings.in_layer",
        "out_layer.modulation.out_layer",
        "out_layer.out_layer",
    )


DIFFUSERS = Layout(
    name="diffusers",
    family="kandinsky-5",
    component="transformer",
    rows=tuple(_rows()),
)

FAMILY = Family(
    key="kandinsky-5",
    title="Kandinsky 5",
    pipeline="Kandinsky5T2VPipeline",
    hub="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    models=("Kandinsky5Transformer3DModel",),
    task="text-to-video",
    layouts=(DIFFUSERS,),
    # Pro's numbers; Lite has 2 and 32, or 50 for pictures.
    blocks={"text_transformer_blocks": 4, "visual_transformer_blocks": 60},
    smaller=(
        {"text_transformer_blocks": 2, "visual_transformer_blocks": 32},
        {"text_transformer_blocks": 2, "visual_transformer_blocks": 50},
    ),
    marks=(
        Mark(
            r"^visual_transformer_blocks\.\d+\.cross_attention\.to_(query|key|value)$",
            (1792, 2048, 2560, 4096),
        ),
    ),
    stated=r"kandinsky-?5",
    script=Script("networks.lora_kandinsky", MUSUBI_TUNER),
    missing={
        "tag": "diffusers has no trainer for it",
        "kohya": "no tool is known here to read them",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
