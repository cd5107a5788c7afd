"""HiDream-I1 in the names of its authors (HiDream-ai/HiDream-I1), which diffusers keeps.

All trainers write them: ai-toolkit (``extensions_built_in/diffusion_models/hidream``) and
diffusion-pipe (``models/hidream.py``) with dots after ``diffusion_model.``, OneTrainer
(``modules/model/HiDreamModel.py``) with underscores, SimpleTuner after ``lycoris_``, diffusers' own
trainer after ``transformer.``. diffusers' ``_convert_non_diffusers_hidream_lora_to_diffusers``
changes the prefix alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from klora_runtime.families.family import Family, Mark, TextEncoder
from klora_runtime.families.rows import Layout, Row, same
from klora_runtime.families.text_encoders import CLIP, T5

_DOUBLE, _SINGLE = "double_stream_blocks.{}.block", "single_stream_blocks.{}.block"
_SWIGLU = ("w1", "w2", "w3")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm")


def _rows() -> Iterator[Row]:
    for block in (_DOUBLE, _SINGLE):
        yield from same("adaLN_modulation.1", "ff_i.gate", under=block)
        yield from same(*_ATTENTION, under=f"{block}.attn1")
        for experts in ("shared_experts", "experts.{}"):
            yield from same(*_SWIGLU, under=f"{block}.ff_i.{experts}")
    yield from same(*(f"{name}_t" for name in _ATTENTION), under=f"{_DOUBLE}.attn1")
    yield from same(*_SWIGLU, under=f"{_DOUBLE}.ff_t")
    for embedder in ("t_embedder.timestep_embedder", "p_embedder.pooled_embedder"):
        yield from same("linear_1", "linear_2", under=embedder)
    yield from same(
        "caption_projection.{}.linear",
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
        "x_embedder.proj",
    )


DIFFUSERS = Layout(
    name="diffusers",
    family="hidream-i1",
    component="transformer",
    rows=tuple(_rows()),
)

FAMILY = Family(
    key="hidream-i1",
    title="HiDream-I1",
    pipeline="HiDreamImagePipeline",
    hub="HiDream-ai/HiDream-I1-Full",
    models=("HiDreamImageTransformer2DModel",),
    tag="hidream",
    layouts=(DIFFUSERS,),
    blocks={"double_stream_blocks": 16, "single_stream_blocks": 32},
    marks=(Mark(r"^(double|single)_stream_blocks\.\d+\.block\.attn1\.to_", (2560,)),),
    stated=r"hidream-i1",
    # The table of Llama does not fit its fourth text encoder, a Llama with a head.
    text_encoders=(
        TextEncoder("text_encoder", CLIP, kohya="lora_te1_", comfy="clip_l"),
        TextEncoder("text_encoder_2", CLIP, kohya="lora_te2_", comfy="clip_g"),
        TextEncoder("text_encoder_3", T5, kohya="lora_te3_", comfy="t5xxl"),
    ),
    missing={
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
    },
)
