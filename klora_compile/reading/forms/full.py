"""Full parameters: differences (LyCORIS) and new values.

``diff`` is a weight's delta, ``w_norm`` a norm's, and ``beft_bias`` (PEFT) a bias' as a row.
``scale`` (norms in control LoRAs of FLUX), ``set_weight`` (ComfyUI) and ``ln_tuning_layers`` (PEFT,
norms) are new values of a parameter; their delta, value - W, needs the base.
"""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.forms.lora import without_ones
from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Need,
    Part,
    Shape,
    Values,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

DIFF, DIFF_BIAS = Part("diff"), Part("diff_b")
NORM_WEIGHT, NORM_BIAS = Part("w_norm"), Part("b_norm")
BEFT_BIAS = Part("beft_bias")
#: New values, not differences, of a parameter and of its bias.
VALUE = Part("value", (".scale", ".set_weight", ".ln_tuning_layers.weight"))
BIAS_VALUE = Part("bias' value", (".ln_tuning_layers.bias",))


def as_bias(part: Part, shape: Shape) -> Shape:
    """Return the shape of the bias whose delta has this shape."""
    return shape[1:] if part == BEFT_BIAS and shape[:1] == (1,) else shape


class Full(Form):
    """The form of full differences; see :class:`~klora_compile.reading.forms.parts.Form`.

    Args:
        name: name in reports.
        part: the part that is the delta.
    """

    def __init__(self, name: str, part: Part) -> None:
        self.name = name
        self.parts: tuple[Part, ...] = (part,)
        self._part = part

    def problems(self, layer: Header) -> list[str]:
        shape = layer.shapes[self._part]
        fits = 1 <= len(shape) <= 5 and 0 not in shape
        return [] if fits else [f"{self._part.name} {list(shape)} is not the shape of a parameter"]

    def shape(self, layer: Header) -> Shape:
        shape = layer.shapes[self._part]
        return *shape[:2], *without_ones(shape[2:])

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        numbers = values.tensors[self._part]
        return Dense(numbers.reshape(self.shape(layer))), 0.0


class Value(Full):
    """The form of new values; see :class:`~klora_compile.reading.forms.parts.Form`."""

    needs = Need.WEIGHT
    peft = MappingProxyType({"LN_TUNING": None})

    def __init__(self) -> None:
        super().__init__("value", VALUE)
        self.parts = (VALUE, BIAS_VALUE)

    def problems(self, layer: Header) -> list[str]:
        absent = missing((VALUE,), layer.shapes)
        if absent:
            return absent
        found = super().problems(layer)
        own = layer.shapes[VALUE]
        if not found and layer.shapes.get(BIAS_VALUE, own[:1]) != own[:1]:
            return [f"{shapes_text(self.parts, layer.shapes)} are not a weight and its bias"]
        return found

    def is_dense(self, layer: Header) -> bool:
        return True

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        new = values.tensors[VALUE].double().reshape(self.shape(layer))
        return Dense((new - values.weight).float()), 0.0

    def changes_bias(self, layer: Header) -> bool:
        return BIAS_VALUE in layer.shapes

    def bias_delta(self, layer: Header, values: Values) -> torch.Tensor:
        assert values.bias is not None
        return values.tensors[BIAS_VALUE].double() - values.bias
