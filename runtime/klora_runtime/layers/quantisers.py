"""Modules with a plain weight that is made coarse at each call: what is merged into it is lost.

Libraries that train quantised models have such modules, and so has every library that quantises in
two steps, before the second. They are told by attributes: none of these libraries is imported. A
new kind is a new row of :data:`_TELLS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def quantiser_of(module: nn.Module) -> str | None:
    """The class of a module that quantises its weight at each call; None where it does not."""
    if type(module).__module__.startswith("torch.nn.modules"):
        return None
    return type(module).__name__ if any(tell(module) for tell in _TELLS) else None


def _quanto(module: Any) -> bool:
    """optimum-quanto before ``freeze``."""
    return getattr(module, "weight_qtype", None) is not None and not module.frozen


def _torchao(module: Any) -> bool:
    """torchao's layers for training: fake quantisation, float8, MX, sparse."""
    return type(module).__module__.startswith("torchao.")


def _fake(module: Any) -> bool:
    """Fake quantisation as torch's own, and of subclasses of torchao's."""
    names = ("weight_fake_quantizer", "weight_fake_quant")
    return any(getattr(module, name, None) is not None for name in names)


_TELLS: tuple[Callable[[Any], bool], ...] = (_quanto, _torchao, _fake)
