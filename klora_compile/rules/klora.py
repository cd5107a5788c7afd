"""K-LoRA: in each layer at each step, the LoRA whose largest weights matter more.

Source: Ouyang, Li, Hou, "K-LoRA: Unlocking Training-Free Fusion of Any Subject and Style LoRAs",
CVPR 2025, arXiv 2502.18461; equation numbers are those of the paper. With t the progress in
[0, 1), S_c and S_s the sums of the K largest absolute values of the two deltas:

    S(t)  = alpha * t + beta                                      (eq. 7,  pattern ``s``)
    S*(t) = (alpha * t + beta) mod alpha                          (eq. 12, pattern ``s*``)
    gamma = sum over layers of L1_c / sum over layers of L1_s     (eq. 8-9)
    content where  S_c >= gamma * S(t) * S_s,  else style         (eq. 6, 10)

Nothing here depends on the prompt, the seed or the number of steps, so :meth:`Klora.timeline`
states the whole choice of a layer as one or a few breakpoints. Each is the smallest float64
progress at which the inequality above, evaluated literally in float64, changes its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from klora_compile.rules.kit.breakpoints import LAST_PROGRESS, WHOLE, first_where, switches

Pattern = Literal["s", "s*"]
Tie = Literal["content", "style"]

#: In the authors' code a layer whose ratio is this many times the mean does not count for gamma.
_OUTLIER = 3.0


@dataclass(frozen=True)
class Klora:
    """The inequality with its constants."""

    pattern: Pattern = "s"
    alpha: float = 1.5
    """Slope of S over progress; for ``s*`` also the modulus, and then above 0."""
    beta: float = 0.5
    """S at progress 0."""
    tie: Tie = "content"
    """Who is chosen where both sides of the inequality are equal."""

    def scale(self, t: float) -> float:
        """S(t) or S*(t): how much heavier the style counts at progress t in [0, 1)."""
        line = self.alpha * t + self.beta
        return line % self.alpha if self.pattern == "s*" else line

    def chooses_content(self, s_c: float, s_s: float, gamma: float, t: float) -> bool:
        """The literal choice at progress t: eq. 6 with S_s scaled as in eq. 8 and 10."""
        scaled = gamma * self.scale(t) * s_s
        return s_c >= scaled if self.tie == "content" else s_c > scaled

    def timeline(self, s_c: float, s_s: float, gamma: float) -> list[tuple[float, bool]]:
        """Every start of a segment with whether content acts in it; the first start is 0."""

        def content(t: float) -> bool:
            return self.chooses_content(s_c, s_s, gamma, t)

        return switches(content, self._monotone_pieces())

    def range(self) -> tuple[float, float]:
        """Infimum and supremum of S over progress."""
        if self.pattern == "s*":
            return 0.0, self.alpha
        ends = self.beta, self.alpha + self.beta
        return min(ends), max(ends)

    def _monotone_pieces(self) -> Sequence[tuple[float, float]]:
        """First and last progress of each piece of [0, 1) in which S is monotone."""
        if self.pattern == "s":
            return WHOLE

        def turns(t: float) -> int:
            line = self.alpha * t + self.beta
            return round((line - line % self.alpha) / self.alpha)

        def turned(before: int, t: float) -> bool:
            return turns(t) != before

        pieces, start = [], 0.0
        while turns(start) != turns(LAST_PROGRESS):
            here = turns(start)
            wrap = first_where(partial(turned, here), start, LAST_PROGRESS)
            pieces.append((start, math.nextafter(wrap, 0.0)))
            start = wrap
        pieces.append((start, LAST_PROGRESS))
        return pieces


def gamma_of_sums(l1_c: Sequence[float], l1_s: Sequence[float]) -> float | None:
    """gamma as the paper states it (eq. 9): ratio of the sums of L1 norms.

    Args:
        l1_c: L1 norm of each content delta, over the layers that both LoRAs adapt.
        l1_s: the same of the style deltas.

    Returns:
        None where it is undefined: no layers, or all style deltas are zero.
    """
    style = math.fsum(l1_s)
    return math.fsum(l1_c) / style if style > 0 else None


def gamma_of_ratios(l1_c: Sequence[float], l1_s: Sequence[float]) -> float | None:
    """gamma as the authors' code computes it: mean of per-layer ratios, large ones dropped.

    Layers whose style delta is zero have no ratio. Ratios of at least three times the mean are
    dropped and the mean is taken again.
    """
    ratios = [c / s for c, s in zip(l1_c, l1_s, strict=True) if s > 0]
    if not ratios:
        return None
    mean = math.fsum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < _OUTLIER * mean] or ratios
    return math.fsum(kept) / len(kept)
