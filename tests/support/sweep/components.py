"""The parts of a pipeline, made by rules on their names and on the classes that are annotated.

A denoiser, decoders and what reads images are tiny models. Embeddings stand for prompts, so a
pipeline has text encoders only where it cannot be called without them.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from diffusers.models.modeling_utils import ModelMixin
from reference import DENOISERS
from support.sweep.shrinking import tiny
from support.sweep.words import (
    class_named,
    is_encoder,
    reads_words,
    tiny_encoder,
    tiny_processor,
    tiny_tokenizer,
)


def parameters_of(kind: type[DiffusionPipeline]) -> Iterator[tuple[str, inspect.Parameter]]:
    """What a pipeline is made of."""
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        variable = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name != "self" and parameter.kind not in variable:
            yield name, parameter


def make(
    kind: type[DiffusionPipeline],
    own: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The parts of a pipeline of a class.

    Args:
        kind: the class.
        own: parts that no rule makes.
        settings: component -> settings that no rule gives.

    Raises:
        TypeError: the rules do not fit.
    """
    reads = reads_words(kind)
    parts: dict[str, Any] = dict(own)
    for name, parameter in parameters_of(kind):
        if name in parts:
            continue
        try:
            made = _part(name, _classes(parameter.annotation), settings.get(name, {}), reads=reads)
        except TypeError:
            if parameter.default is parameter.empty or name in DENOISERS:
                raise
            continue  # the pipeline can do without it
        if made is not None or parameter.default is parameter.empty:
            parts[name] = made
    return parts


def _classes(annotation: Any) -> list[Any]:
    """The classes that an annotation names, also as texts."""
    found = [annotation, *typing.get_args(annotation)]
    return [class_named(each) if isinstance(each, str) else each for each in found]


def _part(name: str, classes: list[Any], settings: Mapping[str, Any], *, reads: bool) -> Any:
    types = [each for each in classes if isinstance(each, type)]
    models = [each for each in types if issubclass(each, ModelMixin)]
    encoders = [each for each in types if is_encoder(each)]
    named = types[0].__name__ if types else ""
    if name in DENOISERS and not models:
        raise TypeError(f"{name}: no class is annotated")
    if name == "safety_checker":
        return None
    if models:
        return tiny(models[0], **settings)
    if "scheduler" in name:
        return scheduler_of(classes)
    if "guider" in name:
        concrete = [t for t in types if issubclass(t, BaseGuidance) and t is not BaseGuidance]
        return (concrete or [ClassifierFreeGuidance])[0]()
    if encoders and (reads or not name.startswith("text_encoder")):
        return tiny_encoder(encoders[0], **settings)
    if "ImageProcessor" in named:
        return tiny_processor(types[0])
    if name in ("image_processor", "feature_extractor") and "Processor" in named:
        return tiny_processor(class_named("CLIPImageProcessorPil"))
    if "tokenizer" in name and (reads or not name.startswith("tokenizer")):
        return tiny_tokenizer(**settings)
    return None


def scheduler_of(classes: list[Any]) -> Any:
    """The first scheduler of those that are annotated, or the usual one."""
    for kind in classes:
        if (
            isinstance(kind, type)
            and issubclass(kind, SchedulerMixin)
            and kind is not SchedulerMixin
        ):
            return kind()
    named = [getattr(kind, "__name__", "") for kind in classes]
    if "KarrasDiffusionSchedulers" in named:
        return EulerDiscreteScheduler()
    return FlowMatchEulerDiscreteScheduler()
