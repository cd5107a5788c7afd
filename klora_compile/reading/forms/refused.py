"""PEFT's types of adapters whose files do not determine a change of weights."""

from __future__ import annotations

from collections.abc import Mapping

_INPUTS = "it learns what a language model takes in, and changes no weight"
_ROUTED = "what it adds to a layer depends on what the layer takes in"

#: PEFT's name of a type -> the reason why klora refuses it.
REFUSED_TYPES: Mapping[str, str] = {
    "PROMPT_TUNING": _INPUTS,
    "MULTITASK_PROMPT_TUNING": _INPUTS,
    "P_TUNING": _INPUTS,
    "PREFIX_TUNING": _INPUTS,
    "ADAPTION_PROMPT": _INPUTS,
    "CPT": _INPUTS,
    "CARTRIDGE": _INPUTS,
    "TRAINABLE_TOKENS": "it changes embeddings of tokens, which klora does not carry",
    "LILY": _ROUTED,
    "XLORA": _ROUTED,
    "POLY": "what it adds to a layer depends on the number of a task",
    "SHADOW": "it adds a model of its own, and changes no weight",
    "ADAMSS": (
        "which rows its parts change follows from clusters of the base model's weight, which are "
        "in no file"
    ),
    "PSOFT": (
        "its factors are singular vectors of the base model's weight, whose signs are in no file "
        "and differ from library to library"
    ),
}
