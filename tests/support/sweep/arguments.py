"""What pipelines are called with, by rules on the names of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from bare_pipelines import noise
from support.sweep.inputs import (
    EMBEDDED,
    FEW,
    FRAMES,
    IMAGE,
    MASK,
    NUMBERS,
    PIXELS,
    STEPS,
    picture,
)
from support.sweep.own_arguments import OWN_ARGUMENTS
from support.sweep.settings import WIDTH
from support.sweep.stable_diffusion import is_stable_diffusion
from support.sweep.words import reads_words

#: Argument -> what a pipeline that cannot do without it is called with.
WHERE_NEEDED: Mapping[str, Any] = {
    "image": IMAGE,
    "mask_image": MASK,
    "control_image": IMAGE,
    "class_labels": [1],
    "prompt": None,
    "image_embeds": noise(1, WIDTH, seed=3),
    "negative_image_embeds": noise(1, WIDTH, seed=4),
    "hint": IMAGE,
    "source_prompt": "a dog",
    "example_image": picture(FEW),
    "pose_video": [picture(PIXELS, seed) for seed in range(FRAMES)],
    "face_video": [picture(FEW, seed) for seed in range(FRAMES)],
    "video": [picture(PIXELS, seed) for seed in range(FRAMES)],
}

#: Argument -> what a pipeline that reads words is called with, where it has that argument.
WITH_WORDS: Mapping[str, Any] = {
    "prompt": "a fox",
    "num_inference_steps": STEPS,
    "guidance_scale": 3.0,
    "output_type": "latent",
}

#: The same, of a pipeline of Stable Diffusion.
STABLE_DIFFUSION: Mapping[str, Any] = {
    **WITH_WORDS,
    "height": FEW,
    "width": FEW,
    "image": IMAGE[..., :FEW, :FEW],
    "mask_image": MASK[..., PIXELS // 2 - FEW // 2 : PIXELS // 2 + FEW // 2][..., :FEW, :],
    "control_image": IMAGE[..., :FEW, :FEW],
    "num_frames": 2,
    "video_length": 2,
    "conditioning_frames": [picture(FEW, seed) for seed in range(2)],
    "video": [picture(FEW, seed) for seed in range(2)],
    "strength": 0.8,
    "clean_caption": False,
}

#: Word in the name of a pipeline -> arguments that it then gets, where it has them.
BY_NAME: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("Img2Img", "ImageTo", "I2V", "I2I", "Edit", "Upscale"), ("image",)),
    "Inpaint": ("image", "mask_image"),
    "VideoTo": ("video",),
    "ControlNet": ("control_image",),
    "Control": ("control_image", "control_video"),
}

#: Argument -> what a pipeline whose name asks for it is called with.
ASKED: Mapping[str, Any] = {
    **WHERE_NEEDED,
    "control_video": WHERE_NEEDED["video"],
}


def arguments_of(pipe: Any) -> dict[str, Any]:
    """What a pipeline is called with."""
    kind = type(pipe)
    own = OWN_ARGUMENTS.get(kind.__name__, {})
    named = inspect.signature(kind.__call__).parameters
    rest = {name: value for name, value in WHERE_NEEDED.items() if _needs(named, name)}
    if is_stable_diffusion(kind):
        given = {name: value for name, value in STABLE_DIFFUSION.items() if name in named}
        return {**rest, **given, **own}
    asked = {
        name: ASKED[name]
        for word, names in BY_NAME.items()
        if word in kind.__name__
        for name in names
        if name in named
    }
    reads = reads_words(kind)
    all_have = NUMBERS if reads else {**EMBEDDED, **NUMBERS}
    common = {name: value for name, value in all_have.items() if name in named}
    if not reads and "negative_prompt_embeds" in named and "negative_prompt" in named:
        common["negative_prompt"] = None  # some have an empty text
    if common.get("output_type") and named["output_type"].default == "pt":
        del common["output_type"]  # embeddings or sounds
    words = WITH_WORDS if reads else {}
    spoken = {n: v for n, v in words.items() if n in named and n not in NUMBERS}
    return {**common, **rest, **asked, **spoken, **own}


def _needs(named: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in named and named[name].default is inspect.Parameter.empty
