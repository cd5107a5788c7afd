"""K-LoRA over a whole model: its settings, gamma, and the duel in each layer.

More than two LoRAs: divided by L1_c, the inequality of :mod:`klora_compile.rules.klora` compares
S_c / L1_c with S(t) * S_s / L1_s. So each LoRA has one score of its own, S(t) weighs on all styles
alike, and the largest wins: a duel of the best content and the best style. K is the product of the
two largest ranks of the layer, the L1 sums are over the layers that all LoRAs adapt. For two LoRAs
that is the paper, with its gamma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.klora import Klora, Pattern, Tie, gamma_of_ratios, gamma_of_sums
from klora_compile.rules.ranges import require_choice, require_number, require_whole
from klora_compile.rules.rule import Choice, Rule
from klora_compile.slots import CONTENT, STYLE, role_of
from klora_runtime.errors import PairingError

Semantics = Literal["paper", "authors"]
GammaRule = Literal["paper", "code"]

#: beta of pattern ``s*`` in the authors' code, as a share of alpha; the paper states 1.3.
_AUTHORS_WRAPPED_SHARE = 0.85

#: gamma is multiplied by this to the power of minus the bias.
_BIAS_BASE = 4.0

#: In an artifact, before a component's name: the L1 sum of each of more than two LoRAs.
_L1 = "l1."


@dataclass(frozen=True)
class KloraRule(Rule):
    """K-LoRA (arXiv 2502.18461, eq. 1-12); None means *as the semantics say*."""

    name: ClassVar[str] = "klora"
    needs: ClassVar[tuple[str, ...]] = ("l1", "top_k")
    fates: ClassVar[tuple[str, ...]] = ("always content", "always style", "switching")
    ratio_formula: ClassVar[str] = r"$S_c\,/\,(\gamma\,S_s)$"
    optional: ClassVar[tuple[str, ...]] = ("bias",)

    semantics: Semantics = "paper"
    """``paper`` as published; ``authors`` as their public code computes: its gamma, its offset of
    s*, ties to the style, the network alpha ignored."""
    pattern: Pattern = "s"
    """``s`` rises once; ``s*`` starts high, wraps to 0 and rises again."""
    alpha: float | None = None
    """Slope of S, -100 to 100; for ``s*`` also the modulus, and then above 0. Default 1.5."""
    beta: float | None = None
    """S at progress 0, -100 to 100 (``s*``: 0 to 100); higher favours style. Default 0.5 for
    ``s``; for ``s*`` 1.3, with the authors' semantics 0.85 * alpha."""
    gamma: GammaRule | float | None = None
    """Balance of the two LoRAs' magnitudes: ``paper`` (ratio of sums), ``code`` (mean of ratios
    without outliers), or a number above 0; higher favours style."""
    bias: float = 0.0
    """gamma is multiplied by 4 to the power of minus this, -1 to 1; above 0 favours content."""
    top_k: int | None = None
    """How many weights of a layer count, 1 or more; None: product of the layer's two ranks."""

    def __post_init__(self) -> None:
        """Check the settings."""
        require_choice("semantics", self.semantics, get_args(Semantics))
        require_choice("pattern", self.pattern, get_args(Pattern))
        if isinstance(self.gamma, str):
            require_choice("gamma", self.gamma, get_args(GammaRule))
        elif self.gamma is not None:
            require_number("gamma", self.gamma, 1e-12, 1e12)
        wrapped = self.pattern == "s*"
        if self.alpha is not None:
            require_number("alpha", self.alpha, 1e-3 if wrapped else -100.0, 100.0)
        if self.beta is not None:
            require_number("beta", self.beta, 0.0 if wrapped else -100.0, 100.0)
        require_number("bias", self.bias, -1.0, 1.0)
        if self.top_k is not None:
            require_whole("top_k", self.top_k, 1)

    @property
    def ignores_alpha(self) -> bool:
        return self.semantics == "authors"

    def parameters(self) -> dict[str, Any]:
        authors = self.semantics == "authors"
        alpha = 1.5 if self.alpha is None else float(self.alpha)
        beta = self.beta
        if beta is None and self.pattern == "s":
            beta = 0.5
        elif beta is None:
            beta = _AUTHORS_WRAPPED_SHARE * alpha if authors else 1.3
        gamma = self.gamma
        if gamma is None:
            gamma = "code" if authors else "paper"
        return super().parameters() | {
            "alpha": alpha,
            "beta": float(beta),
            "gamma": gamma if isinstance(gamma, str) else float(gamma),
            "top_k": "auto" if self.top_k is None else self.top_k,
            "tie": "style" if authors else "content",
            "network_alpha": "ignored" if authors else "applied",
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        values = dict(parameters)
        if values.get("top_k") == "auto":
            values["top_k"] = None
        rule = super().from_parameters(values)
        for name in ("alpha", "beta", "gamma"):  # what is at its default follows the others
            unset: dict[str, Any] = {name: None}
            free = replace(rule, **unset)
            if free.parameters() == rule.parameters():
                rule = free
        return rule

    def equation(self) -> Klora:
        """The inequality that decides."""
        own = self.parameters()
        tie: Tie = own["tie"]
        return Klora(self.pattern, own["alpha"], own["beta"], tie)

    def misfit(self, slots: Sequence[str]) -> str | None:
        gamma = self.parameters()["gamma"]
        if len(slots) == 2 or gamma == "paper":
            return None
        return (
            f"gamma: expected paper for more than two LoRAs, found {gamma!r}; each LoRA is weighed "
            "by its own sum."
        )

    def count(self, ranks: Sequence[int], numel: int) -> int | None:
        largest = sorted(ranks)[-2:]
        return min(math.prod(largest) if self.top_k is None else self.top_k, numel)

    def weigh(self, layers: Mapping[str, LayerNumbers]) -> dict[str, Any]:
        """gamma of each component; for more than two LoRAs, the L1 sum of each (eq. 9)."""
        components = sorted({n.component for n in layers.values() if not n.in_text_encoder})
        sums = {component: _l1_norms(layers, component) for component in components}
        if any(len(norms) > 2 for norms in sums.values()):
            return {
                f"{_L1}{component}": {slot: math.fsum(norms) for slot, norms in by_slot.items()}
                for component, by_slot in sums.items()
            }
        return {"gamma": {component: self._gamma(*sums[component].values()) for component in sums}}

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        content = _best(layer, CONTENT, derived)
        style = _best(layer, STYLE, derived)
        if content is None or style is None:
            only = content or style
            assert only is not None
            return Choice(f"always {role_of(only)}", ((0.0, {only: 1.0}),))
        gamma = self._gamma_between(content, style, layer, derived)
        present = layer.present
        s_c, s_s = _top_k(present[content]), _top_k(present[style])
        choices = self.equation().timeline(s_c, s_s, gamma)
        fate = "switching"
        if len(choices) == 1:
            fate = "always content" if choices[0][1] else "always style"
        segments = tuple((start, {content if c else style: 1.0}) for start, c in choices)
        return Choice(fate, segments, s_c / (gamma * s_s))

    def range(self) -> tuple[float, float] | None:
        return self.equation().range()

    def text(self) -> str:
        own = self.parameters()
        parts = [f"pattern {self.pattern}", f"{self.semantics} semantics"]
        parts += [f"{name} {own[name]:g}" for name in ("alpha", "beta", "bias") if name in own]
        return ", ".join(parts)

    def _gamma(self, l1_c: Sequence[float], l1_s: Sequence[float]) -> float | None:
        """Of one component, the bias included; None where it is undefined."""
        stated = self.parameters()["gamma"]
        if isinstance(stated, float):
            gamma: float | None = stated
        else:
            gamma = gamma_of_sums(l1_c, l1_s) if stated == "paper" else gamma_of_ratios(l1_c, l1_s)
        return None if gamma is None else gamma * self._favour

    @property
    def _favour(self) -> float:
        return float(_BIAS_BASE**-self.bias)

    def _gamma_between(
        self, content: str, style: str, layer: LayerNumbers, derived: Mapping[str, Any]
    ) -> float:
        if "gamma" in derived:
            gamma = derived["gamma"][layer.component]
            assert gamma is not None  # two deltas that are not zero have L1 norms above zero
            return float(gamma)
        sums = derived[f"{_L1}{layer.component}"]
        for slot in (content, style):
            if sums.get(slot, 0.0) <= 0.0:
                raise PairingError(
                    f"K-LoRA cannot weigh the LoRA {slot} in {layer.component}: over the layers "
                    "that all LoRAs adapt its deltas are zero, or there are none; leave one of "
                    "the LoRAs out, or take a rule of whole LoRAs (--rule direct)."
                )
        return float(sums[content] / sums[style] * self._favour)


def _l1_norms(layers: Mapping[str, LayerNumbers], component: str) -> dict[str, list[float]]:
    """Slot -> its L1 norm of each weight that all LoRAs adapt."""
    slots = next(iter(layers.values())).sides
    common = [
        layer
        for layer in layers.values()
        if layer.component == component and not layer.weight and layer.owners == tuple(slots)
    ]
    norms: dict[str, list[float]] = {slot: [] for slot in slots}
    for layer in common:
        for slot, own in norms.items():
            side = layer.sides[slot]
            assert side is not None
            assert side.l1 is not None
            own.append(side.l1)
    return norms


def _best(layer: LayerNumbers, role: str, derived: Mapping[str, Any]) -> str | None:
    """The slot of a role with the largest S / L1, the first of equal ones; None where none is."""
    own = {slot: side for slot, side in layer.present.items() if role_of(slot) == role}
    if len(own) < 2:
        return next(iter(own), None)
    sums = derived[f"{_L1}{layer.component}"]
    return max(own, key=lambda slot: _top_k(own[slot]) / sums[slot] if sums[slot] else math.inf)


def _top_k(side: Side) -> float:
    assert side.top_k is not None
    return side.top_k
