"""Groups: layers of one shape on a GPU that a few batched calls write together.

A switch of a large model is hundreds of small products; launched one by one, most of the time is
launch overhead. A group keeps the factors of its layers side by side, so that one batched product
computes many deltas in float32 and one batched copy writes them to the live weights. On a CPU a
launch costs nothing, and it is faster to write each matrix while it is in the cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from klora_runtime.artifact.delta import LowRank
from klora_runtime.layers.terms import Term

#: Bytes of float32 deltas that are computed at once: the size of a large GPU's cache.
BATCH_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Write:
    """A weight to write: live = base + sum of factor * term."""

    live: torch.Tensor
    base: torch.Tensor
    """The pristine weight, of the same shape, dtype and device."""
    factors: Sequence[tuple[Term, float]]
    is_kept: bool = True
    """Whether the pristine weight stays in its memory after the write was started."""


class Group:
    """Layers of one shape, dtype and device that have low-rank terms only.

    Args:
        layers: the terms of each layer; their factors become views of the group's memory.
    """

    def __init__(self, layers: Sequence[Sequence[Term]]) -> None:
        first = _factors(layers[0][0])
        rank = max(sum(_factors(term).rank for term in terms) for terms in layers)
        size = len(layers)
        self._up = first.up.new_zeros(size, first.up.shape[0], rank)
        self._down = first.down.new_zeros(size, rank, first.down.shape[1])
        self._place: dict[int, tuple[int, int, int]] = {}  # id of a term -> layer, first rank, end
        sources: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        for index, terms in enumerate(layers):
            end = 0
            for term in terms:
                delta = _factors(term)
                begin, end = end, end + delta.rank
                self._place[id(term)] = (index, begin, end)
                own = LowRank(self._down[index, begin:end], self._up[index, :, begin:end])
                sources += delta.tensors
                places += own.tensors
                term.delta = own
        torch._foreach_copy_(places, sources)

    def write(
        self, writes: Sequence[Write], scratch: Callable[[int, torch.device], torch.Tensor]
    ) -> None:
        """Write some of the group's layers.

        Args:
            scratch: returns a buffer of the given number of float32 elements on a device.
        """
        gates, numel, at_once = self._gates(writes), self._numel, self._at_once
        for begin in range(0, len(writes), at_once):
            some = writes[begin : begin + at_once]
            layers = [self._place[id(write.factors[0][0])][0] for write in some]
            held = scratch(len(some) * numel, self._up.device).view(
                len(some), *self._up.shape[1:2], -1
            )
            parts = [part.view(some[0].live.shape) for part in held.unbind()]
            torch._foreach_copy_(parts, [write.base for write in some])
            up = torch.stack([self._up[layer] for layer in layers])
            up *= gates[begin : begin + at_once, None]
            held.baddbmm_(up, torch.stack([self._down[layer] for layer in layers]))
            torch._foreach_copy_([write.live for write in some], parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, padding included."""
        return self._up.nbytes + self._down.nbytes

    @property
    def scratch_numel(self) -> int:
        """The greatest number of elements that :meth:`write` asks for."""
        return self._numel * min(len(self._up), self._at_once)

    @property
    def _numel(self) -> int:
        return self._up.shape[1] * self._down.shape[2]

    @property
    def _at_once(self) -> int:
        return max(1, BATCH_BYTES // (4 * self._numel))

    def _gates(self, writes: Sequence[Write]) -> torch.Tensor:
        """Return the factor of each rank of each layer, (layers, rank)."""
        gates = torch.zeros(len(writes), self._up.shape[2])
        for row, write in zip(gates, writes, strict=True):
            for term, factor in write.factors:
                _, begin, end = self._place[id(term)]
                row[begin:end] = factor
        return gates.to(self._up.device, non_blocking=True)


def groups_of(
    layers: Mapping[int, tuple[torch.Tensor, Sequence[Term]]],
) -> Iterator[tuple[Group, list[int]]]:
    """Yield groups and the keys of their layers; a layer without a match is in no group.

    Args:
        layers: key -> the live weight and the terms of a layer.
    """
    kinds: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for key, (live, terms) in layers.items():
        if terms and all(isinstance(term.delta, LowRank) for term in terms):
            kinds[live.device, live.dtype, live.shape, live.stride()].append(key)
    for keys in kinds.values():
        if len(keys) > 1:
            yield Group([layers[key][1] for key in keys]), keys


def _factors(term: Term) -> LowRank:
    assert isinstance(term.delta, LowRank)
    return term.delta
