"""TIES: small numbers are trimmed, a sign is elected, and the numbers of that sign are averaged.

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv 2306.01708, algorithm 1. For each number of a layer and LoRAs t with deltas tau_t:

    tau_t   keeps its largest values by magnitude, a share *density* of each layer
    gamma   = sgn(sum over t of tau_t)
    merged  = scale * mean over those t whose sgn(tau_t) = gamma

The paper trims over all layers together; here each layer is trimmed alone, as other tools do. The
weights of LoRAs are applied before the signs are elected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from klora_compile.fields import Number, setting
from klora_compile.rules.kit.merging import Merging, elected
from klora_compile.rules.kit.papers import Paper, preprint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Ties(Merging):
    """TIES (arXiv 2306.01708): the mean of large numbers of the elected sign, in one slot."""

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES"
    sentence: ClassVar[str] = (
        "All are merged to one: where their large numbers differ in sign, the stronger sign stays"
    )
    papers: ClassVar[tuple[Paper, ...]] = (
        preprint(
            "2306.01708",
            "yadav2023ties",
            "TIES-Merging: Resolving Interference When Merging Models",
            "Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit",
        ),
    )

    density: float = field(
        default=0.5,
        metadata=setting(
            "Share of each delta's numbers that is kept; the paper keeps 0.2.", Number(1e-6, 1.0)
        ),
    )

    def merge(self, layer: str, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return elected([trimmed(delta, self.density) for delta in deltas.values()])


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Return a delta with its largest numbers alone, and zeros.

    Args:
        delta: of any shape, float32 on the CPU.
        density: share of numbers that stays, above 0; at least one stays, and all that are as
            large as the smallest of them.
    """
    import numpy as np
    import torch

    sizes = delta.abs()
    kept = max(1, round(density * sizes.numel()))
    least = np.partition(sizes.flatten().numpy(), sizes.numel() - kept)[sizes.numel() - kept]
    return torch.where(sizes >= float(least), delta, 0.0)
