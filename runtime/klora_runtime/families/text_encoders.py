"""Text encoders in the module names of transformers, which trainers keep.

The tables turn underscores back into dots and remove ``text_model.`` or ``model.``, which depends
on the version of transformers and on whether the class has a head. klora's names of CLIP have no
such prefix (as in transformers 5); names of T5 and of language models are those of the class in the
pipeline. Each base model's record states the component of its text encoders and the prefixes that
trainers write. Sources: ``LORA_PREFIX_*`` in sd-scripts' ``networks/lora*.py``; for OneTrainer a
real file and ``lora_text_encoders`` of each model in ``modules/model``, which also has ComfyUI's
names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from klora_runtime.families.rows import Layout, Row

_CLIP_LAYER = "encoder.layers.{}"
_CLIP = (
    *(f"{_CLIP_LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(f"{_CLIP_LAYER}.{name}" for name in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")),
    "embeddings.token_embedding",
    "embeddings.position_embedding",
    "final_layer_norm",
)
#: A module that is outside ``text_model`` in every version.
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
#: The path of the language model of Qwen 2.5 VL in transformers 5; earlier versions and ComfyUI
#: omit the second name.
_QWEN25_VL_INSIDE = "model.language_model"
_GEMMA2 = (
    *_DECODER,
    "layers.{}.pre_feedforward_layernorm",
    "layers.{}.post_feedforward_layernorm",
)


@dataclass(frozen=True)
class TextModel:
    """One kind of text encoder."""

    title: str
    """Name for people."""
    names: Layout
    """klora's names, which are those of its transformers class in a pipeline."""
    inside: Layout | None = None
    """The same names with the module that holds the model in front, for files that have it."""
    is_written_inside: bool = False
    """Whether trainers write the names of :attr:`inside`."""

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """All layouts of files for its modules."""
        return (self.names,) if self.inside is None else (self.names, self.inside)

    def home(self, module: str) -> str | None:
        """Return klora's name of a file's module (with dots); None if there is no such module."""
        for layout in self.layouts:
            match = layout.match(module, flat=False)
            if match is not None:
                return match[0].targets[0].format(*match[1])
        return None

    @property
    def written(self) -> Layout:
        """The names that trainers write."""
        return self.inside if self.is_written_inside and self.inside is not None else self.names


def _names(key: str, names: tuple[str, ...]) -> Layout:
    rows = tuple(Row(name, (name,)) for name in names)
    return Layout("transformers", key, component="text_encoder", rows=rows)


def _inside(prefix: str, layout: Layout) -> Layout:
    """Return the layout of files whose class holds the model as one of its modules."""
    rows = tuple(
        row if row.source == _CLIP_HEAD else replace(row, source=f"{prefix}.{row.source}")
        for row in layout.rows
    )
    return replace(layout, name=prefix, rows=rows)


_CLIP_NAMES = _names("clip", (*_CLIP, _CLIP_HEAD))
_QWEN3_NAMES = _names("qwen3", _QWEN3)
_GEMMA2_NAMES = _names("gemma2", _GEMMA2)
_LLAMA_NAMES = _names("llama", _DECODER)

_QWEN25_VL_NAMES = _names("qwen2.5-vl", tuple(f"{_QWEN25_VL_INSIDE}.{n}" for n in _DECODER))
_QWEN25_VL_BEFORE = replace(
    _QWEN25_VL_NAMES,
    name="model",
    rows=tuple(Row(f"model.{n}", (f"{_QWEN25_VL_INSIDE}.{n}",)) for n in _DECODER),
)

CLIP = TextModel("CLIP", _CLIP_NAMES, _inside("text_model", _CLIP_NAMES), is_written_inside=True)
T5 = TextModel("T5", _names("t5", _T5))
QWEN3 = TextModel("Qwen 3", _QWEN3_NAMES, _inside("model", _QWEN3_NAMES))
GEMMA2 = TextModel("Gemma 2", _GEMMA2_NAMES, _inside("model", _GEMMA2_NAMES))
LLAMA = TextModel("Llama", _LLAMA_NAMES, _inside("model", _LLAMA_NAMES))
QWEN25_VL = TextModel("Qwen 2.5 VL", _QWEN25_VL_NAMES, _QWEN25_VL_BEFORE)

#: Prefix of CLIP modules in files and in some transformers classes; klora's names omit it.
CLIP_PREFIX = "text_model."
