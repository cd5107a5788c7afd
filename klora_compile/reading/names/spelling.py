"""How trainers spell the tensors of a LoRA file, as tables: a new spelling is new rows.

A key is a *prefix* that says which component, a *module path* in dots or underscores, and a
*suffix* that says which part of the layer; each form has its own
(:mod:`~klora_compile.reading.forms.catalogue`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from klora_compile.families.flat_names import UNET, Vocabulary, vocabulary
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import DENOISER_PREFIX, TextEncoder
from klora_runtime.families.text_encoders import TextModel

_ENCODERS = tuple(encoder for family in FAMILIES.values() for encoder in family.text_encoders)

#: Suffix -> the form it belongs to, of forms that are refused by name.
REFUSED_FORMS: Mapping[str, str] = {
    ".lora_A.bias": "a LoRA with a bias inside its pair",
    ".lora_down.bias": "a LoRA with a bias inside its pair",
    ".lora_embedding_A": "a LoRA of an embedding",
    ".lora_embedding_B": "a LoRA of an embedding",
    ".scale_weight": "scaled float8",
    ".reshape_weight": "a reshaped weight",
    ".oft_diag": "an early OFT",
    ".bm1": "an early GLoRA",
    ".bm2": "an early GLoRA",
    # PEFT's; all of its types are refused by name where its configuration states one.
    ".psoft_R.weight": "PSOFT",
    ".lily_A.weight": "Lily",
    ".adamss_newB": "AdaMSS",
}

#: Ending of the difference of a module's parameter -> the parameter and the ending of a difference.
#: lightx2v's distilled LoRAs have it; kijai/ComfyUI-WanVideoWrapper reads it like this in
#: ``standardize_lora_key_format`` of its ``nodes_model_loading.py``.
PARAMETER_ENDINGS: Mapping[str, str] = {".diff_m": ".modulation.diff"}

#: What pipelines of diffusers call their denoisers, also those of no record.
_DENOISERS = (
    *("unet", "image_unet", "text_unet", "super_res_first", "super_res_last"),
    *("transformer", "transformer_2", "unconditional_transformer"),
    *("prior", "prior_prior", "decoder"),
)

#: Components a dotted key may name.
COMPONENTS: frozenset[str] = frozenset(
    (*_DENOISERS, *(part for family in FAMILIES.values() for part in family.components))
)

#: Prefix that PEFT's own ``save_pretrained`` puts before the path inside one model.
PEFT_PREFIX = "base_model.model."

#: Prefix that PEFT puts before what a model has once.
PEFT_ROOT = "base_model."

#: Prefix that ComfyUI's names put before the denoiser's.
COMFY_PREFIX = "diffusion_model."

#: What stands before the modules of a text encoder -> those that it may be, most likely first.
#: ``lora_te3_`` and ComfyUI's ``t5xxl`` name a model and not a component, which the family tells.
_TEXT_ENCODERS: Mapping[str, tuple[TextEncoder, ...]] = {
    prefix: tuple(other for other in _ENCODERS if prefix in other.prefixes)
    for encoder in _ENCODERS
    for prefix in encoder.prefixes
}

#: What stands before the modules of a text encoder -> the kinds that it may be, most likely first;
#: the family of the denoiser decides.
TEXT_MODELS: Mapping[str, tuple[TextModel, ...]] = {
    prefix: tuple({encoder.model.title: encoder.model for encoder in encoders}.values())
    for prefix, encoders in _TEXT_ENCODERS.items()
}

#: Prefixes of text encoders before dots -> component: that of diffusers' research script, and
#: ComfyUI's.
TEXT_PREFIXES: Mapping[str, str] = {
    f"text_encoder_{PEFT_PREFIX}": "text_encoder",
    **{
        prefix: encoders[0].component
        for prefix, encoders in _TEXT_ENCODERS.items()
        if prefix.endswith(".")
    },
}

#: First names of a path that says no component -> the component whose models have them.
ROOTS: Mapping[str, str] = {
    "down_blocks": "unet",
    "mid_block": "unet",
    "up_blocks": "unet",
    "conv_in": "unet",
    "conv_out": "unet",
    "time_embedding": "unet",
    "add_embedding": "unet",
    "text_model": "text_encoder",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
}


@dataclass(frozen=True)
class FlatPrefix:
    """A prefix before a path in underscores."""

    prefix: str
    component: str
    vocabularies: tuple[Vocabulary, ...]
    """Of the names of diffusers and transformers, in the order in which they are tried."""
    denoiser: bool = False
    """Whether the names may also be those of a denoiser's authors."""


#: kohya's sd-scripts and musubi-tuner, and sd-scripts' OFT; LyCORIS' own wrapper (SimpleTuner);
#: OneTrainer (``lora_transformer_``). VideoX-Fun writes one more underscore behind the prefix
#: (``create_modules`` in ``videox_fun/utils/lora_utils.py``); diffusers'
#: ``convert_state_dict_to_kohya`` leaves a module that has DoRA's magnitude its last dot.
FLAT_PREFIXES: tuple[FlatPrefix, ...] = (
    FlatPrefix(DENOISER_PREFIX, "unet", (UNET,), denoiser=True),
    FlatPrefix("oft_unet_", "unet", (UNET,), denoiser=True),
    FlatPrefix("lycoris_", "unet", (UNET,), denoiser=True),
    FlatPrefix("lora_transformer_", "transformer", (), denoiser=True),
    *(
        FlatPrefix(
            prefix,
            encoders[0].component,
            tuple(vocabulary(model.layouts) for model in TEXT_MODELS[prefix]),
        )
        for prefix, encoders in _TEXT_ENCODERS.items()
        if prefix.endswith("_")
    ),
)

#: What the old attention processors of diffusers called their layers -> the layer they stand for.
PROCESSORS: Mapping[str, str] = {
    **{f".processor.to_{name}_lora": f".to_{name}" for name in "qkv"},
    ".processor.to_out_lora": ".to_out.0",
}
