"""(IA)^3 (arXiv 2205.05638): each row or column of a weight is multiplied by a number.

LyCORIS writes the numbers minus one, and whether they scale the input (``on_input``). PEFT writes
the numbers; those of the output also scale the bias. In its ``feedforward_modules`` the numbers
scale the input.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Need,
    Part,
    Shape,
    Values,
    WrongValuesError,
    missing,
)
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

VECTOR = Part("weight", (".weight",), beside=".on_input")
ON_INPUT = Part("on_input", whole_numbers=True)
NUMBERS = Part("ia3_l")


class Ia3(Form):
    """The form of LyCORIS' (IA)^3; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "ia3"
    parts = (VECTOR, ON_INPUT)
    needs = Need.WEIGHT

    def problems(self, layer: Header) -> list[str]:
        absent = missing(self.parts, layer.shapes)
        if absent:
            return absent
        if math.prod(layer.shapes[ON_INPUT]) != 1:
            return ["on_input is not one number"]
        found = math.prod(layer.shapes[VECTOR])
        if layer.weight is not None and found not in layer.weight[:2]:
            return [_misfit(found, layer.weight)]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        axis = 1 if int(values.tensors[ON_INPUT]) else 0
        shape = tuple(values.weight.shape)
        found = values.tensors[VECTOR].numel()
        if found != shape[axis]:
            raise WrongValuesError(
                f"its {found} numbers are of the {'input' if axis else 'output'} by on_input, and "
                f"the base model's weight is {list(shape)}"
            )
        return Dense(_scaled(values.weight, values.tensors[VECTOR].double(), axis)), 0.0


class PeftIa3(Form):
    """The form of PEFT's (IA)^3; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "ia3"
    parts = (NUMBERS,)
    needs = Need.WEIGHT
    peft = MappingProxyType({"IA3": None})

    def problems(self, layer: Header) -> list[str]:
        shape = layer.shapes[NUMBERS]
        if layer.weight is None:
            return []
        found, fits = math.prod(shape), layer.weight[:2]
        if found != max(shape) or found not in fits or (len(shape) == 2 and len(fits) < 2):
            return [_misfit(found, layer.weight)]
        axis = _axis(layer)
        if axis is None:
            return [
                "its numbers may be of rows or of columns: keep adapter_config.json beside the "
                "file, with feedforward_modules as a list"
            ]
        return [] if found == layer.weight[axis] else [_misfit(found, layer.weight)]

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        axis = _axis(layer)
        assert axis is not None
        return Dense(_scaled(values.weight, values.tensors[NUMBERS].double() - 1.0, axis)), 0.0

    def changes_bias(self, layer: Header) -> bool:
        return layer.has_bias and _axis(layer) == 0

    def bias_delta(self, layer: Header, values: Values) -> torch.Tensor:
        assert values.bias is not None
        return values.bias * (values.tensors[NUMBERS].double().flatten() - 1.0)


def _axis(layer: Header) -> int | None:
    """Return 0 for numbers of the output, 1 of the input; None if unknown."""
    shape, weight = layer.shapes[NUMBERS], layer.weight
    if len(shape) == 2 and shape != (1, 1):
        return 1 if shape[0] == 1 and _is_linear(weight) else 0 if shape[1] == 1 else _told(layer)
    if weight is not None and len(weight) > 1 and weight[0] != weight[1]:
        return 0 if math.prod(shape) == weight[0] else 1
    return _told(layer)


def _is_linear(weight: Shape | None) -> bool:
    return weight is None or len(weight) == 2


def _told(layer: Header) -> int | None:
    """Return the axis in PEFT's configuration, for a layer whose numbers fit both axes."""
    if "target_modules" not in layer.settings:
        return None
    modules: Any = layer.settings.get("feedforward_modules") or []
    if not isinstance(modules, list):
        return None
    own = [str(name) for name in modules]
    path = layer.spelled
    return int(any(path == name or path.endswith(f".{name}") for name in own))


def _scaled(weight: torch.Tensor, numbers: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [1] * weight.dim()
    shape[axis] = -1
    return (weight * numbers.reshape(shape)).float()


def _misfit(found: int, weight: Shape) -> str:
    return (
        f"its {found} numbers are neither the rows nor the columns of the base model's weight "
        f"{list(weight)}"
    )
