"""Why some pipelines are not compared, in words that the page prints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from reference import DENOISERS

_TEXT = "not buildable: a language model of transformers denoises text, which no rule makes"
_HUB = "not buildable: its class fetches a tokenizer from the hub"

REASONS: Mapping[str, str] = {
    "BlipDiffusionControlNetPipeline": _HUB,
    "BlipDiffusionPipeline": _HUB,
    "DiffusionGemmaPipeline": _TEXT,
    "EasyAnimateControlPipeline": (
        "not buildable: its call fails in diffusers itself, since it passes text_encoder_index to "
        "encode_prompt, which has no such argument"
    ),
    "EasyAnimateInpaintPipeline": (
        "not buildable: its call fails in diffusers itself, since it reads cache_mag_vae, which "
        "its decoder does not have"
    ),
    "LLaDA2Pipeline": _TEXT,
    "LongCatImageEditPipeline": (
        "not buildable: its text encoder reads the picture through a processor of Qwen2.5-VL, "
        "which no rule makes"
    ),
    "LTX2DFRTemporalRefinePipeline": (
        "not buildable: it refines what LTX2DFRPipeline returns, and the rules call one pipeline"
    ),
    "LTX2VideoDiffusionDecodePipeline": (
        "not buildable: its denoiser is a decoder of latents, for which there are no LoRAs"
    ),
    "RFD4ProteinaPipeline": "not buildable: it samples proteins, with a scheduler for each part",
    "VersatileDiffusionDualGuidedPipeline": (
        "not buildable: its call fails in diffusers itself, since its UNet passes "
        "encoder_attention_mask to DualTransformer2DModel, which has no such argument"
    ),
    "VersatileDiffusionPipeline": (
        "no denoising loop: it has no call, and gives its parts to the other pipelines of its name"
    ),
}

#: Pipeline -> a package that its call imports, though its class can be made without it.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "Cosmos2_5_TransferPipeline": ("torchvision",),
    "OmniGenPipeline": ("torchvision",),
}

#: Name that diffusers has for a package -> the module to import.
_MODULES = {"opencv": "cv2", "onnx": "onnxruntime"}


def reason(kind: Any) -> str | None:
    """Why a pipeline of this class is not built; None where it is tried."""
    needs = NEEDS.get(kind.__name__, getattr(kind, "_backends", ()))
    if missing := [name for name in needs if find_spec(_MODULES.get(name, name)) is None]:
        return f"not buildable: it needs {' and '.join(missing)}, which is not installed"
    if kind.__name__ in REASONS:
        return REASONS[kind.__name__]
    if not {*DENOISERS} & {*inspect.signature(kind.__init__).parameters}:
        return "no denoising loop: it has no denoiser"
    return None
