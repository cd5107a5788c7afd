"""What lies in the repository: the base, its accelerator, some LoRAs, and a few true drawings."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from drawings.base.subjects import HELD_OUT_STYLES
from drawings.loras.files import lora_path
from drawings.loras.recipes import Regime

_HERE = Path(__file__).parent
BASE = _HERE / "base" / "weights"
ACCELERATOR = _HERE / "accelerator" / "weights" / "accelerator-4.safetensors"
LORAS = _HERE / "loras" / "weights"
RECORDS = _HERE / "loras" / "records.json"
TRUE_DRAWINGS = _HERE / "loras" / "true"

#: Of the regime in which one sees what a fusion does; LoRAs that the subject judge accepted.
REGIME = Regime.DISENTANGLED
SUBJECTS = tuple("penguin octopus mushroom rocket cactus frog".split())
#: The training style of a subject's pictures alone.
OWN_STYLE = "noto"
STYLES = tuple(HELD_OUT_STYLES)
#: A subject that the LoRA of each style was trained on.
OWN_SUBJECTS = {
    "ink": "maple-leaf",
    "soft": "scissors",
    "firefox": "dog",
    "blob": "postbox",
    "mono": "pushpin",
}

#: Subject and style of the demo's pictures, whose true drawings are here too.
PAIRS = (
    ("penguin", "mono"),
    ("octopus", "firefox"),
    ("mushroom", "soft"),
    ("rocket", "blob"),
    ("cactus", "ink"),
)

#: How the base is sampled, unless something else is asked for.
STEPS, GUIDANCE = 20, 3.0


def base() -> StableDiffusionPipeline:
    """Load the base in float32."""
    pipe = DiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def subject_lora(name: str) -> Path:
    """Return the file of a subject's LoRA."""
    return lora_path(LORAS, "subject", name)


def style_lora(name: str) -> Path:
    """Return the file of a style's LoRA."""
    return lora_path(LORAS, "style", name)


def true_drawing(subject: str, style: str) -> Path:
    """Return the picture that a fusion of these should look like, 48 x 48 pixels."""
    return TRUE_DRAWINGS / f"{subject}-{style}.png"
