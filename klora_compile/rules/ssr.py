"""SSR-Merge: one merged delta that does to each LoRA's own inputs what that LoRA does alone.

Source: Wei et al., "Subspace Signal Routing for Training-Free LoRA Merging in Diffusion Models",
ICML 2026, arXiv 2606.10617. In one layer, the factors of all LoRAs stand one below the other:
A (rank, in) and B (out, rank). A base model with LoRA i alone shows the inputs X_i of the layer;
Z_i = A X_i. With E_i, which keeps the rows of LoRA i and sets all others to 0:

    G = sum of Z_i Z_i^T,  Q = sum of E_i Z_i Z_i^T,  R = Q (G + lambda I)^-1,  delta = B R A

So R solves the least squares of B R Z_i = B E_i Z_i over all i. Here each Z_i Z_i^T is a mean over
the columns of X_i, so LoRAs weigh the same, and lambda I is ``ridge`` times the diagonal of G.
``strength`` mixes R with the unit matrix, which is the plain sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from klora_compile.fields import Number, setting
from klora_compile.rules.kit.calibrated import Routing
from klora_compile.rules.kit.papers import Paper, preprint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Ssr(Routing):
    """SSR-Merge (arXiv 2606.10617): one slot, which the inputs of the layers determine."""

    name: ClassVar[str] = "ssr"
    title: ClassVar[str] = "SSR-Merge"
    sentence: ClassVar[str] = (
        "All are merged to one, which does to the inputs of each what that one does alone; a base "
        "model shows these inputs"
    )
    papers: ClassVar[tuple[Paper, ...]] = (
        preprint(
            "2606.10617",
            "wei2026ssr",
            "Subspace Signal Routing for Training-Free LoRA Merging in Diffusion Models",
            "Wei, Zhengxuan and Dong, Yi and Li, Zonghui and Lin, Xianhui and Liu, Xing and "
            "Gu, Hong and Zhang, Shaofeng and Li, Wenbin and Fan, Qi",
        ),
    )

    ridge: float = field(
        default=0.01,
        metadata=setting(
            "Lambda as a share of each signal's mean square; higher keeps less of all LoRAs.",
            Number(1e-9, 1e3),
        ),
    )
    strength: float = field(
        default=1.0,
        metadata=setting("Share of the merge: 1 is as published, 0 the plain sum.", Number(0, 1)),
    )

    def route(self, moments: Sequence[torch.Tensor], ranks: Sequence[int]) -> torch.Tensor:
        import torch

        whole = torch.stack(list(moments)).sum(0)
        own = torch.zeros_like(whole)
        start = 0
        for moment, rank in zip(moments, ranks, strict=True):
            own[start : start + rank] = moment[start : start + rank]
            start += rank
        unit = torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
        sizes = whole.diagonal()
        if not bool(sizes.any()):  # no input reaches a factor
            return unit
        # Signals differ in size, so the system is solved with each at size 1.
        scales = torch.where(sizes > 0, sizes, 1.0).sqrt()
        even = whole / scales[:, None] / scales
        own = own / scales[:, None] / scales
        solved: torch.Tensor = torch.linalg.solve(even + self.ridge * unit, own.T).T
        routed = scales[:, None] * solved / scales
        return self.strength * routed + (1.0 - self.strength) * unit

    def text(self) -> str:
        return f"ridge {float(self.ridge)!r}, strength {float(self.strength)!r}"
