"""Pictures from prompts and seeds, each by one call of the pipeline."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from klora_runtime.errors import ConfigError, KloraError, shown

#: Argument of a pipeline's call -> option that sets it.
OPTIONS: Mapping[str, str] = {
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "num_inference_steps": "--steps",
    "generator": "--seed",
    "guidance_scale": "--guidance",
    "height": "--height",
    "width": "--width",
}


@dataclass(frozen=True)
class Request:
    """A request for pictures."""

    prompts: tuple[str, ...]
    seed: int = 0
    """Seed of the first picture of each prompt; the following seeds count up."""
    count: int = 1
    """Number of pictures per prompt."""
    settings: Mapping[str, Any] | None = None
    """Further arguments of the pipeline's call, by name; None leaves the value to the pipeline."""

    @property
    def total(self) -> int:
        return len(self.prompts) * self.count


@dataclass(frozen=True)
class Shot:
    """One picture, or the frames of one video."""

    prompt: str
    seed: int
    frames: tuple[Image.Image, ...]
    is_video: bool
    seconds: float


def makes_videos(pipe: Any) -> bool:
    """Return whether a pipeline makes videos, according to its call's parameters."""
    return "num_frames" in _parameters(pipe)


def arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """Return the arguments that all pictures share.

    Raises:
        ConfigError: the pipeline's call does not take an argument, or needs one that no option
            sets.
    """
    given = {k: v for k, v in (request.settings or {}).items() if v is not None}
    parameters = _parameters(pipe)
    kind = type(pipe).__name__
    for name in ("prompt", "generator", *given):
        if name not in parameters:
            taken = ", ".join(option for key, option in OPTIONS.items() if key in parameters)
            raise ConfigError(
                f"{OPTIONS[name]}: {kind} does not take it ({name}); of the options of this "
                f"command it takes {taken or 'none'}."
            )
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in OPTIONS
    ]
    if needed:
        raise ConfigError(
            f"{kind} needs {', '.join(needed)}, which this command has no option for; sample "
            "with apply_fusion in Python."
        )
    return given | ({"output_type": "pil"} if "output_type" in parameters else {})


def sample(pipe: Any, request: Request) -> Iterator[Shot]:
    """Yield the pictures, by prompt and then by seed.

    Each picture has its own generator on the CPU, so it depends on its prompt and seed alone.

    Raises:
        KloraError: the pipeline failed.
    """
    same = arguments(pipe, request)
    done = 0
    for prompt in request.prompts:
        for seed in range(request.seed, request.seed + request.count):
            done += 1
            pipe.set_progress_bar_config(
                desc=f"picture {done} of {request.total}", leave=False, disable=None
            )
            yield picture(pipe, prompt, seed, same)


def picture(pipe: Any, prompt: str, seed: int, same: Mapping[str, Any]) -> Shot:
    """Make one picture with its own generator on the CPU.

    Args:
        pipe: the pipeline.
        prompt: the prompt.
        seed: seed of the generator.
        same: further arguments of the call, from :func:`arguments`.

    Raises:
        KloraError: the pipeline failed.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    begin = time.perf_counter()
    try:
        result = pipe(prompt=prompt, generator=generator, **same)
    except KloraError:
        raise
    except Exception as error:  # pipelines raise many types
        raise _failure(pipe, prompt, seed, error) from error
    return _shot(pipe, prompt, seed, result, time.perf_counter() - begin)


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of the pipeline's call by name."""
    parameters = inspect.signature(pipe.__call__).parameters
    bundles = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: each for name, each in parameters.items() if each.kind not in bundles}


def _failure(pipe: Any, prompt: str, seed: int, error: Exception) -> KloraError:
    why = shown(" ".join(str(error).split()) or type(error).__name__, limit=500)
    advice = ""
    if isinstance(error, torch.OutOfMemoryError):
        advice = " Try a smaller --height and --width, or --dtype bfloat16."
    return KloraError(
        f"{type(pipe).__name__} failed at prompt {shown(prompt)!r}, seed {seed}: "
        f"{type(error).__name__}: {why}{advice}"
    )


def _shot(pipe: Any, prompt: str, seed: int, result: Any, seconds: float) -> Shot:
    for name in ("images", "frames"):
        found = getattr(result, name, None)
        if found is not None and len(found):
            frames = found[:1] if name == "images" else found[0]
            images = tuple(_image(pipe, frame) for frame in frames)
            return Shot(prompt, seed, images, name == "frames", seconds)
    raise KloraError(
        f"{type(pipe).__name__} gave a {type(result).__name__} with neither images nor frames; "
        "sample with apply_fusion in Python."
    )


def _image(pipe: Any, picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.dtype.kind == "f":
        return Image.fromarray((picture.clip(0, 1) * 255).round().astype("uint8"))
    raise KloraError(
        f"{type(pipe).__name__} gave a {type(picture).__name__} where a picture was expected; "
        "sample with apply_fusion in Python."
    )
