"""The factors of branched layers, prepared for their buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from klora_runtime.artifact.delta import LowRank, balanced
from klora_runtime.layers.additions import kind_of
from klora_runtime.layers.shipping import shipped
from klora_runtime.layers.targets import Target
from klora_runtime.layers.turns import Pair

#: Bytes of float32 that are converted at a time (at least one layer).
PORTION = 2**24


def low_rank(target: Target) -> dict[str, LowRank]:
    """Return the deltas of a target that can be branched, by slot, without their scales."""
    deltas = ((slot, stored.delta) for slot, stored in target.entry.acting.items())
    return {slot: delta for slot, delta in deltas if isinstance(delta, LowRank)}


def buffer_shapes(target: Target, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of down and up for the module; files may store 1x1 kernels as linear."""
    out, *inner = weight_shape(target)
    return (rank, *inner), (rank, out)


def weight_shape(target: Target) -> tuple[int, ...]:
    """Return the shape of a layer's weight in its module; the artifact's may lack a 1x1 kernel."""
    kind = kind_of(type(target.module))
    kernel = 0 if kind is None else kind.kernel
    out, inner, *sizes = target.entry.shape
    return (out, inner, *(sizes or [1] * kernel)[:kernel])


def portions(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield the targets in runs whose factors take at most :data:`PORTION` bytes in float32."""
    portion, size = list[Target](), 0
    for target in targets:
        own = 4 * sum(t.numel() for each in low_rank(target).values() for t in each.tensors)
        if portion and size + own > PORTION:
            yield portion
            portion, size = [], 0
        portion.append(target)
        size += own
    if portion:
        yield portion


def pairs_of(
    targets: Sequence[Target], device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Pair]]:
    """Yield, per target, slot -> new down and up on a device in a dtype."""
    slots = [low_rank(target) for target in targets]
    stored = [tensor for own in slots for delta in own.values() for tensor in delta.tensors]
    factors = iter(shipped(stored, device, torch.float32))
    even = iter(balanced([LowRank(down, up) for down, up in zip(factors, factors, strict=True)]))
    for target, own in zip(targets, slots, strict=True):
        pairs = {}
        for slot in own:
            delta = next(even)
            shape, _ = buffer_shapes(target, delta.rank)
            down, up = delta.down.reshape(shape), delta.up.flatten(1).t()
            pairs[slot] = down.to(dtype), up.to(dtype).contiguous()
        yield pairs
