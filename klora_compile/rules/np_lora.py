"""NP-LoRA: the content is projected off the input directions that the style uses.

Source: "NP-LoRA: Null Space Projection Unifies Subject and Style in LoRA Fusion", arXiv 2511.11051
(v3). With an orthonormal basis Q of the inputs that the style's delta reacts to:

    delta = delta_s + delta_c (I - mu / (1 + mu) Q Q^T)

mu = 0 is the direct sum; as mu grows, the content no longer changes the style's effect on its own
inputs. Q consists of the right singular vectors of delta_s whose singular values exceed 1e-6 of the
largest, so a zero style delta projects nothing. They are computed from the factors: QR of both,
then the SVD of a rank x rank matrix.

The projection changes the content's ``down`` only and keeps its rank. The result is a derived slot
beside the unchanged style. Biases, norms and text encoders are unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from klora_compile.fields import Number, setting
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import SUM, Choice, total
from klora_compile.rules.kit.papers import Paper, preprint
from klora_compile.rules.rule import Derived, LayerOfSlot, Rule
from klora_runtime.artifact.schedule import CONTENT, STEPLESS, STYLE

if TYPE_CHECKING:
    import torch

    from klora_runtime.artifact.delta import Delta

#: Singular values up to this share of the largest count as rounding.
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Projecting(Rule):
    """The base of rules that project the content slot off the style's input directions."""

    most: ClassVar[int | None] = 2

    mu: float = field(
        default=0.5,
        metadata=setting(
            "How far the content keeps off the style's input directions; 0: not at all.",
            Number(0.0, 1e6),
        ),
    )

    def derives(self, slots: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        return {CONTENT: (CONTENT, STYLE)}

    def derivation(self, slot: str) -> str | None:
        if slot != CONTENT:
            return None
        mu = float(self.mu)
        return f"denoiser projected off the style's input directions (NP-LoRA, mu = {mu!r})"

    def derive(self, slot: str, layers: Mapping[str, LayerOfSlot]) -> Derived:
        content, style = layers[CONTENT], layers[STYLE]
        multiplies = content.parameter == "weight" and len(content.shape) > 1
        if not multiplies or content.component in STEPLESS or style.scaling == 0.0:
            return Derived(content.delta)
        return Derived(project(content.delta, style.delta, self.mu))


@dataclass(frozen=True, kw_only=True)
class NpLora(Projecting):
    """NP-LoRA (arXiv 2511.11051): the sum of the projected content and the style."""

    name: ClassVar[str] = "np"
    title: ClassVar[str] = "NP-LoRA"
    sentence: ClassVar[str] = (
        "Both act at every step, the subject off the inputs that the style uses"
    )
    papers: ClassVar[tuple[Paper, ...]] = (
        preprint(
            "2511.11051",
            "chen2025nplora",
            "NP-LoRA: Null Space Projection Unifies Subject and Style in LoRA Fusion",
            "Chen, Chuheng and Zhou, Xiaofei and Zhang, Geyuan and Huang, Yong",
        ),
    )
    fates: ClassVar[Mapping[str, str]] = SUM

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        return total(layer.present)

    def text(self) -> str:
        return f"mu {self.mu:g}"


def project(content: Delta, style: Delta, mu: float) -> Delta:
    """Return delta_c (I - mu / (1 + mu) Q Q^T) in the form of ``content``, float32.

    Args:
        content: factors or a dense delta.
        style: a delta of the same shape.
        mu: 0 or more.
    """
    from klora_runtime.artifact.delta import Dense, LowRank

    basis = input_directions(style)
    share = mu / (1.0 + mu)

    def projected(rows: torch.Tensor) -> torch.Tensor:
        flat = rows.double().flatten(1)
        kept = flat - share * ((flat @ basis) @ basis.T)
        return kept.float().reshape(rows.shape)

    if isinstance(content, LowRank):
        return LowRank(projected(content.down), content.up)
    return Dense(projected(content.values))


def input_directions(delta: Delta) -> torch.Tensor:
    """Return an orthonormal basis of the inputs that a delta reacts to.

    Returns:
        (in, n), float64, with n up to the rank; for a convolution ``in`` includes the kernel.
    """
    parts = delta.singular()
    count = int((parts.values > _RANK_TOLERANCE * parts.values[0]).sum())
    return parts.right[:count].T
