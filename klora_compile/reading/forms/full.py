"""Deltas that are written as they are: ``diff`` of a weight, ``w_norm`` of a norm (LyCORIS)."""

from __future__ import annotations

from klora_compile.reading.forms.lora import without_ones
from klora_compile.reading.forms.parts import Part, Shape, Shapes, Tensors
from klora_runtime.artifact.delta import Dense


class Full:
    """See :class:`~klora_compile.reading.forms.parts.Form`.

    Args:
        name: as in a report.
        part: the tensor that is the delta.
    """

    def __init__(self, name: str, part: Part) -> None:
        self.name = name
        self.parts = (part,)
        self._part = part

    def problems(self, shapes: Shapes, kernel: Shape) -> list[str]:
        shape = shapes[self._part]
        fits = 1 <= len(shape) <= 5 and 0 not in shape
        return [] if fits else [f"{self._part.value} {list(shape)} is not the shape of a parameter"]

    def rank(self, shapes: Shapes) -> None:
        return None

    def shape(self, shapes: Shapes, kernel: Shape) -> Shape:
        shape = shapes[self._part]
        return *shape[:2], *without_ones(shape[2:])

    def is_dense(self, shapes: Shapes, kernel: Shape) -> bool:
        return False

    def delta(self, tensors: Tensors, kernel: Shape, error: float) -> tuple[Dense, float]:
        values = tensors[self._part]
        return Dense(values.reshape(*values.shape[:2], *without_ones(values.shape[2:]))), 0.0
