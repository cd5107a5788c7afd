"""Parameters that are written as they are: differences (LyCORIS), and new values.

``diff`` is a weight's delta and ``w_norm`` a norm's. ``scale`` (norms in control LoRAs of FLUX) and
``set_weight`` (ComfyUI) are what a parameter becomes; their delta, value - W, needs the base.
"""

from __future__ import annotations

from klora_compile.reading.forms.lora import without_ones
from klora_compile.reading.forms.parts import Form, Header, Need, Part, Shape, Values
from klora_runtime.artifact.delta import Dense

DIFF, DIFF_BIAS = Part("diff"), Part("diff_b")
NORM_WEIGHT, NORM_BIAS = Part("w_norm"), Part("b_norm")
#: The parameter's new value itself, not a difference.
VALUE = Part("value", (".scale", ".set_weight"))


class Full(Form):
    """See :class:`~klora_compile.reading.forms.parts.Form`.

    Args:
        name: as in a report.
        part: the tensor that is the delta.
    """

    def __init__(self, name: str, part: Part) -> None:
        self.name = name
        self.parts = (part,)
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
    """See :class:`~klora_compile.reading.forms.parts.Form`."""

    needs = Need.WEIGHT

    def __init__(self) -> None:
        super().__init__("value", VALUE)

    def is_dense(self, layer: Header) -> bool:
        return True

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        new = values.tensors[VALUE].double().reshape(self.shape(layer))
        return Dense((new - values.weight).float()), 0.0
