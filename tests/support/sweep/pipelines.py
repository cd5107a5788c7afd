"""Every pipeline class of the installed diffusers, built and called by rules on names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import numpy
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support.sweep.arguments import arguments_of
from support.sweep.components import make
from support.sweep.own_parts import OWN_PARTS
from support.sweep.own_settings import OWN_SETTINGS
from support.sweep.preparing import PREPARED, few_pixels
from support.sweep.stable_diffusion import stable_diffusion


def pipeline_classes() -> dict[str, type[DiffusionPipeline]]:
    """Name -> class, of all that diffusers exports, also where a package is missing."""
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if "Pipeline" in name else None
        if isinstance(kind, type) and (issubclass(kind, DiffusionPipeline) or is_missing(kind)):
            found[kind.__name__] = kind
    del found["DiffusionPipeline"]
    return found


def is_missing(kind: type) -> bool:
    """Whether a class only says which packages it needs."""
    return type(kind).__name__ == "DummyObject"


def build(kind: type[DiffusionPipeline]) -> Any:
    """A tiny pipeline of a class.

    Raises:
        TypeError: the rules do not fit its components.
    """
    own = {**stable_diffusion(kind), **OWN_PARTS.get(kind.__name__, dict)()}
    parts = make(kind, own, OWN_SETTINGS.get(kind.__name__, {}))
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    if kind.__name__ in PREPARED:
        PREPARED[kind.__name__](pipe)
    return pipe


def generate(pipe: Any) -> torch.Tensor:
    """All that one generation gives, flat; equal weights and schedules give equal numbers."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)  # some draw from the global generator
        given = arguments_of(pipe)
        if "generator" in inspect.signature(type(pipe).__call__).parameters:
            given["generator"] = generator
        with few_pixels(type(pipe)):
            found = pipe(**given)
    return torch.cat([tensor.flatten().float() for tensor in tensors_in(found)])


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The numbers of an output: of tensors, arrays, pictures, and of all of these that it holds."""
    match value:
        case torch.Tensor():
            yield value
        case numpy.ndarray() if value.dtype != object:
            yield torch.from_numpy(value)
        case Image.Image():
            yield torch.from_numpy(numpy.array(value))
        case Mapping():
            for part in value.values():
                yield from tensors_in(part)
        case list() | tuple():
            for part in value:
                yield from tensors_in(part)
