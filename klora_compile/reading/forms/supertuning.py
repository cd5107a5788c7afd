"""Super and Supra (arXiv 2607.09287): a sparse delta plus a low-rank pair.

Indices count the weight's numbers row by row. The pair is scaled by alpha / rank.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
    Form,
    Header,
    Need,
    Part,
    Shape,
    Values,
    WrongValuesError,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

NUMBERS, PLACES = Part("supertuning_values"), Part("supertuning_indices", whole_numbers=True)
A, B = (Part(f"supertuning_lora_{side}", (f".supertuning_lora_{side}.weight",)) for side in "AB")


class Supertuning(Form):
    """The form of Super and Supra; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "supertuning"
    parts = (NUMBERS, PLACES, A, B)
    needs = Need.SHAPE
    peft = MappingProxyType({"SUPERTUNING": None})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        if PLACES not in shapes:
            return ["has no supertuning_indices; save it with save_precomputed_indices=True"]
        pair = not shapes.keys().isdisjoint((A, B))
        absent = missing(self.parts if pair else (NUMBERS, PLACES), shapes)
        if absent:
            return absent
        if len(shapes[NUMBERS]) != 1 or shapes[PLACES] != shapes[NUMBERS]:
            return [f"{shapes_text((NUMBERS, PLACES), shapes)} are not indices of numbers"]
        if pair and type(layer.settings.get("lora_alpha")) not in (int, float):
            return [f"PEFT's configuration says the lora_alpha of its pair; {KEEP_CONFIG}"]
        if layer.weight is None:
            return []
        if len(layer.weight) != 2 or (pair and not _fits(shapes[A], shapes[B], layer.weight)):
            return [
                f"{shapes_text(self.parts, shapes)} do not fit the base model's weight "
                f"{list(layer.weight)}"
            ]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert layer.weight is not None
        tensors, size = values.tensors, math.prod(layer.weight)
        places = tensors[PLACES].long()
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
            raise WrongValuesError(
                "its supertuning_indices are outside of the base model's weight "
                f"{list(layer.weight)}"
            )
        delta = torch.zeros(size, dtype=torch.float64)
        delta = delta.index_add(0, places, tensors[NUMBERS].double()).view(layer.weight)
        if A in tensors:
            scale = layer.settings["lora_alpha"] / len(tensors[A])
            delta = delta + scale * tensors[B].double() @ tensors[A].double()
        return Dense(delta.float()), 0.0


def _fits(a: Shape, b: Shape, weight: Shape) -> bool:
    return len(a) == len(b) == 2 and a[0] == b[1] > 0 and (b[0], a[1]) == weight
