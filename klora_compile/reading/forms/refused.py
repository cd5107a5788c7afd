"""PEFT's types of adapters whose files do not determine a change of weights."""

from __future__ import annotations

from collections.abc import Mapping

_INPUTS = "it learns inputs of a language model and changes no weight"
_ROUTED = "its change of a layer depends on the layer's input"

#: PEFT's name of a type -> the reason why klora refuses it.
REFUSED_TYPES: Mapping[str, str] = {
    "PROMPT_TUNING": _INPUTS,
    "MULTITASK_PROMPT_TUNING": _INPUTS,
    "P_TUNING": _INPUTS,
    "PREFIX_TUNING": _INPUTS,
    "ADAPTION_PROMPT": _INPUTS,
    "CPT": _INPUTS,
    "CARTRIDGE": _INPUTS,
    "TRAINABLE_TOKENS": "it changes token embeddings, which klora does not carry",
    "LILY": _ROUTED,
    "XLORA": _ROUTED,
    "SHADOW": "it adds a separate model and changes no weight",
    "ADAMSS": (
        "the rows that its parts change follow from clusters of the base model's weight, which are "
        "in no file"
    ),
    "PSOFT": (
        "its factors are singular vectors of the base model's weight, whose signs are in no file "
        "and differ from library to library"
    ),
}
