"""The inequality by which one of two LoRAs acts in a layer, evaluated literally in float64.

With progress t in [0, 1), the sizes S_c and S_s of the two deltas, and constants of a rule:

    S(t)  = alpha * t + beta - less            (pattern ``s``)
    S*(t) = (alpha * t + beta) mod alpha       (pattern ``s*``)
    content where  S_c >= gamma * S(t) * S_s,  else style

These are K-LoRA's (arXiv 2502.18461, eq. 6, 7, 10 and 12), with ``less`` 0. The order of the
operations is a part of the definition: :meth:`Inequality.timeline` gives the smallest float64
progress at which the line above changes its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from klora_runtime.linking.breakpoints import LAST_PROGRESS, WHOLE, first_where, switches

Pattern = Literal["s", "s*"]
Tie = Literal["content", "style"]


@dataclass(frozen=True)
class Inequality:
    """The inequality with its constants."""

    pattern: Pattern = "s"
    alpha: float = 1.5
    """Slope of S over progress; for ``s*`` also the modulus, which must be above 0."""
    beta: float = 0.5
    """S at progress 0."""
    tie: Tie = "content"
    """The choice if both sides of the inequality are equal."""
    less: float = 0.0
    """Subtracted from the line of pattern ``s``, after beta was added."""

    def scale(self, t: float) -> float:
        """Return S(t) or S*(t), the factor on the style's sum at progress t in [0, 1)."""
        line = self.alpha * t + self.beta
        return line % self.alpha if self.pattern == "s*" else line - self.less

    def chooses_content(self, s_c: float, s_s: float, gamma: float, t: float) -> bool:
        """Return the literal choice at progress t: eq. 6 with S_s scaled by eq. 8 and 10."""
        scaled = gamma * self.scale(t) * s_s
        return s_c >= scaled if self.tie == "content" else s_c > scaled

    def timeline(self, s_c: float, s_s: float, gamma: float) -> list[tuple[float, bool]]:
        """Return each segment as (start, whether content acts); the first start is 0."""

        def content(t: float) -> bool:
            return self.chooses_content(s_c, s_s, gamma, t)

        return switches(content, self.pieces())

    def range(self) -> tuple[float, float]:
        """Return infimum and supremum of S over progress."""
        if self.pattern == "s*":
            return 0.0, self.alpha
        ends = self.beta - self.less, self.alpha + self.beta - self.less
        return min(ends), max(ends)

    def pieces(self) -> Sequence[tuple[float, float]]:
        """Return first and last progress of each piece of [0, 1) in which S is monotone."""
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
