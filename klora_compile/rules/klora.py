"""K-LoRA: in each layer at each step, the LoRA whose largest weights matter more.

Source: Ouyang, Li, Hou, "K-LoRA: Unlocking Training-Free Fusion of Any Subject and Style LoRAs",
CVPR 2025, arXiv 2502.18461; equation numbers are the paper's. With progress t in [0, 1) and the
sums S_c and S_s of the K largest absolute values of the two deltas:

    S(t)  = alpha * t + beta                                      (eq. 7,  pattern ``s``)
    S*(t) = (alpha * t + beta) mod alpha                          (eq. 12, pattern ``s*``)
    gamma = sum over layers of L1_c / sum over layers of L1_s     (eq. 8-9)
    content where  S_c >= gamma * S(t) * S_s,  else style         (eq. 6, 10)

Nothing here depends on the prompt, the seed or the number of steps, so :meth:`Inequality.timeline`
gives the whole choice of a layer as a few breakpoints. Each is the smallest float64 progress at
which the inequality above, evaluated literally in float64, changes its value.

More than two LoRAs: divided by L1_c, the inequality compares S_c / L1_c with S(t) * S_s / L1_s. So
each LoRA has its own score, S(t) multiplies the scores of all styles, and the largest wins: a duel
of the best content and the best style. K is the product of the two largest ranks of the layer; the
L1 sums are over the layers that all LoRAs adapt. For two LoRAs this equals the paper's rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, get_args

from klora_compile.fields import Number, Whole, Word, setting
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.kit.outcomes import DUEL, Choice, duel
from klora_compile.rules.kit.papers import Paper
from klora_compile.rules.rule import EVERY_LAYER, Rule
from klora_compile.slots import role_of
from klora_runtime.artifact.schedule import CONTENT, STYLE
from klora_runtime.errors import PairingError
from klora_runtime.linking.gamma import gamma_of_ratios, gamma_of_sums
from klora_runtime.linking.inequality import Inequality, Pattern, Tie
from klora_runtime.linking.terms import Duel, GammaRule

Semantics = Literal["paper", "authors"]

#: beta of pattern ``s*`` in the authors' code, as a share of alpha; the paper states 1.3.
_AUTHORS_WRAPPED_SHARE = 0.85

#: gamma is multiplied by this to the power of minus the bias.
_BIAS_BASE = 4.0

#: Prefix of a component's name in an artifact: the L1 sums of more than two LoRAs.
_L1 = "l1."


@dataclass(frozen=True, kw_only=True)
class Klora(Rule):
    """K-LoRA (arXiv 2502.18461, eq. 1-12); the semantics decide settings that are None."""

    name: ClassVar[str] = "klora"
    title: ClassVar[str] = "K-LoRA"
    sentence: ClassVar[str] = f"{EVERY_LAYER} whose largest weights matter more"
    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Ouyang et al., CVPR 2025, arXiv:2502.18461",
            "https://arxiv.org/abs/2502.18461",
            """@inproceedings{ouyang2025klora,
  title     = {K-LoRA: Unlocking Training-Free Fusion of Any Subject and Style LoRAs},
  author    = {Ouyang, Ziheng and Li, Zhen and Hou, Qibin},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern
               Recognition (CVPR)},
  year      = {2025}
}""",
        ),
    )
    fates: ClassVar[Mapping[str, str]] = DUEL
    needs: ClassVar[tuple[str, ...]] = ("l1", "top_k")
    ratio_formula: ClassVar[str] = r"$S_c\,/\,(\gamma\,S_s)$"
    linkable: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("bias",)

    semantics: Semantics = field(
        default="paper",
        metadata=setting(
            "K-LoRA as published, or as its authors' code computes it: its gamma, its offset of "
            "s*, ties to the style, the network alpha ignored.",
            Word(get_args(Semantics)),
        ),
    )
    pattern: Pattern = field(
        default="s",
        metadata=setting(
            "How S, the weight of the style, moves. s rises once: content early, style late. s* "
            "starts high, drops to 0 and rises again: style, content, style; suggested for FLUX.",
            Word(get_args(Pattern)),
        ),
    )
    alpha: float | None = field(
        default=None,
        metadata=setting(
            "Slope of S over progress. For s* it is also the modulus, and above 0.",
            Number(-100.0, 100.0),
            default="1.5",
        ),
    )
    beta: float | None = field(
        default=None,
        metadata=setting(
            "S at progress 0, for s* 0 or more; higher favours style.",
            Number(-100.0, 100.0),
            default="0.5; for s* 1.3, or 0.85 * alpha under the authors' semantics",
        ),
    )
    gamma: GammaRule | float | None = field(
        default=None,
        metadata=setting(
            "Balance of the LoRAs' magnitudes: the ratio of sums (paper), the mean of ratios "
            "without outliers (code), or a number; higher favours style.",
            Number(1e-12, 1e12, get_args(GammaRule)),
            default="as the semantics",
        ),
    )
    bias: float = field(
        default=0.0,
        metadata=setting("Multiplies gamma by 4**-bias: above 0 favours content.", Number(-1, 1)),
    )
    top_k: int | None = field(
        default=None,
        metadata=setting(
            "How many of a layer's largest weights count; auto is the product of its two (largest) "
            "ranks.",
            Whole(1),
            unset="auto",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == "s*":
            if self.alpha is not None:
                Number(1e-3, 100.0).check("alpha", self.alpha)
            if self.beta is not None:
                Number(0.0, 100.0).check("beta", self.beta)

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
            "tie": "style" if authors else "content",
            "network_alpha": "ignored" if authors else "applied",
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        rule = super().from_parameters(parameters)
        for name in ("alpha", "beta", "gamma"):  # defaults depend on other settings
            unset: dict[str, Any] = {name: None}
            free = replace(rule, **unset)
            if free.parameters() == rule.parameters():
                rule = free
        return rule

    def inequality(self) -> Inequality:
        """Return the inequality with the constants of these settings."""
        own = self.parameters()
        tie: Tie = own["tie"]
        return Inequality(self.pattern, own["alpha"], own["beta"], tie)

    def duel(self) -> Duel:
        gamma = self.parameters()["gamma"]
        return Duel(self.inequality(), "top_k", gamma, self._favour, self.top_k)

    def misfit(self, slots: Sequence[str]) -> str | None:
        gamma = self.parameters()["gamma"]
        if len(slots) == 2 or gamma == "paper":
            return None
        return (
            f"gamma: expected paper for more than two LoRAs, found {gamma!r}. Each LoRA is then "
            "weighed by its own sum; leave out gamma, and semantics if it is authors."
        )

    def count(self, ranks: Sequence[int], numel: int) -> int | None:
        largest = sorted(ranks)[-2:]
        return min(math.prod(largest) if self.top_k is None else self.top_k, numel)

    def weigh(self, layers: Mapping[str, LayerNumbers]) -> dict[str, Any]:
        """Return gamma per component; for more than two LoRAs, the L1 sum of each (eq. 9)."""
        components = sorted({n.component for n in layers.values() if not n.is_stepless})
        sums = {component: _l1_norms(layers, component) for component in components}
        if any(len(norms) > 2 for norms in sums.values()):
            return {
                f"{_L1}{component}": {slot: math.fsum(norms) for slot, norms in by_slot.items()}
                for component, by_slot in sums.items()
            }
        return {"gamma": {component: self._gamma(*sums[component].values()) for component in sums}}

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        content, style = self.rivals(layer, derived)
        if content is None or style is None:
            only = content or style
            assert only is not None
            return Choice(f"always {role_of(only)}", ((0.0, {only: 1.0}),))
        gamma = self._gamma_between(content, style, layer, derived)
        present = layer.present
        s_c, s_s = _top_k(present[content]), _top_k(present[style])
        choices = self.inequality().timeline(s_c, s_s, gamma)
        return duel(content, style, choices, s_c / (gamma * s_s))

    def rivals(
        self, layer: LayerNumbers, derived: Mapping[str, Any]
    ) -> tuple[str | None, str | None]:
        """Return the slots of the content and of the style that compete for a layer, if any.

        Args:
            layer: a layer of the denoiser.
            derived: the result of :meth:`weigh`.
        """
        return _best(layer, CONTENT, derived), _best(layer, STYLE, derived)

    def range(self) -> tuple[float, float] | None:
        return self.inequality().range()

    def text(self) -> str:
        own = self.parameters()
        parts = [f"pattern {self.pattern}", f"{self.semantics} semantics"]
        parts += [f"{name} {own[name]:g}" for name in ("alpha", "beta", "bias") if name in own]
        return ", ".join(parts)

    def _gamma(self, l1_c: Sequence[float], l1_s: Sequence[float]) -> float | None:
        """Return gamma of one component, with the bias applied; None if it is undefined."""
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
            if not gamma or not math.isfinite(gamma):  # such as where they share a bias alone
                raise PairingError(
                    f"gamma is undefined in {layer.component}: the deltas of one LoRA are zero in "
                    "all weights that both change, and both change a bias. Leave one of them out, "
                    "state gamma, or use a rule that compares nothing."
                )
            return float(gamma)
        sums = derived[f"{_L1}{layer.component}"]
        for slot in (content, style):
            if sums.get(slot, 0.0) <= 0.0:
                raise PairingError(
                    f"gamma is undefined for the LoRA {slot} in {layer.component}: its deltas "
                    "are zero in the layers that all LoRAs share, or no layer is shared. "
                    "Leave one of the LoRAs out, or use a rule that compares nothing."
                )
        return float(sums[content] / sums[style] * self._favour)


def _l1_norms(layers: Mapping[str, LayerNumbers], component: str) -> dict[str, list[float]]:
    """Return slot -> L1 norm of each weight that all LoRAs adapt."""
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
    """Return the slot of a role with the largest S / L1, the first of equals; or None."""
    own = {slot: side for slot, side in layer.present.items() if role_of(slot) == role}
    if len(own) < 2:
        return next(iter(own), None)
    sums = derived[f"{_L1}{layer.component}"]
    return max(own, key=lambda slot: _top_k(own[slot]) / sums[slot] if sums[slot] else math.inf)


def _top_k(side: Side) -> float:
    assert side.top_k is not None
    return side.top_k
