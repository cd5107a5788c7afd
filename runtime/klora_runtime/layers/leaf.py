"""A leaf module that adds a gated low-rank branch to its own output.

The module gets a class of its own kind (`subclass`): one for each base class, which overrides
``__call__``, so that whatever replaced the module's ``forward`` (offloading, casting, quantisers)
still runs inside. Compilers see a class and three tensors; forward hooks they would ignore.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from klora_runtime.layers.subclass import Overlay

#: Plain attributes of a branched module; in ``vars(module)``, so neither in its state nor moved.
_DOWN, _UP, _GATE = "_klora_down", "_klora_up", "_klora_gate"


def attach(module: nn.Module, down: torch.Tensor, up: torch.Tensor, gate: torch.Tensor) -> None:
    """Make ``module(x)`` compute ``y + up^T @ (gate * (down @ x))``, y its own result.

    Args:
        module: a linear layer, or a convolution of one group that pads with zeros.
        down: (rank, in), or (rank, in, height, width).
        up: (rank, out).
        gate: (rank,); read anew at each call, so it may be written in place.
    """
    vars(module).update({_DOWN: down, _UP: up, _GATE: gate})
    _BRANCHED.put_on(module)


def detach(module: nn.Module) -> None:
    """Give ``module`` its class back; twice is once."""
    _BRANCHED.take_off(module)
    for name in (_DOWN, _UP, _GATE):
        vars(module).pop(name, None)


def is_branched(module: nn.Module) -> bool:
    """Whether a branch is attached, and nothing has changed the module's class since."""
    return _BRANCHED.is_outermost(module)


def branch_of(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """down, up and gate of a module that is branched; see :func:`attach`."""
    own = vars(module)
    return own[_DOWN], own[_UP], own[_GATE]


def _methods(plain: Any) -> dict[str, Any]:
    add_branch = _add_convolution if issubclass(plain, nn.Conv2d) else _add_linear

    def call(self: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return add_branch(self, input, plain.__call__(self, input, *args, **kwargs))

    return {"__call__": call}


#: One class over each class of leaf, for as long as the process: compiled code keeps to it.
_BRANCHED = Overlay(_methods, makes_plain=False)


def _add_linear(module: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    down, up = module._klora_down, module._klora_up
    inner = linear(x.to(down), down) * module._klora_gate
    if not _alike(inner, result) or result.dim() < 2:
        return result + linear(inner, up.t()).to(result)
    # The last product adds by itself: one pass over the result less, and one rounding less.
    total = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up)
    return total.view(result.shape)


def _add_convolution(module: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    down, up = module._klora_down, module._klora_up
    inner = conv2d(x.to(down), down, None, module.stride, module.padding, module.dilation)
    inner = inner * module._klora_gate[:, None, None]
    if not _alike(inner, result) or result.dim() != 4:
        return result + conv2d(inner, up.t()[:, :, None, None]).to(result)
    pixels = result.permute(0, 2, 3, 1)
    if pixels.is_contiguous():  # channels_last
        thin = inner.permute(0, 2, 3, 1).flatten(0, 2)
        total = torch.addmm(pixels.flatten(0, 2), thin, up)
        return total.view(pixels.shape).permute(0, 3, 1, 2)
    stack = up.t().expand(len(result), -1, -1)
    return torch.baddbmm(result.flatten(2), stack, inner.flatten(2)).view(result.shape)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device
