"""Modules that quantise a plain weight at each call, which would lose a merged delta.

Libraries that train quantised models have such modules, and so do libraries that quantise in two
steps, before the second step. They are recognised by attributes, so that none of the libraries is
imported. A new kind is a new row of :data:`_TELLS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def quantiser_of(module: nn.Module) -> str | None:
    """Return the class of a module that quantises its weight at each call; None for others."""
    if type(module).__module__.startswith("torch.nn.modules"):
        return None
    return type(module).__name__ if any(tell(module) for tell in _TELLS) else None


def _quanto(module: Any) -> bool:
    """Recognise layers of optimum-quanto before ``freeze``."""
    return getattr(module, "weight_qtype", None) is not None and not module.frozen


def _torchao(module: Any) -> bool:
    """Recognise torchao's layers for training: fake quantisation, float8, MX, sparse."""
    return type(module).__module__.startswith("torchao.")


def _fake(module: Any) -> bool:
    """Recognise fake quantisation of torch, and of subclasses of torchao's layers."""
    names = ("weight_fake_quantizer", "weight_fake_quant")
    return any(getattr(module, name, None) is not None for name in names)


def _modelopt(module: Any) -> bool:
    """Recognise layers of NVIDIA's ModelOpt before they are compressed."""
    return bool(getattr(getattr(module, "weight_quantizer", None), "is_enabled", False))


_TELLS: tuple[Callable[[Any], bool], ...] = (_quanto, _torchao, _fake, _modelopt)
