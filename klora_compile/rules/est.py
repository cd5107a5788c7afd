"""EST-LoRA: in each layer at each step, the LoRA with more energy.

Source: EST-LoRA, arXiv 2508.02165. With t the progress in [0, 1), E the energy of a delta (the
sum of its squares) and d the discrepancy of the style, one number for the pair:

    E = ||delta||_F^2 = scaling^2 * tr((up^T up) (down down^T))
    content where  E_c >= (alpha * t + 1 - d) * E_s,  else style

The energy needs products of rank x rank only; no delta is multiplied out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from klora_compile.rules.kit.breakpoints import switches
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.ranges import require_number
from klora_compile.rules.rule import Choice, Rule
from klora_compile.slots import CONTENT, STYLE


@dataclass(frozen=True)
class EstRule(Rule):
    """EST-LoRA's settings."""

    name: ClassVar[str] = "est"
    needs: ClassVar[tuple[str, ...]] = ("frobenius",)
    ratio_formula: ClassVar[str] = "$E_c\\,/\\,E_s$"
    most: ClassVar[int | None] = 2
    fates: ClassVar[tuple[str, ...]] = ("always content", "always style", "switching")

    alpha: float = 1.5
    """Slope of the threshold over progress, -100 to 100."""
    d: float = 0.5
    """The style discrepancy, 0 to 2 (one minus a cosine); higher favours content. It is measured
    on sample pictures, which a compiler has not: at the default the threshold runs from 0.5 to 2,
    as K-LoRA's S does."""

    def __post_init__(self) -> None:
        """Check the settings."""
        require_number("alpha", self.alpha, -100.0, 100.0)
        require_number("d", self.d, 0.0, 2.0)

    def parameters(self) -> dict[str, Any]:
        return {"alpha": float(self.alpha), "d": float(self.d)}

    def threshold(self, t: float) -> float:
        """How much more energy than the style the content needs at progress t in [0, 1)."""
        return self.alpha * t + 1.0 - self.d

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        present = layer.present
        e_c, e_s = _energy(present[CONTENT]), _energy(present[STYLE])
        choices = switches(lambda t: e_c >= self.threshold(t) * e_s)
        fate = "switching"
        if len(choices) == 1:
            fate = "always content" if choices[0][1] else "always style"
        segments = tuple((start, {CONTENT if c else STYLE: 1.0}) for start, c in choices)
        return Choice(fate, segments, e_c / e_s if e_s else None)

    def range(self) -> tuple[float, float] | None:
        ends = 1.0 - self.d, self.alpha + 1.0 - self.d
        return min(ends), max(ends)

    def text(self) -> str:
        return f"alpha {self.alpha:g}, d {self.d:g}"


def _energy(side: Side) -> float:
    assert side.frobenius is not None
    return side.frobenius * side.frobenius
