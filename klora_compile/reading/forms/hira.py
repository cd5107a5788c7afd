"""HiRA (ICLR 2025): the elementwise product of the weight and a low-rank matrix, W * (B A)."""

from __future__ import annotations

from types import MappingProxyType

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

A, B = Part("hira_A"), Part("hira_B")


class Hira(Form):
    """The form of HiRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "hira"
    parts = (A, B)
    needs = Need.WEIGHT
    peft = MappingProxyType({"HIRA": None})

    def problems(self, layer: Header) -> list[str]:
        absent = missing(self.parts, layer.shapes)
        if absent:
            return absent
        a, b = layer.shapes[A], layer.shapes[B]
        if not 2 <= len(a) == len(b) <= 5 or {1} < {1, *b[2:]} or a[0] != b[1] or 0 in (*a, *b):
            return [f"{shapes_text(self.parts, layer.shapes)} are not a low-rank pair"]
        own = self.shape(layer)
        if layer.weight is not None and layer.weight != own:
            return [
                f"its factors make {list(own)}, and the base model's weight {list(layer.weight)}"
            ]
        return []

    def shape(self, layer: Header) -> Shape:
        a, kernel = layer.shapes[A], layer.shapes[A][2:]
        own = tuple(kernel) if any(size > 1 for size in kernel) else ()
        return layer.shapes[B][0], a[1], *own

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        a, b = (values.tensors[part].double() for part in (A, B))
        product = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1))
        return Dense((values.weight * product.reshape(values.weight.shape)).float()), 0.0
