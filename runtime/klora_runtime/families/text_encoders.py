"""Text encoders, in the module names of transformers, which trainers keep.

The tables serve to turn underscores back into dots and to take ``text_model.`` or ``model.`` off,
which a class of transformers has in front or not, by its version and whether it has a head.
klora's names of CLIP have none (as in transformers 5), T5's and the language models' are those of
the class that the pipeline holds.

======================  =====================  ========================  ==========================
family                  component              model                     trained by, with the prefix
======================  =====================  ========================  ==========================
sd1, sd2                ``text_encoder``       CLIP                      kohya ``lora_te_``
sdxl, sd3               ``text_encoder``, _2   CLIP                      kohya ``lora_te1_``, ``2_``
sd3                     ``text_encoder_3``     T5                        kohya ``lora_te3_``
flux.1                  ``text_encoder``       CLIP                      kohya ``lora_te1_``
flux.1                  ``text_encoder_2``     T5                        kohya ``lora_te3_``,
                                                                         OneTrainer ``lora_te2_``
chroma                  ``text_encoder``       T5                        kohya ``lora_te3_``
lumina2                 ``text_encoder``       Gemma 2                   kohya ``lora_te_``
anima                   ``text_encoder``       Qwen 3                    kohya ``lora_te_``
======================  =====================  ========================  ==========================

So ``lora_te3_`` names a model, T5, and not a component: which it is follows from the family.
Sources: ``LORA_PREFIX_*`` in sd-scripts' ``networks/lora*.py``; for OneTrainer a real file.
"""

from __future__ import annotations

from dataclasses import replace

from klora_runtime.families.rows import Layout, Row

_CLIP_LAYER = "encoder.layers.{}"
_CLIP = (
    *(f"{_CLIP_LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(f"{_CLIP_LAYER}.{name}" for name in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")),
    "embeddings.token_embedding",
    "embeddings.position_embedding",
    "final_layer_norm",
)
#: Outside ``text_model`` in every version.
_CLIP_HEAD = "text_projection"

_T5_ATTENTION, _T5_FEED_FORWARD = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
_T5 = (
    *(f"{_T5_ATTENTION}.SelfAttention.{name}" for name in "qkvo"),
    f"{_T5_ATTENTION}.SelfAttention.relative_attention_bias",
    f"{_T5_ATTENTION}.layer_norm",
    *(f"{_T5_FEED_FORWARD}.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
    f"{_T5_FEED_FORWARD}.layer_norm",
    "encoder.final_layer_norm",
    "shared",
)

_DECODER = (
    *(f"layers.{{}}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"layers.{{}}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    "layers.{}.input_layernorm",
    "layers.{}.post_attention_layernorm",
    "embed_tokens",
    "norm",
)
_QWEN3 = (*_DECODER, "layers.{}.self_attn.q_norm", "layers.{}.self_attn.k_norm")
_GEMMA2 = (
    *_DECODER,
    "layers.{}.pre_feedforward_layernorm",
    "layers.{}.post_feedforward_layernorm",
)


def _layout(family: str, names: tuple[str, ...]) -> Layout:
    rows = tuple(Row(name, (name,)) for name in names)
    return Layout("transformers", family, component="text_encoder", rows=rows)


def _inside(prefix: str, layout: Layout) -> Layout:
    """The names of files of a class that holds the model as one of its modules."""
    rows = tuple(
        row if row.source == _CLIP_HEAD else replace(row, source=f"{prefix}.{row.source}")
        for row in layout.rows
    )
    return replace(layout, name=prefix, rows=rows)


CLIP = _layout("clip", (*_CLIP, _CLIP_HEAD))
CLIP_INSIDE = _inside("text_model", CLIP)
CLIP_2 = replace(CLIP, component="text_encoder_2")
CLIP_2_INSIDE = replace(CLIP_INSIDE, component="text_encoder_2")
T5 = _layout("t5", _T5)
T5_2 = replace(T5, component="text_encoder_2")
T5_3 = replace(T5, component="text_encoder_3")
QWEN3 = _layout("qwen3", _QWEN3)
QWEN3_INSIDE = _inside("model", QWEN3)
GEMMA2 = _layout("gemma2", _GEMMA2)
GEMMA2_INSIDE = _inside("model", GEMMA2)
