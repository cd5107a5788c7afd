"""Tables of how trainers spell the keys of a LoRA file; a new spelling is new rows.

A key is a *prefix* for the component, a *module path* with dots or underscores, and a *suffix* for
the part of the layer. Each form has its own suffixes
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

#: Suffix -> its form, for forms that are refused by name.
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

#: Names of denoisers in pipelines of diffusers, also without a record.
_DENOISERS = (
    *("unet", "image_unet", "text_unet", "super_res_first", "super_res_last"),
    *("transformer", "transformer_2", "unconditional_transformer"),
    *("prior", "prior_prior", "decoder"),
)

#: Components that a dotted key may name.
COMPONENTS: frozenset[str] = frozenset(
    (*_DENOISERS, *(part for family in FAMILIES.values() for part in family.components))
)

#: Prefix by PEFT's ``save_pretrained`` before the path inside a model.
PEFT_PREFIX = "base_model.model."

#: Prefix by PEFT before tensors that a model has once.
PEFT_ROOT = "base_model."

#: Prefix of the denoiser in ComfyUI's names.
COMFY_PREFIX = "diffusion_model."

#: Prefix of a text encoder's modules -> possible text encoders, most likely first. ``lora_te3_``
#: and ComfyUI's ``t5xxl`` name a model, not a component, which the family determines.
_TEXT_ENCODERS: Mapping[str, tuple[TextEncoder, ...]] = {
    prefix: tuple(other for other in _ENCODERS if prefix in other.prefixes)
    for encoder in _ENCODERS
    for prefix in encoder.prefixes
}

#: Prefix of a text encoder's modules -> possible kinds, most likely first; the denoiser's family
#: decides.
TEXT_MODELS: Mapping[str, tuple[TextModel, ...]] = {
    prefix: tuple({encoder.model.title: encoder.model for encoder in encoders}.values())
    for prefix, encoders in _TEXT_ENCODERS.items()
}

#: Dotted prefix of a text encoder -> component: diffusers' research script's, and ComfyUI's.
TEXT_PREFIXES: Mapping[str, str] = {
    f"text_encoder_{PEFT_PREFIX}": "text_encoder",
    **{
        prefix: encoders[0].component
        for prefix, encoders in _TEXT_ENCODERS.items()
        if prefix.endswith(".")
    },
}

#: First name of a path without a component -> the component that has such modules.
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
    """A prefix before a path with underscores."""

    prefix: str
    component: str
    vocabularies: tuple[Vocabulary, ...]
    """Vocabularies of diffusers' and transformers' names, in the order of trial."""
    denoiser: bool = False
    """Whether the names may also be a denoiser's authors'."""


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

#: Name of a layer in diffusers' old attention processors -> present name.
PROCESSORS: Mapping[str, str] = {
    **{f".processor.to_{name}_lora": f".to_{name}" for name in "qkv"},
    ".processor.to_out_lora": ".to_out.0",
}
