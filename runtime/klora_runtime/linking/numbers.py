"""The numbers of one LoRA that linking needs, an array for each kind, over its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from klora_runtime.lazy_torch import torch


class Place(NamedTuple):
    """One parameter of a pipeline that a LoRA changes."""

    component: str
    module: str
    parameter: str
    """``weight`` or ``bias``."""
    shape: tuple[int, ...]

    @property
    def path(self) -> tuple[str, str, str]:
        """Component, module and parameter."""
        return self[:3]


@dataclass(frozen=True, eq=False)
class Table:
    """The layers of a LoRA. LoRAs with the same layers share one table."""

    places: tuple[Place, ...]
    """Sorted by component, module and parameter."""

    @cached_property
    def index(self) -> Mapping[tuple[str, str, str], int]:
        """Path of a layer -> its number."""
        return {place.path: number for number, place in enumerate(self.places)}

    @cached_property
    def sizes(self) -> torch.Tensor:
        """(layers,) int64: number of elements."""
        return torch.tensor([math.prod(place.shape) for place in self.places])


@dataclass(frozen=True, eq=False)
class Ranks:
    """The rank of each layer. LoRAs with the same ranks share one."""

    values: tuple[int, ...]

    @cached_property
    def tensor(self) -> torch.Tensor:
        """(layers,) int64."""
        return torch.tensor(self.values)

    @cached_property
    def distinct(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted(set(self.values)))


@dataclass(frozen=True, eq=False)
class Numbers:
    """The numbers of one LoRA; all arrays are (layers,) float64, without the scaling."""

    table: Table
    ranks: Ranks
    scaling: torch.Tensor
    """alpha / rank."""
    norm: torch.Tensor
    """Frobenius norm from products of the factors, for rules that compare norms alone."""
    frobenius: torch.Tensor
    """Frobenius norm from the measurement that gave the sums."""
    l1: torch.Tensor
    """Sum of absolute values."""
    sums: Mapping[int, torch.Tensor]
    """Rank of a partner -> sums of the K largest absolute values, K = rank * partner's rank, at
    most all; for terms with a fixed K, that K -> sums."""

    def scale(self, ignores_alpha: bool) -> torch.Tensor:
        """Return the factor on each delta, (layers,)."""
        return torch.ones_like(self.scaling) if ignores_alpha else self.scaling
