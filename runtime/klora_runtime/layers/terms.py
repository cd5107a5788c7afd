"""What one slot adds to one parameter in mode merge, ready to be multiplied and added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from klora_runtime.artifact.delta import Dense, Factors
from klora_runtime.layers.shipping import shipped
from klora_runtime.layers.targets import Target


@dataclass
class LowRankTerm:
    """One slot of one layer, ready to multiply: delta = scale * up @ down."""

    slot: str
    scale: float
    down: torch.Tensor
    """(rank, in * kernel), float32, on the layer's device."""
    up: torch.Tensor
    """(out, rank), float32, on the layer's device."""

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def to(self, device: torch.device) -> None:
        self.down, self.up = self.down.to(device), self.up.to(device)

    def write(self, result: torch.Tensor, factor: float, base: torch.Tensor | None) -> None:
        """result = base + factor * delta, all (rows, -1); 0 where there is no base."""
        if base is None:
            torch.mm(self.up, self.down, out=result).mul_(factor)
        else:
            torch.addmm(base, self.up, self.down, alpha=factor, out=result)

    def add(self, result: torch.Tensor, factor: float) -> None:
        """result += factor * delta."""
        result.addmm_(self.up, self.down, alpha=factor)


@dataclass
class DenseTerm:
    """One slot of one layer whose delta is stored as it is: delta = scale * values."""

    slot: str
    scale: float
    values: torch.Tensor
    """(rows, -1), in the dtype of the file, on the layer's device."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def to(self, device: torch.device) -> None:
        self.values = self.values.to(device)

    def write(self, result: torch.Tensor, factor: float, base: torch.Tensor | None) -> None:
        """See :meth:`LowRankTerm.write`."""
        if base is None:
            result.copy_(self.values).mul_(factor)
        else:
            torch.add(base, self.values, alpha=factor, out=result)

    def add(self, result: torch.Tensor, factor: float) -> None:
        """See :meth:`LowRankTerm.add`."""
        result.add_(self.values, alpha=factor)


Term = LowRankTerm | DenseTerm


def terms_of(targets: Sequence[Target]) -> list[list[Term]]:
    """What the slots of each target add, on its parameter's device."""
    places: defaultdict[torch.device, list[Factors]] = defaultdict(list)
    for target in targets:
        stored = target.entry.acting.values()
        places[target.parameter.device] += [each for each in stored if isinstance(each, Factors)]
    matrices: dict[torch.device, Iterator[torch.Tensor]] = {
        device: iter(shipped([t for each in factors for t in each.tensors], device, torch.float32))
        for device, factors in places.items()
    }
    terms: list[list[Term]] = []
    for target in targets:
        device, own = target.parameter.device, list[Term]()
        for slot, factors in target.entry.acting.items():
            if isinstance(factors, Dense):
                values = factors.delta.to(device)
                own.append(DenseTerm(slot, factors.scale, values.reshape(len(values), -1)))
                continue
            down, up = (next(matrices[device]).flatten(1).contiguous() for _ in factors.tensors)
            own.append(LowRankTerm(slot, factors.scale, down, up))
        terms.append(own)
    return terms
