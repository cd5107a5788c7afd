"""From statistics to a plan: what happens to every layer of either LoRA, and when.

Pure numbers: no tensors, no files. The choice inside a layer is the rule's (`rules.klora`); this
room adds what surrounds it: layers that only one LoRA has, zero deltas, text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klora_compile.config import Config
from klora_compile.rules.klora import Klora, gamma_of_ratios, gamma_of_sums
from klora_runtime.errors import PairingError
from klora_runtime.fusion import TEXT_ENCODERS
from klora_runtime.timeline import Timeline

CONTENT, STYLE = "content", "style"


@dataclass(frozen=True)
class Side:
    """One LoRA's numbers for one layer, its scaling applied."""

    rank: int
    scaling: float
    """What its delta is multiplied by: alpha / rank, or 1 where the network alpha is ignored."""
    l1: float
    """Sum of absolute values of the scaled delta."""
    top_k: float | None
    """Sum of the K largest of them; None where the partner lacks the layer, so there is no K."""

    @property
    def scores(self) -> dict[str, Any]:
        """As stored in the artifact."""
        return {"rank": self.rank, "scaling": self.scaling, "l1": self.l1, "top_k": self.top_k}


@dataclass(frozen=True)
class LayerNumbers:
    """Both LoRAs' numbers for one layer; a side that does not adapt it is None."""

    component: str
    k: int | None
    """min(rank_c * rank_s, numel), or as set; None where only one LoRA has the layer."""
    content: Side | None
    style: Side | None
    weight: str | None = None
    """Of a bias: the layer name of the weight beside it, with which it is chosen."""

    @property
    def in_text_encoder(self) -> bool:
        return self.component in TEXT_ENCODERS

    @property
    def sides(self) -> dict[str, Side | None]:
        return {CONTENT: self.content, STYLE: self.style}

    def has(self, slot: str) -> bool:
        """Whether this side adapts the layer with a delta that is not zero."""
        side = self.sides[slot]
        return side is not None and side.l1 > 0


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer."""

    fate: str
    """A key of :data:`klora_runtime.fusion.FATES`."""
    timeline: Timeline
    scores: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What happens to the whole model."""

    gamma: Mapping[str, float | None]
    """Denoiser component -> gamma; None where it is undefined or no layer needs it."""
    layers: Mapping[str, LayerPlan]
    """Layer name -> plan, in the order given."""


def make_plan(numbers: Mapping[str, LayerNumbers], config: Config) -> Plan:
    """Apply K-LoRA to the statistics of two LoRAs.

    Args:
        numbers: layer name -> numbers of both sides.
        config: the settings.

    Raises:
        PairingError: layers that only one LoRA adapts, under ``unpaired="error"``.
    """
    _check_unpaired(numbers, config)
    parameters = config.parameters()
    rule = klora_rule(config)
    gammas = {
        component: _gamma(component, numbers, parameters["gamma"])
        for component in sorted({n.component for n in numbers.values() if not n.in_text_encoder})
    }
    return Plan(
        gamma=gammas,
        layers={
            name: _plan_layer(layer, numbers, rule, gammas.get(layer.component), config)
            for name, layer in numbers.items()
        },
    )


def klora_rule(config: Config) -> Klora:
    """The rule with the settings of a config."""
    parameters = config.parameters()
    return Klora(config.pattern, parameters["alpha"], parameters["beta"], parameters["tie"])


def _check_unpaired(numbers: Mapping[str, LayerNumbers], config: Config) -> None:
    if config.unpaired != "error":
        return
    issues = [
        f"{name}: only the {CONTENT if layer.style is None else STYLE} LoRA has it"
        for name, layer in numbers.items()
        if not layer.in_text_encoder and (layer.content is None or layer.style is None)
    ]
    if issues:
        raise PairingError(
            f"{len(issues)} denoiser layers are adapted by only one LoRA; keep them with "
            "--unpaired keep or leave them out with --unpaired drop.",
            issues,
        )


def _gamma(component: str, numbers: Mapping[str, LayerNumbers], rule: str | float) -> float | None:
    if isinstance(rule, float):
        return rule
    pairs = [
        (layer.content.l1, layer.style.l1)
        for layer in numbers.values()
        if layer.component == component and layer.content and layer.style and not layer.weight
    ]
    l1_c, l1_s = [c for c, _ in pairs], [s for _, s in pairs]
    return gamma_of_sums(l1_c, l1_s) if rule == "paper" else gamma_of_ratios(l1_c, l1_s)


#: (progress from which it holds, whether content acts, whether style does)
_Segment = tuple[float, bool, bool]


def _plan_layer(
    layer: LayerNumbers,
    numbers: Mapping[str, LayerNumbers],
    rule: Klora,
    gamma: float | None,
    config: Config,
) -> LayerPlan:
    weight = None if layer.weight is None else numbers.get(layer.weight)
    if weight is None:
        fate, ratio, segments = _choose(layer, rule, gamma, config)
    else:
        _, ratio, chosen = _choose(weight, rule, gamma, config)
        fate, segments = _follow(layer, chosen)
    timeline = Timeline(
        tuple(start for start, _, _ in segments),
        {
            CONTENT: tuple(config.content_weight if c else 0.0 for _, c, _ in segments),
            STYLE: tuple(config.style_weight if s else 0.0 for _, _, s in segments),
        },
    )
    scores: dict[str, Any] = {"k": layer.k, "ratio": ratio}
    scores |= {slot: side and side.scores for slot, side in layer.sides.items()}
    return LayerPlan(fate, timeline, scores)


def _choose(
    layer: LayerNumbers, rule: Klora, gamma: float | None, config: Config
) -> tuple[str, float | None, list[_Segment]]:
    """Fate, ratio and segments of a layer that is chosen by itself."""
    content, style = layer.has(CONTENT), layer.has(STYLE)
    if not content and not style:
        return "zero", None, [(0.0, False, False)]
    if layer.in_text_encoder:
        content = content and config.text_encoder in ("both", CONTENT)
        style = style and config.text_encoder in ("both", STYLE)
        fate = "constant" if content or style else "dropped"
        return fate, None, [(0.0, content, style)]
    if not (content and style):
        unpaired = layer.content is None or layer.style is None
        if unpaired and config.unpaired == "drop":
            return "dropped", None, [(0.0, False, False)]
        return "one-sided", None, [(0.0, content, style)]
    return _duel(layer, rule, gamma)


def _follow(layer: LayerNumbers, chosen: list[_Segment]) -> tuple[str, list[_Segment]]:
    """Fate and segments of a bias: what its weight's LoRA adds to it, and nothing else."""
    content, style = layer.has(CONTENT), layer.has(STYLE)
    segments: list[_Segment] = []
    for start, c, s in chosen:
        own = (c and content, s and style)
        if not segments or segments[-1][1:] != own:
            segments.append((start, *own))
    acts = any(c or s for _, c, s in segments)
    if acts:
        return "with its weight", segments
    return ("dropped" if content or style else "zero"), segments


def _duel(
    layer: LayerNumbers, rule: Klora, gamma: float | None
) -> tuple[str, float, list[_Segment]]:
    """Fate, ratio and segments of a layer where both deltas are there."""
    assert layer.content is not None
    assert layer.style is not None
    s_c, s_s = layer.content.top_k, layer.style.top_k
    assert s_c is not None
    assert s_s is not None
    assert gamma is not None  # two deltas that are not zero have L1 norms above zero
    choices = rule.timeline(s_c, s_s, gamma)
    if len(choices) > 1:
        fate = "switching"
    else:
        fate = "always content" if choices[0][1] else "always style"
    return fate, s_c / (gamma * s_s), [(start, chosen, not chosen) for start, chosen in choices]
