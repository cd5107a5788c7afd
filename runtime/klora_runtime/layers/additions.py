"""What a branch adds to a module's own result, by the kind of module.

``y + up^T @ (gate * (down @ x))`` for factors, ``y + delta @ x`` for a delta with all its numbers.
A convolution's factors are a convolution like the module's own, with as many outputs as ranks,
and a pointwise one. A new kind of module is a new row of :data:`_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d, conv3d, embedding, linear, pad


@dataclass(frozen=True, eq=False)
class Addition:
    """The tensors of one branch, in the dtype and on the device that its module computes in."""

    down: torch.Tensor | None
    """(rank, in), or (rank, in / groups, *kernel); None where no slot has factors."""
    up: torch.Tensor | None
    """(rank, out)."""
    gate: torch.Tensor | None
    """(rank,)."""
    dense: torch.Tensor | None = None
    """Of the weight's shape: the sum of the deltas without factors, each times its gate."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that there are."""
        every = (self.down, self.up, self.gate, self.dense)
        return tuple(tensor for tensor in every if tensor is not None)


@dataclass(frozen=True)
class Kind:
    """How modules of a kind add factors and dense deltas."""

    factors: Callable[..., torch.Tensor]
    """(module, x, result, down, up, gate) -> result with what they add."""
    dense: Callable[..., torch.Tensor]
    """(module, x, result, dense) -> the same."""
    kernel: int = 0
    """Dimensions of the kernel."""


def kind_of(module_class: type) -> Kind | None:
    """How modules of this class add a branch; None where they cannot."""
    return next((kind for base, kind in _KINDS.items() if issubclass(module_class, base)), None)


def _add_linear(
    module: Any,
    x: torch.Tensor,
    result: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    inner = linear(x.to(down), down) * gate
    if not _alike(inner, result) or result.dim() < 2:
        return result + linear(inner, up.t()).to(result)
    # The last product adds by itself: one pass over the result less, and one rounding less.
    total = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up)
    return total.view(result.shape)


def _add_dense_linear(
    module: Any, x: torch.Tensor, result: torch.Tensor, dense: torch.Tensor
) -> torch.Tensor:
    return result + linear(x.to(dense), dense).to(result)


def _add_convolution(
    convolve: Callable[..., torch.Tensor],
    module: Any,
    x: torch.Tensor,
    result: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    ones = (1,) * (down.dim() - 2)
    if module.groups != 1:
        return _add_in_groups(convolve, module, x, result, down, up, gate)
    inner = _as_the_module_does(convolve, module, x, down) * gate.view(-1, *ones)
    if not _alike(inner, result) or result.dim() != down.dim():
        return result + convolve(inner, up.t().reshape(*up.t().shape, *ones)).to(result)
    pixels = result.movedim(1, -1)
    if pixels.is_contiguous():  # channels_last
        thin = inner.movedim(1, -1).flatten(0, -2)
        total = torch.addmm(pixels.flatten(0, -2), thin, up)
        return total.view(pixels.shape).movedim(-1, 1)
    stack = up.t().expand(len(result), -1, -1)
    return torch.baddbmm(result.flatten(2), stack, inner.flatten(2)).view(result.shape)


def _add_in_groups(
    convolve: Callable[..., torch.Tensor],
    module: Any,
    x: torch.Tensor,
    result: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    """Each group of inputs passes through all ranks, and each group of outputs sees its own."""
    groups, ones = module.groups, (1,) * (down.dim() - 2)
    every = down.repeat(groups, 1, *ones)
    inner = _as_the_module_does(convolve, module, x, every, groups)
    inner = inner * gate.repeat(groups).view(-1, *ones)
    pointwise = up.t().reshape(*up.t().shape, *ones)
    return result + convolve(inner, pointwise, groups=groups).to(result)


def _add_dense_convolution(
    convolve: Callable[..., torch.Tensor],
    module: Any,
    x: torch.Tensor,
    result: torch.Tensor,
    dense: torch.Tensor,
) -> torch.Tensor:
    return result + _as_the_module_does(convolve, module, x, dense, module.groups).to(result)


def _as_the_module_does(
    convolve: Callable[..., torch.Tensor],
    module: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    groups: int = 1,
) -> torch.Tensor:
    x, padding = x.to(weight), module.padding
    if module.padding_mode != "zeros":
        x = pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return convolve(x, weight, None, module.stride, padding, module.dilation, groups)


def _add_embedding(
    module: Any,
    x: torch.Tensor,
    result: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    return result + (embedding(x, up.t()) * gate @ down).to(result)


def _add_dense_embedding(
    module: Any, x: torch.Tensor, result: torch.Tensor, dense: torch.Tensor
) -> torch.Tensor:
    return result + embedding(x, dense).to(result)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


def _convolution(convolve: Callable[..., torch.Tensor], kernel: int) -> Kind:
    return Kind(
        partial(_add_convolution, convolve), partial(_add_dense_convolution, convolve), kernel
    )


_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind(_add_linear, _add_dense_linear),
    nn.Conv1d: _convolution(conv1d, 1),
    nn.Conv2d: _convolution(conv2d, 2),
    nn.Conv3d: _convolution(conv3d, 3),
    nn.Embedding: Kind(_add_embedding, _add_dense_embedding),
}
