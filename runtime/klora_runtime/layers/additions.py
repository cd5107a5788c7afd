"""The computation of a branch, for each kind of module.

A branch adds to the module's result y: ``y + up^T @ (gate * (down @ x))`` for factors,
``y + delta @ x`` for a dense delta. In a convolution, down is a convolution with the module's own
settings and ``rank`` outputs, and up is a pointwise one. A new kind of module is a new row of
:data:`_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d, conv3d, embedding, linear, pad

from klora_runtime.layers.packed import is_packed_linear, unpacks_itself
from klora_runtime.layers.subclass import plain_class

#: Makes a new tensor for its result, unlike a subclass that may keep or share it.
_LINEAR_FORWARD = nn.Linear.forward


@dataclass(frozen=True, eq=False)
class Addition:
    """The tensors of one branch, in the dtype and on the device of its module's computation."""

    down: torch.Tensor | None
    """(rank, in), or (rank, in / groups, *kernel); None if no slot has factors."""
    up: torch.Tensor | None
    """(rank, out)."""
    gate: torch.Tensor | None
    """(rank,)."""
    dense: torch.Tensor | None = None
    """Sum of gate * delta over the dense deltas, in the weight's shape."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that are not None."""
        every = (self.down, self.up, self.gate, self.dense)
        return tuple(tensor for tensor in every if tensor is not None)


@dataclass(frozen=True)
class Kind:
    """The functions that add factors and dense deltas in one kind of module."""

    factors: Callable[..., torch.Tensor]
    """(module, x, result, down, up, gate) -> result plus the branch's output."""
    dense: Callable[..., torch.Tensor]
    """(module, x, result, dense) -> result plus the branch's output."""
    kernel: int = 0
    """Number of dimensions of the kernel."""
    into: Callable[..., torch.Tensor] | None = None
    """The same as :attr:`factors`, written into the result; None if there is no such way."""

    def adding(self, forward: Any, result: torch.Tensor) -> Callable[..., torch.Tensor]:
        """Return :attr:`into` for a new result of an inference, else :attr:`factors`.

        Where gradients are on, autograd or a selective checkpoint may keep the result, also one
        that needs no gradient itself. A ``TorchDispatchMode`` that keeps results of operations
        sees them written.

        Args:
            forward: the function of the class that made the result.
        """
        if self.into is None or forward is not _LINEAR_FORWARD:
            return self.factors
        if torch.is_grad_enabled() or not result.is_contiguous():
            return self.factors
        return self.into


def kind_of(module_class: type) -> Kind | None:
    """Return the kind of a module class; None if its modules cannot have a branch.

    A convolution or embedding class may do more around the multiplication: pad, scale, change its
    strides. What a branch adds would miss that, so such a class has no kind.
    """
    plain: Any = plain_class(module_class)
    if is_packed_linear(plain):
        return _KINDS[nn.Linear]
    for base, kind in _KINDS.items():
        if issubclass(plain, base):
            return kind if base is nn.Linear or _computes_as(base, plain) else None
    return None


def _computes_as(base: Any, module_class: Any) -> bool:
    """Return whether a class computes as ``base`` does, but for the weight it takes."""
    if unpacks_itself(module_class):
        return True
    forward, convolve = module_class.forward, "_conv_forward"
    if getattr(module_class, convolve, None) is not getattr(base, convolve, None):
        return False
    code = getattr(forward, "__code__", None)
    return forward is base.forward or (code is not None and convolve in code.co_names)


def _add_linear(
    module: Any,
    x: torch.Tensor,
    result: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    *,
    into: bool = False,
) -> torch.Tensor:
    inner = linear(x.to(down), down) * gate
    if not _alike(inner, result) or result.dim() < 2:
        return result + linear(inner, up.t()).to(result)
    # addmm adds in the product: one pass over the result less, and one rounding less. In place,
    # it needs no second memory for the result, whose pages can cost more than the product.
    if into:
        result.view(-1, result.shape[-1]).addmm_(inner.flatten(0, -2), up)
        return result
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
    """Send each group of inputs through all ranks; each group of outputs uses its own result."""
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
    nn.Linear: Kind(_add_linear, _add_dense_linear, into=partial(_add_linear, into=True)),
    nn.Conv1d: _convolution(conv1d, 1),
    nn.Conv2d: _convolution(conv2d, 2),
    nn.Conv3d: _convolution(conv3d, 3),
    nn.Embedding: Kind(_add_embedding, _add_dense_embedding),
}
