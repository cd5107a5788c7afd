"""Why some pipelines are not compared, where the error of building them does not say it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from diffusers import DiffusionPipeline
from reference import DENOISERS

_TEXT = "not buildable: a language model of transformers denoises text, which no rule makes"
_HUB = "not buildable: its class fetches a tokenizer from the hub"

REASONS: Mapping[str, str] = {
    "BlipDiffusionControlNetPipeline": _HUB,
    "BlipDiffusionPipeline": _HUB,
    "DiffusionGemmaPipeline": _TEXT,
    "EasyAnimateControlPipeline": (
        "not buildable: its call raises a TypeError of its own, since it passes text_encoder_index "
        "to encode_prompt, which has no such argument"
    ),
    "EasyAnimateInpaintPipeline": (
        "not buildable: its call raises an AttributeError of its own, since it reads "
        "cache_mag_vae, which its decoder does not have"
    ),
    "LLaDA2Pipeline": _TEXT,
    "LTX2VideoDiffusionDecodePipeline": (
        "not buildable: its denoiser is a decoder of latents, for which there are no LoRAs"
    ),
    "RFD4ProteinaPipeline": "not buildable: it samples proteins, with a scheduler for each part",
}


def reason(kind: type[DiffusionPipeline]) -> str | None:
    """Why a pipeline of this class is not built; None where it is tried."""
    if kind.__name__ in REASONS:
        return REASONS[kind.__name__]
    if not {*DENOISERS} & {*inspect.signature(kind.__init__).parameters}:
        return "no denoising loop: it has no denoiser"
    return None
