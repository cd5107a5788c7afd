"""Layers of libraries that pack weights in classes of their own.

Some of these share no base with torch's linear layer, and keep its weight under another name. All
are known by the name of the class: none of these libraries is imported. A new class is a new row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

#: The class -> the parameter that holds most of its weight.
_PACKED: Mapping[str, str] = {
    "HQQLinear": "W_q",
    "SVDQW4A4Linear": "qweight",  # Nunchaku, in diffusers
    "AWQW4A16Linear": "qweight",
}

#: Base classes of layers that unpack or cast their weight, and then compute as their other base
#: does: of SDNQ; of ComfyUI.
_UNPACKING = frozenset({"SDNQLayer", "CastWeightBiasOp"})


def is_packed_linear(module_class: type) -> bool:
    """Return whether modules of this class are linear layers with a packed weight."""
    return next(_names(module_class), None) is not None


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter of a module, or None; the ``weight`` of a packed one has another name."""
    found = module._parameters.get(name)
    if found is None and name == "weight":
        packed = next(_names(type(module)), None)
        found = None if packed is None else module._parameters.get(packed)
    return found


def unpacks_itself(module_class: type) -> bool:
    """Return whether a class of layers computes as torch's that it is derived from."""
    return any(base.__name__ in _UNPACKING for base in module_class.__mro__)


def _names(module_class: type) -> Iterator[str]:
    return (_PACKED[base.__name__] for base in module_class.__mro__ if base.__name__ in _PACKED)
