"""What a pipeline and a request say of how pictures are made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from klora_compile.base_models import model_name
from klora_compile.sampling.making import FACTS, Making, lora_hashes, sampler_name
from klora_compile.sampling.pictures import Request, arguments
from klora_runtime.artifact.fusion import Fusion

_hashes = cache(lora_hashes)  # a sweep asks for each of its cells


def making_of(
    pipe: Any,
    fusion: Fusion,
    request: Request,
    *,
    artifact: Mapping[str, str] | None = None,
    always: Mapping[str, Mapping[str, str]] | None = None,
    files: Mapping[str, Path] | None = None,
    scheduler: str | None = None,
    mode: str = "auto",
    weights: Mapping[str, float] | None = None,
    missing: str = "error",
    dtype: str = "auto",
) -> Making:
    """Return how pictures are about to be made.

    Args:
        pipe: the pipeline.
        fusion: the fusion on it.
        request: the pictures.
        artifact: the artifact's file; None if there is none, as for a cell of a sweep.
        always: artifacts that act beside it, by name.
        files: LoRA files that are at hand, by source.
        scheduler: see :class:`~klora_compile.sampling.making.Making`, as the next ones.
        mode: how the fusion acts.
        weights: weights at run time.
        missing: what becomes of layers that the model lacks.
        dtype: the type that was asked for.

    Raises:
        ConfigError: the pipeline's call does not take an argument; see
            :func:`~klora_compile.sampling.pictures.arguments`.
    """
    given = {k: v for k, v in arguments(pipe, request).items() if k != "output_type"}
    defaults = {n: p.default for n, p in inspect.signature(pipe.__call__).parameters.items()}
    at_hand = files or {}
    return Making(
        artifact=artifact or {},
        always=always or {},
        loras={
            name: {
                "file": source.file,
                "sha256": source.sha256,
                **_hashes(source.sha256, at_hand.get(name)),
            }
            for name, source in fusion.sources.items()
        },
        model=model_name(Path(pipe.name_or_path)),
        prompts=request.prompts,
        seed=request.seed,
        count=request.count,
        settings=given,
        scheduler=scheduler,
        mode=mode,
        weights=weights or {},
        missing=missing,
        dtype=dtype,
        facts={
            "sampler": sampler_name(getattr(pipe, "scheduler", None)),
            **{
                fact: value if isinstance(value, int | float) else None
                for fact, name in FACTS.items()
                if name is not None
                for value in (given.get(name, defaults.get(name)),)
            },
        },
        rule=fusion.rule.name,
        rule_settings=fusion.rule.parameters,
    )
