"""LTX-2 and LTX-2.3 in the names of their authors (Lightricks/LTX-2), which all trainers keep.

The authors build the transformer in ``ltx_core/model/transformer/model.py`` and the connectors
between text encoder and transformer in ``ltx_core/text_encoders/gemma``. Their trainer, ai-toolkit
(``extensions_built_in/diffusion_models/ltx2``) and diffusion-pipe (``models/ltx2.py``) write these
names after ``diffusion_model.``. In diffusers the connectors are a separate component. The mapping
to its names follows ``convert_ltx2_transformer_to_diffusers`` in its
``loaders/single_file_utils.py`` and ``scripts/convert_ltx2_to_diffusers.py``. Only LTX-2 has
``caption_projection``; only LTX-2.3 has ``prompt_adaln_single``, ``to_gate_logits`` and an
``aggregate_embed`` for each of video and audio.
"""

from __future__ import annotations

from collections.abc import Iterator

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, Row, renamed, same

_BLOCK = "transformer_blocks.{}"
_CONNECTOR = ("{}_embeddings_connector.transformer_1d_blocks", "{}_connector.transformer_blocks")
_MODULATIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_EMBEDDER = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_KEPT = ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
_ATTENTION = {name: name for name in _KEPT} | {"q_norm": "norm_q", "k_norm": "norm_k"}
_FEED_FORWARD = ("net.0.proj", "net.2")


def _transformer() -> Iterator[Row]:
    for stream in ("", "audio_"):
        for attention in (f"{stream}attn1", f"{stream}attn2"):
            yield from renamed(f"{_BLOCK}.{attention}", f"{_BLOCK}.{attention}", _ATTENTION)
        yield from same(*_FEED_FORWARD, under=f"{_BLOCK}.{stream}ff")
        yield from same("linear_1", "linear_2", under=f"{stream}caption_projection")
        yield from same(f"{stream}proj_out")
        yield Row(f"{stream}patchify_proj", (f"{stream}proj_in",))
    for attention in ("audio_to_video_attn", "video_to_audio_attn"):
        yield from renamed(f"{_BLOCK}.{attention}", f"{_BLOCK}.{attention}", _ATTENTION)
    for source, target in _MODULATIONS.items():
        yield from renamed(source, target, {name: name for name in _EMBEDDER})


def _connectors() -> Iterator[Row]:
    for stream in ("video", "audio"):
        source, target = (f"{path.format(stream)}.{{}}" for path in _CONNECTOR)
        yield from renamed(f"{source}.attn1", f"{target}.attn1", _ATTENTION)
        yield from renamed(f"{source}.ff", f"{target}.ff", {name: name for name in _FEED_FORWARD})
    for stream in ("", "video_", "audio_"):
        source = f"text_embedding_projection.{stream}aggregate_embed"
        yield Row(source, (f"{stream}text_proj_in",))


ORIGINAL = Layout(
    name="lightricks",
    family="ltx-2",
    component="transformer",
    rows=tuple(_transformer()),
)

CONNECTORS = Layout(
    name="lightricks",
    family="ltx-2",
    component="connectors",
    rows=tuple(_connectors()),
)

FAMILY = Family(
    key="ltx-2",
    title="LTX-2",
    pipeline="LTX2Pipeline",
    hub="Lightricks/LTX-2",
    models=("LTX2VideoTransformer3DModel",),
    task="text-to-video",
    layouts=(ORIGINAL, CONNECTORS),
    blocks={
        "transformer_blocks": 48,
        "video_connector.transformer_blocks": 8,
        "audio_connector.transformer_blocks": 8,
    },
    marks=(
        Mark(r"^transformer_blocks\.\d+\.audio_attn[12]\.to_[qkv]$", (2048,)),
        Mark(r"^transformer_blocks\.\d+\.audio_to_video_attn\.to_q$", (4096,)),
        Mark(r"^transformer_blocks\.\d+\.video_to_audio_attn\.to_k$", (4096,)),
    ),
    stated=r"ltx-?2(-3)?",
    missing={
        "tag": "diffusers has no trainer for it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
