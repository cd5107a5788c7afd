"""K-LoRA softened: both LoRAs act in a layer, and the one that K-LoRA would not choose acts less.

K-LoRA (:mod:`klora_compile.rules.klora`) compares rho with 1, where

    rho(t) = S_c / (gamma * S(t) * S_s)

Here the content acts with min(1, rho^p) and the style with min(1, rho^-p). So the LoRA that K-LoRA
chooses acts fully. p is the *sharpness*: with 0 both act fully, and the larger p is, the nearer is
the choice of one LoRA. Progress is cut into equal parts; each has the coefficients of its middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from klora_compile.fields import Number, Whole, setting
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import Choice, Segment
from klora_compile.rules.klora import Klora

#: Smaller coefficients are 0: no picture shows them, and a branch need not compute them.
_LEAST = 1e-4


@dataclass(frozen=True, kw_only=True)
class Soft(Klora):
    """K-LoRA with a weaker second LoRA instead of none, with K-LoRA's settings and two more."""

    name: ClassVar[str] = "soft"
    title: ClassVar[str] = "K-LoRA, softened"
    sentence: ClassVar[str] = (
        "In every layer of the denoiser, at every step of sampling, the one whose largest weights "
        "matter more acts fully, and the other one the less the more they differ"
    )
    fates: ClassVar[Mapping[str, str]] = {
        "softened": "both its LoRAs, the one that matters less at a smaller weight"
    }

    linkable: ClassVar[bool] = False

    sharpness: float = field(
        default=1.0,
        metadata=setting(
            "How much less the other LoRA acts: with 0 both act fully, and with large numbers one "
            "acts alone, as K-LoRA chooses.",
            Number(0.0, 100.0),
        ),
    )
    parts: int = field(
        default=8,
        metadata=setting("Parts of the sampling, each with weights of its own.", Whole(1, 64)),
    )

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        content, style = self.rivals(layer, derived)
        chosen = super().choose(layer, derived)
        if content is None or style is None or chosen.ratio is None:  # one role alone
            return Choice("softened", chosen.segments)
        segments: list[Segment] = []
        for part in range(self.parts):
            scale = self.inequality().scale((part + 0.5) / self.parts)
            kept_c, kept_s = self._weights(chosen.ratio, scale)
            segments.append((part / self.parts, {content: kept_c, style: kept_s}))
        return Choice("softened", tuple(segments), chosen.ratio)

    def range(self) -> None:
        """Return None: no layer switches at a ratio."""

    def text(self) -> str:
        return f"sharpness {self.sharpness:g} in {self.parts} parts, {super().text()}"

    def _weights(self, ratio: float, scale: float) -> tuple[float, float]:
        """Return the coefficients of content and style for rho = ratio / scale.

        Where S is 0 or below, K-LoRA chooses the content, however small it is.
        """
        if scale <= 0.0:
            return 1.0, float(self.sharpness == 0.0)
        rho = ratio / scale
        if rho >= 1.0:
            return 1.0, _kept(rho**-self.sharpness)
        return _kept(rho**self.sharpness), 1.0


def _kept(weight: float) -> float:
    return weight if weight >= _LEAST else 0.0
