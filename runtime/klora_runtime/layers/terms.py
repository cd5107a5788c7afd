"""Terms of mode merge: the delta of one slot, ready to be multiplied and added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from klora_runtime.artifact.delta import Delta, LowRank
from klora_runtime.layers.shipping import shipped
from klora_runtime.layers.targets import Target


@dataclass
class Term:
    """One slot of one layer: scale * delta."""

    slot: str
    scale: float
    delta: Delta
    """Flattened, on the layer's device; factors in float32, a dense delta in the file's dtype."""

    def to(self, device: torch.device) -> None:
        self.delta = self.delta.to(device)

    def write(self, result: torch.Tensor, factor: float, base: torch.Tensor | None) -> None:
        """Compute result = base + factor * delta, all (rows, -1); a base of None counts as 0."""
        delta = self.delta
        if isinstance(delta, LowRank):
            if base is None:
                torch.mm(delta.up, delta.down, out=result).mul_(factor)
            else:
                torch.addmm(base, delta.up, delta.down, alpha=factor, out=result)
        elif base is None:
            result.copy_(delta.values).mul_(factor)
        else:
            torch.add(base, delta.values, alpha=factor, out=result)

    def add(self, result: torch.Tensor, factor: float) -> None:
        """Compute result += factor * delta."""
        if isinstance(self.delta, LowRank):
            result.addmm_(self.delta.up, self.delta.down, alpha=factor)
        else:
            result.add_(self.delta.values, alpha=factor)


def terms_of(targets: Sequence[Target]) -> list[list[Term]]:
    """Return the terms of each target, on its parameter's device."""
    places: defaultdict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for target in targets:
        for stored in target.entry.acting.values():
            if isinstance(stored.delta, LowRank):
                places[target.origin.device] += stored.delta.tensors
    factors: dict[torch.device, Iterator[torch.Tensor]] = {
        device: iter(shipped(tensors, device, torch.float32)) for device, tensors in places.items()
    }
    terms: list[list[Term]] = []
    for target in targets:
        device, own = target.origin.device, list[Term]()
        for slot, stored in target.entry.acting.items():
            delta = stored.delta
            if isinstance(delta, LowRank):
                down, up = (next(factors[device]).flatten(1).contiguous() for _ in delta.tensors)
                own.append(Term(slot, stored.scale, LowRank(down, up)))
            else:
                own.append(Term(slot, stored.scale, delta.flattened().to(device)))
        terms.append(own)
    return terms
