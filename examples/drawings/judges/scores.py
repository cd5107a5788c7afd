"""The arithmetic of the judges, without networks or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Discriminant:
    """Fisher's linear discriminant: features reduced to what distinguishes groups.

    Features are standardised, whitened by the within-group covariance, and projected onto the space
    of the groups' means. There, drawings of different groups have a cosine near 0.
    """

    mean: Tensor
    """(features,)."""
    deviation: Tensor
    """(features,)."""
    projection: Tensor
    """(features, dimensions)."""

    @classmethod
    def fit(
        cls, features: Tensor, groups: Sequence[str], *, components: int = 100, shrink: float = 0.1
    ) -> Discriminant:
        """Learn from drawings of known groups.

        Args:
            features: (drawings, features).
            groups: one name per drawing; at least two names.
            components: number of principal components to keep.
            shrink: share of the within-group covariance replaced by a multiple of the identity.
        """
        mean, deviation = features.mean(0), features.std(0)
        deviation = deviation.clamp(min=1e-6 * float(deviation.max()))
        standard = (features - mean) / deviation
        axes = torch.linalg.svd(standard, full_matrices=False).Vh[:components].T
        reduced = standard @ axes
        names = sorted(set(groups))
        members = torch.tensor([names.index(group) for group in groups])
        means = torch.stack([reduced[members == index].mean(0) for index in range(len(names))])
        apart = reduced - means[members]
        within = apart.T @ apart / len(apart)
        level = torch.eye(len(within)) * within.diagonal().mean()
        values, vectors = torch.linalg.eigh((1 - shrink) * within + shrink * level)
        whitening = vectors / values.sqrt()
        centred = (means - means.mean(0)) @ whitening
        between = torch.linalg.svd(centred, full_matrices=False).Vh[: len(names) - 1].T
        return cls(mean, deviation, axes @ whitening @ between)

    def __call__(self, features: Tensor) -> Tensor:
        """Return (pictures, dimensions) of length 1, whose products are cosines."""
        seen = (features - self.mean) / self.deviation @ self.projection
        return seen / seen.norm(dim=1, keepdim=True).clamp(min=1e-10)


def separation(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Return the chance that a right pair scores above a wrong one (AUC); 0.5 is chance."""
    higher = np.asarray(right)[:, None] - np.asarray(wrong)[None, :]
    return float((higher > 0).mean() + (higher == 0).mean() / 2)
