"""Every pipeline class of the installed diffusers, built and called by rules on names.

A pipeline gets a tiny denoiser, a scheduler, and a tiny decoder where it reads one. Embeddings
stand for prompts, so it needs no text encoder; Stable Diffusion has tiny ones.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from bare_pipelines import noise
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.models.modeling_utils import ModelMixin
from support.sd_families import controlnet_of
from support.sweep.shrinking import POOLED, WIDTH, tiny
from tiny_pipeline import SD_BETAS, tiny_pipeline

STEPS, PIXELS, FRAMES, TOKENS = 4, 64, 5, 6

#: Components that are evaluated at every step.
DENOISERS = ("unet", "transformer", "transformer_2")

IMAGE = noise(1, 3, PIXELS, PIXELS, seed=8).sigmoid()
MASK = (torch.arange(PIXELS) < PIXELS // 2).float().expand(1, 1, PIXELS, PIXELS)

#: Argument -> what a pipeline that has it is called with.
ARGUMENTS: Mapping[str, Any] = {
    **{
        f"{sign}prompt_embeds": noise(1, TOKENS, WIDTH, seed=len(sign))
        for sign in ("", "negative_")
    },
    **{
        f"{sign}pooled_prompt_embeds": noise(1, POOLED, seed=len(sign))
        for sign in ("", "negative_")
    },
    **{
        f"{sign}{name}": torch.ones(1, TOKENS, dtype=torch.long)
        for sign in ("", "negative_")
        for name in ("prompt_attention_mask", "prompt_embeds_mask", "prompt_mask")
    },
    "num_inference_steps": STEPS,
    "height": PIXELS,
    "width": PIXELS,
    "num_frames": FRAMES,
    "max_sequence_length": TOKENS,
    "use_resolution_binning": False,
    "output_type": "latent",
}

#: Argument -> what a pipeline that cannot do without it is called with.
WHERE_NEEDED: Mapping[str, Any] = {
    "image": IMAGE,
    "mask_image": MASK,
    "control_image": IMAGE,
    "class_labels": [1],
    "prompt": None,
}

#: Argument -> what a pipeline with text encoders is called with, where it has that argument.
WITH_WORDS: Mapping[str, Any] = {
    "prompt": "a fox",
    "num_inference_steps": STEPS,
    "guidance_scale": 3.0,
    "output_type": "latent",
    "height": 16,
    "width": 16,
    "image": IMAGE[..., :16, :16],
    "mask_image": MASK[..., PIXELS // 2 - 8 : PIXELS // 2 + 8][..., :16, :],
    "control_image": IMAGE[..., :16, :16],
}

_IMAGE = {"image": IMAGE}
_CONTROL = {"control_image": IMAGE}
_BOOL_MASKS = {
    f"{sign}prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool)
    for sign in ("", "negative_")
}
_MASKED = {"image": IMAGE, "mask_image": MASK}
_NO_WORDS = {"negative_prompt": None}
_CLIP_AND_T5 = {
    f"{sign}prompt_{name}": value
    for sign in ("", "negative_")
    for name, value in {
        "embeds_2": ARGUMENTS["prompt_embeds"],
        "attention_mask_2": ARGUMENTS["prompt_attention_mask"],
    }.items()
}

#: Pipeline -> arguments of its own.
OWN_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "AllegroPipeline": _NO_WORDS,
    "ChromaImg2ImgPipeline": {**_IMAGE, **_BOOL_MASKS},
    "ChromaPipeline": _BOOL_MASKS,
    "CogView4ControlPipeline": _CONTROL,
    "FluxControlImg2ImgPipeline": {**_IMAGE, **_CONTROL},
    "FluxControlInpaintPipeline": {**_MASKED, **_CONTROL},
    "FluxControlNetImg2ImgPipeline": {**_IMAGE, **_CONTROL},
    "FluxControlNetInpaintPipeline": {**_MASKED, **_CONTROL},
    "FluxControlNetPipeline": _CONTROL,
    "FluxControlPipeline": _CONTROL,
    "FluxImg2ImgPipeline": _IMAGE,
    "FluxInpaintPipeline": _MASKED,
    "FluxFillPipeline": _MASKED,
    "FluxKontextInpaintPipeline": {**_MASKED, "max_area": PIXELS**2, "_auto_resize": False},
    "FluxKontextPipeline": {**_IMAGE, "max_area": PIXELS**2, "_auto_resize": False},
    "HunyuanDiTPAGPipeline": _CLIP_AND_T5,
    "HunyuanDiTPipeline": _CLIP_AND_T5,
    "LattePipeline": {**_NO_WORDS, "video_length": 2, "clean_caption": False},
    "OvisImagePipeline": _NO_WORDS,
    "PixArtAlphaPipeline": _NO_WORDS,
    "PixArtSigmaPAGPipeline": _NO_WORDS,
    "PixArtSigmaPipeline": _NO_WORDS,
    "QwenImageImg2ImgPipeline": _IMAGE,
    "QwenImageInpaintPipeline": _MASKED,
    "SanaPAGPipeline": _NO_WORDS,
    "SanaPipeline": _NO_WORDS,
    "SanaVideoPipeline": _NO_WORDS,
    "StableDiffusion3ControlNetInpaintingPipeline": {
        "control_image": IMAGE,
        "control_mask": MASK,
    },
    "StableDiffusion3ControlNetPipeline": _CONTROL,
    "StableDiffusion3Img2ImgPipeline": _IMAGE,
    "StableDiffusion3InpaintPipeline": _MASKED,
    "StableDiffusion3PAGImg2ImgPipeline": _IMAGE,
    "ZImageImg2ImgPipeline": _IMAGE,
    "ZImageInpaintPipeline": _MASKED,
}

#: Pipeline -> component -> settings of its own.
OWN_SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    **{
        f"Flux{name}Pipeline": {"vae": {"latent_channels": 16}}
        for name in (
            *("Img2Img", "Inpaint", "Kontext", "KontextInpaint"),
            *("ControlNet", "ControlNetImg2Img"),
        )
    },
    **{
        f"FluxControl{name}Pipeline": {
            "vae": {"latent_channels": 16},
            "transformer": {"in_channels": 128, "out_channels": 64},
        }
        for name in ("", "Img2Img", "Inpaint")
    },
    "FluxControlNetInpaintPipeline": {"vae": {"latent_channels": 16}},
    "FluxFillPipeline": {
        "vae": {"latent_channels": 4},
        "transformer": {"in_channels": 48, "out_channels": 16},
    },
    "Flux2KleinPipeline": {"vae": {}},
    "Flux2KleinKVPipeline": {"vae": {}},
    "ChromaImg2ImgPipeline": {"vae": {"latent_channels": 16}},
    "BriaPipeline": {"vae": {}, "transformer": {"in_channels": 16}},
    "CogView4ControlPipeline": {
        "vae": {"latent_channels": 16},
        "transformer": {"in_channels": 32, "out_channels": 16},
    },
}


def pipeline_classes() -> dict[str, type[DiffusionPipeline]]:
    """Name -> class, of all that diffusers exports."""
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if "Pipeline" in name else None
        if isinstance(kind, type) and issubclass(kind, DiffusionPipeline):
            found[kind.__name__] = kind
    del found["DiffusionPipeline"]
    return found


def build(kind: type[DiffusionPipeline]) -> Any:
    """A tiny pipeline of a class.

    Raises:
        TypeError: the rules do not fit its components.
    """
    if "UNet2DConditionModel" in str(inspect.signature(kind.__init__).parameters.get("unet")):
        return _stable_diffusion(kind)
    own = OWN_SETTINGS.get(kind.__name__, {})
    parts: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kinds = [parameter.annotation, *typing.get_args(parameter.annotation)]
        kinds = [getattr(diffusers, k, None) if isinstance(k, str) else k for k in kinds]
        models = [t for t in kinds if isinstance(t, type) and issubclass(t, ModelMixin)]
        if name in DENOISERS or (models and name not in ("vae", "safety_checker")):
            if not models:
                raise TypeError(f"{name}: no class is annotated")
            parts[name] = tiny(models[0], **own.get(name, {}))
        elif name == "vae" and (AutoencoderKL in models or name in own):
            parts[name] = tiny(models[0], **own.get(name, {}))
        elif "scheduler" in name:
            parts[name] = _scheduler(kinds)
        elif parameter.default is parameter.empty:
            parts[name] = None
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stable_diffusion(kind: type[DiffusionPipeline]) -> Any:
    """With the parts of a tiny Stable Diffusion, which takes prompts."""
    named = inspect.signature(kind.__init__).parameters
    base = tiny_pipeline("sdxl" if "text_encoder_2" in named else "sd1")
    given = {
        **base.components,
        "scheduler": EulerDiscreteScheduler(**SD_BETAS, steps_offset=1),
        "requires_safety_checker": False,
        "add_watermarker": False,
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }
    if "controlnet" in named:
        given["controlnet"] = controlnet_of(base.unet)
    missing = [
        name
        for name, parameter in named.items()
        if name not in (*given, "self") and parameter.default is parameter.empty
    ]
    if missing:
        raise TypeError(f"no tiny {' and no tiny '.join(missing)} is known")
    pipe = kind(**{name: value for name, value in given.items() if name in named})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(kinds: list[Any]) -> Any:
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, SchedulerMixin):
            return kind()
    return (
        EulerDiscreteScheduler()
        if any(getattr(k, "__name__", "") == "KarrasDiffusionSchedulers" for k in kinds)
        else FlowMatchEulerDiscreteScheduler()
    )


def arguments_of(pipe: Any) -> dict[str, Any]:
    """What a pipeline is called with."""
    kind = type(pipe)
    own = OWN_ARGUMENTS.get(kind.__name__, {})
    named = inspect.signature(kind.__call__).parameters
    if getattr(pipe, "text_encoder", None) is not None:
        given = {name: value for name, value in WITH_WORDS.items() if name in named}
        return {**given, **own}
    rest = {name: value for name, value in WHERE_NEEDED.items() if _needs(named, name)}
    common = {name: value for name, value in ARGUMENTS.items() if name in named}
    return {**common, **rest, **own}


def _needs(named: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in named and named[name].default is inspect.Parameter.empty


def generate(pipe: Any) -> torch.Tensor:
    """All that one generation gives, flat; equal weights and schedules give equal numbers."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)  # some draw from the global generator
        parts = pipe(generator=generator, **arguments_of(pipe)).to_tuple()
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    return torch.cat([tensor.flatten().float() for tensor in tensors])
