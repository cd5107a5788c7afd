"""The factors of the layers of mode branch, as their buffers hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from klora_runtime.artifact.delta import Factors
from klora_runtime.layers.shipping import shipped
from klora_runtime.layers.targets import Target
from klora_runtime.layers.turns import Pair

#: So many bytes of float32 are converted at a time, or one layer's if they are more.
PORTION = 2**24


def low_rank(target: Target) -> dict[str, Factors]:
    """The factors of a target that can be branched, by slot."""
    stored = target.entry.acting.items()
    return {slot: factors for slot, factors in stored if isinstance(factors, Factors)}


def buffer_shapes(target: Target, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of down and up for the kind of module; a 1x1 convolution may be stored as linear."""
    out, inner, *kernel = target.entry.shape
    if not isinstance(target.module, nn.Conv2d):
        return (rank, inner), (rank, out)
    kernel = kernel or [1, 1]
    return (rank, inner, *kernel), (rank, out)


def portions(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """The targets in runs whose factors take at most :data:`PORTION` bytes in float32."""
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
    """Of each target: slot -> down and up on a device in a dtype, memory of their own."""
    slots = [low_rank(target) for target in targets]
    stored = [tensor for own in slots for factors in own.values() for tensor in factors.tensors]
    matrices = iter(balanced(shipped(stored, device, torch.float32)))
    for target, own in zip(targets, slots, strict=True):
        pairs = {}
        for slot, factors in own.items():
            shape, _ = buffer_shapes(target, factors.rank)
            down, up = next(matrices).reshape(shape), next(matrices).flatten(1).t()
            pairs[slot] = down.to(dtype), up.to(dtype).contiguous()
        yield pairs


def balanced(factors: list[torch.Tensor]) -> list[torch.Tensor]:
    """down, up, down, up, ... in float32, each pair brought to one size by a power of two.

    That loses no bit. Else ``down @ x`` of a LoRA with a large down and a small up overflows in
    float16.
    """
    sizes = torch.stack(torch._foreach_norm(factors, math.inf)).tolist()
    shifts: list[float] = []
    for down, up in zip(sizes[::2], sizes[1::2], strict=True):
        plain = not down or not up or not math.isfinite(down + up)
        shift = 1.0 if plain else 2.0 ** round((math.log2(down) - math.log2(up)) / 2)
        shifts += [1.0 / shift, shift]
    return list(torch._foreach_mul(factors, shifts))
