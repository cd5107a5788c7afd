"""EST-LoRA: in each layer at each step, the LoRA with more energy.

Source: EST-LoRA, arXiv 2508.02165. With progress t in [0, 1), the energy E of a delta (the sum of
its squares) and the discrepancy d of the style (one number for the pair):

    E = ||delta||_F^2 = scaling^2 * tr((up^T up) (down down^T))
    content where  E_c >= (alpha * t + 1 - d) * E_s,  else style

The energy needs products of rank x rank only; no delta is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from klora_compile.fields import Number, setting
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.kit.outcomes import DUEL, Choice, duel
from klora_compile.rules.kit.papers import Paper, preprint
from klora_compile.rules.rule import EVERY_LAYER, Rule
from klora_runtime.artifact.schedule import CONTENT, STYLE
from klora_runtime.linking.inequality import Inequality
from klora_runtime.linking.terms import Duel


@dataclass(frozen=True, kw_only=True)
class Est(Rule):
    """EST-LoRA (arXiv 2508.02165): the LoRA with more energy acts."""

    name: ClassVar[str] = "est"
    title: ClassVar[str] = "EST-LoRA"
    sentence: ClassVar[str] = f"{EVERY_LAYER} whose delta has more energy"
    papers: ClassVar[tuple[Paper, ...]] = (preprint("2508.02165", "estlora2025", "EST-LoRA"),)
    fates: ClassVar[Mapping[str, str]] = DUEL
    needs: ClassVar[tuple[str, ...]] = ("frobenius",)
    most: ClassVar[int | None] = 2
    linkable: ClassVar[bool] = True
    ratio_formula: ClassVar[str] = "$E_c\\,/\\,E_s$"

    alpha: float = field(
        default=1.5,
        metadata=setting("Slope of the threshold over progress.", Number(-100.0, 100.0)),
    )
    d: float = field(
        default=0.5,
        metadata=setting("Discrepancy of the style; higher favours content.", Number(0.0, 2.0)),
    )
    """One minus a cosine. The paper measures it on sample pictures, which a compiler does not have.
        With the default, the threshold goes from 0.5 to 2, like K-LoRA's S."""

    def inequality(self) -> Inequality:
        """Return the inequality of energies with the constants of these settings."""
        return Inequality("s", self.alpha, 1.0, "content", less=self.d)

    def duel(self) -> Duel:
        return Duel(self.inequality(), "energy", gamma=1.0)

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        present = layer.present
        e_c, e_s = _energy(present[CONTENT]), _energy(present[STYLE])
        choices = self.inequality().timeline(e_c, e_s, 1.0)
        return duel(CONTENT, STYLE, choices, e_c / e_s if e_s else None)

    def range(self) -> tuple[float, float] | None:
        return self.inequality().range()

    def text(self) -> str:
        return f"alpha {self.alpha:g}, d {self.d:g}"


def _energy(side: Side) -> float:
    assert side.frobenius is not None
    return side.frobenius * side.frobenius
