"""Rules that the base calibrates, with prompts that show each LoRA alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from diffusers import StableDiffusionPipeline

from drawings.base.subjects import prompt
from klora_compile import OwnPictures, calibrate_fusion
from klora_compile.rules import Rule
from klora_runtime import apply_fusion

#: Subjects that the base knows; with them a style's LoRA shows its style.
_KNOWN = ("dog", "chair", "bread", "butterfly")

#: Pictures per LoRA; steps and guidance are those of the table.
_PICTURES, _STEPS, _GUIDANCE = 4, 10, 3.0


def own_pictures(content: Path, style: Path) -> OwnPictures:
    """Return what the base draws with each LoRA alone; the names of their files say it.

    Args:
        content: such as ``subject-penguin.safetensors``.
        style: such as ``style-ink.safetensors``.
    """
    subject, look = (path.stem.partition("-")[2] for path in (content, style))
    prompts = {"content": [prompt(subject)], "style": [prompt(each, look) for each in _KNOWN]}
    return OwnPictures(prompts, count=_PICTURES, steps=_STEPS, guidance=_GUIDANCE)


def act_calibrated(
    rule: Rule, pipe: StableDiffusionPipeline, content: Path, style: Path
) -> AbstractContextManager[object]:
    """Calibrate a rule for two LoRAs and let it act."""
    own = own_pictures(content, style)
    return apply_fusion(pipe, calibrate_fusion(pipe, content, style, rule, own=own))
