"""The compared rules: how a subject's and a style's LoRA act on the pipeline while it draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline

from drawings.loras.files import read
from drawings.table.calibrated import act_calibrated
from klora_compile import compile_fusion
from klora_compile.compiler import compile_measured
from klora_compile.measured import MeasuredLoras
from klora_compile.rules import (
    Auto,
    AutoStrength,
    Dare,
    Della,
    Est,
    Fitted,
    Groups,
    Klora,
    Level,
    NpKlora,
    NpLora,
    Phases,
    Soft,
    Ssr,
    Switch,
    Ties,
)
from klora_compile.rules import Rule as FusionRule
from klora_compile.rules.groups import TABLES
from klora_compile.settings.config import Config
from klora_compile.trying.loras import loras_to_try
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Entry
from klora_runtime.artifact.timeline import Timeline

#: (pipeline, subject's LoRA file, style's LoRA file) -> context in which the pipeline draws.
Way = Callable[[StableDiffusionPipeline, Path, Path], AbstractContextManager[object]]

#: Steps of the table, unless they are asked for.
STEPS = 10

#: Share of weights that TIES and DARE of PEFT keep.
_DENSITY = 0.5


@contextmanager
def nothing(pipe: StableDiffusionPipeline, content: Path, style: Path) -> Iterator[None]:
    """Draw with the base model alone."""
    yield


def added(content_weight: float, style_weight: float) -> Way:
    """Return the way of PEFT's adapters at constant weights; weight 0 leaves one out."""

    @contextmanager
    def way(pipe: StableDiffusionPipeline, content: Path, style: Path) -> Iterator[None]:
        weights = {
            name: weight
            for name, weight in (("content", content_weight), ("style", style_weight))
            if weight
        }
        for name, path in (("content", content), ("style", style)):
            if name in weights:
                pipe.unet.load_lora_adapter(str(path), adapter_name=name, prefix="unet")
        try:
            pipe.unet.set_adapters(list(weights), list(weights.values()))
            yield
        finally:
            pipe.unet.unload_lora()

    return way


def merged(combination: str) -> Way:
    """Return the way of PEFT's ``add_weighted_adapter`` with a merge of deltas (``..._svd``)."""

    @contextmanager
    def way(pipe: StableDiffusionPipeline, content: Path, style: Path) -> Iterator[None]:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        sources = {"content": read(content), "style": read(style)}
        configs = {
            name: LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=list(lora.modules))
            for name, lora in sources.items()
        }
        model: Any = get_peft_model(pipe.unet, configs["content"], adapter_name="content")
        model.add_adapter("style", configs["style"])
        for name, lora in sources.items():
            wrapped = {f"base_model.model.{key}": value for key, value in lora.tensors.items()}
            loaded: Any = set_peft_model_state_dict(model, wrapped, adapter_name=name)
            if loaded.unexpected_keys:
                raise ValueError(f"PEFT does not place {loaded.unexpected_keys[0]} of the {name}.")
        torch.manual_seed(0)  # DARE drops at random
        model.add_weighted_adapter(
            ["content", "style"],
            [1.0, 1.0],
            "fused",
            combination_type=combination,
            svd_rank=sum(lora.rank for lora in sources.values()),
            svd_full_matrices=False,
            density=_DENSITY,
        )
        model.set_adapter("fused")
        try:
            yield
        finally:
            model.unload()

    return way


def klora(rule: FusionRule) -> Way:
    """Return the way of a rule that klora compiles and applies."""

    def way(
        pipe: StableDiffusionPipeline, content: Path, style: Path
    ) -> AbstractContextManager[object]:
        return apply_fusion(pipe, compile_measured(_measured(content, style), Config(rule)))

    return way


@lru_cache(maxsize=1)
def _measured(content: Path, style: Path) -> MeasuredLoras:
    """Return the LoRAs of a pair, which is read once for all rules that follow each other on it."""
    return loras_to_try(content, style)


def alike(first: Literal["content", "style"], until: float) -> Way:
    """Return the way in which all layers switch at the same progress (the paper's ablation).

    Args:
        first: role of the LoRA that acts until the switch; the other one acts after it.
        until: progress of the switch.
    """

    def way(
        pipe: StableDiffusionPipeline, content: Path, style: Path
    ) -> AbstractContextManager[object]:
        whole = compile_fusion(content, style, Klora(gamma=1e-9))
        other = compile_fusion(content, style, Klora(gamma=1e9))
        early, late = (1.0, 0.0), (0.0, 1.0)
        order = (early, late) if first == "content" else (late, early)
        timeline = Timeline((0.0, until), dict(zip(("content", "style"), order, strict=True)))

        def both(one: Entry, two: Entry) -> Entry:
            factors = {**one.factors, **two.factors}
            return replace(one, factors=factors, timeline=timeline) if len(factors) == 2 else one

        pairs = zip(whole.entries, other.entries, strict=True)
        return apply_fusion(pipe, replace(whole, entries=tuple(itertools.starmap(both, pairs))))

    return way


#: A schedule in which both LoRAs act, first mainly the subject's, then mainly the style's.
_CROSSING = Phases(content_phases="0:1,0.5:0.5", style_phases="0:0.5,0.5:1")

#: Schedules in which the subject's LoRA fades and the style's stays, (content, style) by name.
_FADING = {
    "fading: subject 1, from 1/3 0.5": ("0:1,0.333:0.5", "0:1"),
    "fading: subject 1, from 1/2 0.4": ("0:1,0.5:0.4", "0:1"),
    "fading: subject 1, from 2/3 0.4": ("0:1,0.667:0.4", "0:1"),
    "fading: subject 1, from 1/2 0": ("0:1,0.5:0", "0:1"),
    "fading: subject 1, from 2/3 0": ("0:1,0.667:0", "0:1"),
    "fading: subject 1.3 : 0.7, from 1/2 0.4 : 1.3": ("0:1.3,0.5:0.4", "0:0.7,0.5:1.3"),
    "fading: 1 : 1, from 2/3 0.4 : 1.4": ("0:1,0.667:0.4", "0:1,0.667:1.4"),
}

#: The lab's table, and how its weights fade late too.
_LATE = {"content *": "0:1,0.667:0.4"}
_LATE_STYLE = {**_LATE, "style *": "0:1,0.667:1.4"}

#: A short fit: a row has some hundred pairs.
_FIT = Fitted(updates=40, rate=0.1, hold=0.02)

#: Each rule by the unique name of its row, simplest first.
RULES: Mapping[str, Way] = {
    "base, prompt only": nothing,
    "subject LoRA only": added(1, 0),
    "style LoRA only": added(0, 1),
    "direct sum 1 : 1": added(1, 1),
    "direct sum 0.7 : 0.7": added(0.7, 0.7),
    "direct sum 0.5 : 0.5": added(0.5, 0.5),
    "direct sum 0.5 : 1": added(0.5, 1),
    "direct sum 1 : 0.5": added(1, 0.5),
    "direct sum 1 : 1.25": added(1, 1.25),
    "direct sum 1 : 1.5": added(1, 1.5),
    "direct sum 1 : 2": added(1, 2),
    "level": klora(Level()),
    "TIES (PEFT ties_svd)": merged("ties_svd"),
    "DARE (PEFT dare_linear_svd)": merged("dare_linear_svd"),
    "DARE-TIES (PEFT dare_ties_svd)": merged("dare_ties_svd"),
    "all layers: subject, style from 1/3": alike("content", 1 / 3),
    "all layers: style, subject from 2/3": alike("style", 2 / 3),
    "K-LoRA s": klora(Klora()),
    "K-LoRA s*": klora(Klora(pattern="s*")),
    "K-LoRA s, authors' code": klora(Klora(semantics="authors")),
    "K-LoRA s*, authors' code": klora(Klora(semantics="authors", pattern="s*")),
    "K-LoRA softened": klora(Soft()),
    "EST-LoRA": klora(Est()),
    "NP-LoRA": klora(NpLora()),
    "NP-LoRA with K-LoRA s": klora(NpKlora()),
    f"LoRA Switch, tau 5 of {STEPS} steps": klora(Switch(steps=STEPS, tau=5)),
    f"LoRA Switch, tau 1 of {STEPS} steps": klora(Switch(steps=STEPS, tau=1)),
    "phases: 1 : 0.5, from 1/2 0.5 : 1": klora(_CROSSING),
    **{
        name: klora(Phases(content_phases=one, style_phases=two))
        for name, (one, two) in _FADING.items()
    },
    "groups, the lab's table": klora(Groups()),
    "groups, subject from 2/3 0.4": klora(Groups(table={**TABLES["unet-demo"], **_LATE})),
    "groups, from 2/3 0.4 : 1.4": klora(Groups(table={**TABLES["unet-demo"], **_LATE_STYLE})),
    "auto-strength": klora(AutoStrength()),
    "TIES": klora(Ties()),
    "DARE": klora(Dare()),
    "DELLA": klora(Della()),
    "auto": klora(Auto()),
    "SSR-Merge, calibrated": partial(act_calibrated, Ssr()),
    "fit, calibrated": partial(act_calibrated, _FIT),
    "fit, calibrated, subject until 1/3": partial(
        act_calibrated, replace(_FIT, content_until=1 / 3)
    ),
}
