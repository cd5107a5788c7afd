"""The compared rules: how two LoRAs act on the pipeline while it draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from drawings.loras.files import read
from drawings.pipeline import DrawingPipeline
from klora_compile import compile_fusion
from klora_compile.report.summary import gamma_of
from klora_compile.rules import Est, Klora, NpKlora, NpLora, Phases, Switch
from klora_compile.rules import Rule as FusionRule
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Entry
from klora_runtime.artifact.timeline import Timeline

#: (pipeline, subject's LoRA file, style's LoRA file) -> context in which the pipeline draws.
Way = Callable[[DrawingPipeline, Path, Path], AbstractContextManager[object]]

#: Share of weights that TIES and DARE keep.
_DENSITY = 0.5


@dataclass(frozen=True)
class Rule:
    """A way to fuse."""

    name: str
    """Unique label of the row."""
    way: Way
    sweep: str | None = None
    """Name of the curve that it is a point of; None for a row of the table."""
    setting: float = 0.0
    """Position on the curve's axis."""


@contextmanager
def nothing(pipe: DrawingPipeline, content: Path, style: Path) -> Iterator[None]:
    """Draw with the base model alone."""
    yield


def added(content_weight: float, style_weight: float) -> Way:
    """Return the way of PEFT's adapters at constant weights; weight 0 leaves one out."""

    @contextmanager
    def way(pipe: DrawingPipeline, content: Path, style: Path) -> Iterator[None]:
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


def merged(combination: str, content_weight: float = 1.0, style_weight: float = 1.0) -> Way:
    """Return the way of PEFT's ``add_weighted_adapter`` with a merge of deltas (``..._svd``)."""

    @contextmanager
    def way(pipe: DrawingPipeline, content: Path, style: Path) -> Iterator[None]:
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
            [content_weight, style_weight],
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


def klora(rule: FusionRule, balance: float = 1.0) -> Way:
    """Return the way of a rule that klora compiles and applies.

    Args:
        rule: the rule with its settings.
        balance: for K-LoRA, a factor on the gamma of these settings; higher favours style.
    """

    def way(pipe: DrawingPipeline, content: Path, style: Path) -> AbstractContextManager[object]:
        fusion = compile_fusion(content, style, rule)
        if balance != 1:
            gamma: Any = gamma_of(fusion)
            fusion = compile_fusion(content, style, replace(rule, gamma=balance * gamma))
        return apply_fusion(pipe, fusion)

    return way


def alike(first: Literal["content", "style"], until: float) -> Way:
    """Return the way in which all layers switch at the same progress (the paper's ablation).

    Args:
        first: role of the LoRA that acts until the switch; the other one acts after it.
        until: progress of the switch.
    """

    def way(pipe: DrawingPipeline, content: Path, style: Path) -> AbstractContextManager[object]:
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

#: The rows of the table, simplest first.
TABLE = (
    Rule("base, prompt only", nothing),
    Rule("subject LoRA only", added(1, 0)),
    Rule("style LoRA only", added(0, 1)),
    Rule("direct sum 1 : 1", added(1, 1)),
    Rule("direct sum 0.7 : 0.7", added(0.7, 0.7)),
    Rule("direct sum 0.5 : 0.5", added(0.5, 0.5)),
    Rule("direct sum 0.5 : 1", added(0.5, 1)),
    Rule("direct sum 1 : 0.5", added(1, 0.5)),
    Rule("TIES (PEFT ties_svd)", merged("ties_svd")),
    Rule("DARE (PEFT dare_linear_svd)", merged("dare_linear_svd")),
    Rule("DARE-TIES (PEFT dare_ties_svd)", merged("dare_ties_svd")),
    Rule("all layers: subject, style from 1/3", alike("content", 1 / 3)),
    Rule("all layers: style, subject from 2/3", alike("style", 2 / 3)),
    Rule("K-LoRA s", klora(Klora())),
    Rule("K-LoRA s*", klora(Klora(pattern="s*"))),
    Rule("K-LoRA s, authors' code", klora(Klora(semantics="authors"))),
    Rule("K-LoRA s*, authors' code", klora(Klora(semantics="authors", pattern="s*"))),
    Rule("EST-LoRA", klora(Est())),
    Rule("NP-LoRA", klora(NpLora())),
    Rule("NP-LoRA with K-LoRA s", klora(NpKlora())),
    Rule("LoRA Switch, tau 5 of 16 steps", klora(Switch(steps=16, tau=5))),
    Rule("LoRA Switch, tau 1 of 16 steps", klora(Switch(steps=16, tau=1))),
    Rule("phases: 1 : 0.5, from 1/2 0.5 : 1", klora(_CROSSING)),
)

_FACTORS = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)


def _curve(name: str, settings: tuple[float, ...], way: Callable[[Any], Way]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{name} {value:.3g}", way(value), name, value) for value in settings)


#: Points of curves; each curve has its own axis.
SWEEPS = (
    *_curve("K-LoRA s, gamma x", _FACTORS, lambda x: klora(Klora(), x)),
    *_curve("K-LoRA s*, gamma x", _FACTORS, lambda x: klora(Klora(pattern="s*"), x)),
    *_curve("K-LoRA s, alpha", (0.0, 1.5, 3.0), lambda x: klora(Klora(alpha=x))),
    *_curve("K-LoRA s, beta", (0.0, 0.5, 1.0), lambda x: klora(Klora(beta=x))),
    *_curve("K-LoRA s, K", (1, 64, 2**20), lambda x: klora(Klora(top_k=int(x)))),
    *_curve(
        "direct sum, share of style",
        (0.3, 0.5, 0.7),
        lambda x: added(*(2 * share for share in (1 - x, x))),
    ),
    *_curve("direct sum, both weights", (0.4, 0.7, 1.0), lambda x: added(x, x)),
    *_curve(
        "all layers: subject, style from",
        (0.2, 1 / 3, 0.5),
        lambda x: alike("content", x),
    ),
)
