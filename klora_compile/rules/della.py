"""DELLA: small numbers are dropped more often than large ones, then a sign is elected.

Source: Deep, Bhardwaj, Poria, "DELLA-Merging: Reducing Interference in Model Merging through
Magnitude-Based Sampling", arXiv 2406.11617: MAGPRUNE, elect, fuse. In each row of a delta of n
columns, r_i is the rank of number i by magnitude: how many others are larger.

    p_i    = p - epsilon / 2 + (epsilon / n) * r_i
    m_i ~ Bernoulli(p_i),  delta_i becomes (1 - m_i) * delta_i / (1 - p_i)
    merged = scale * mean over the LoRAs whose sign is that of their sum

The draws are those of :mod:`klora_compile.rules.dare`, the election is that of
:mod:`klora_compile.rules.ties`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from klora_compile.fields import Number, setting
from klora_compile.rules.dare import Dropping
from klora_compile.rules.kit.merging import elected
from klora_compile.rules.kit.papers import Paper, preprint
from klora_runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Della(Dropping):
    """DELLA (arXiv 2406.11617): numbers dropped by their magnitude, then TIES' election."""

    name: ClassVar[str] = "della"
    title: ClassVar[str] = "DELLA"
    sentence: ClassVar[str] = (
        "All are merged to one: small numbers of each are dropped more often than large ones, and "
        "where they differ in sign, the stronger sign stays"
    )
    papers: ClassVar[tuple[Paper, ...]] = (
        preprint(
            "2406.11617",
            "deep2024della",
            "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based "
            "Sampling",
            "Deep, Pala Tej and Bhardwaj, Rishabh and Poria, Soujanya",
        ),
    )

    drop: float = field(
        default=0.5,
        metadata=setting("Mean probability that a number is dropped.", Number(0.0, 0.999)),
    )
    epsilon: float = field(
        default=0.2,
        metadata=setting(
            "How much likelier the smallest number of a row is dropped than the largest one.",
            Number(0.0, 1.0),
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least, most = self.drop - self.epsilon / 2, self.drop + self.epsilon / 2
        if least < 0.0 or most >= 1.0:
            raise ConfigError(
                f"epsilon: with drop {self.drop:g}, numbers would be dropped with probabilities "
                f"from {least:g} to {most:g}; set epsilon to 0, or below "
                f"{2 * min(self.drop, 1 - self.drop):g}."
            )

    def merge(self, layer: str, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return elected(
            [
                self.drop_at_random(layer, slot, delta, self.probabilities(delta))
                for slot, delta in deltas.items()
            ]
        )

    def probabilities(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the probability of each number to be dropped, float64.

        Args:
            delta: (out, inner), float32 on the CPU.
        """
        import numpy as np
        import torch

        sizes = delta.abs()
        ascending = torch.from_numpy(np.sort(sizes.numpy(), axis=1))
        ranks = delta.shape[1] - torch.searchsorted(ascending, sizes, right=True)
        least = self.drop - self.epsilon / 2
        return least + self.epsilon / delta.shape[1] * ranks.double()
