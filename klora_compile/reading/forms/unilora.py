"""Uni-LoRA (arXiv 2506.00799): all numbers of all low-rank pairs come from one short vector.

A file with ``save_indices`` states the index and the factor of each number. Without it, the file
has the vector alone; the layers that use it and their order are then known only to the code of the
trained model.
"""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Part,
    Shape,
    Values,
    WrongValuesError,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import LowRank
from klora_runtime.lazy_torch import torch

NUMBERS = Part("unilora_theta_d", ("unilora_theta_d",))
#: Indices of A (rank, in) and of B (out, rank).
PLACES = tuple(Part(f"unilora_indices_{side}", whole_numbers=True) for side in "AB")
SCALES = tuple(Part(f"unilora_scales_{side}") for side in "AB")


class Unilora(Form):
    """The form of Uni-LoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "unilora"
    parts = (*PLACES, *SCALES)
    shared = (NUMBERS,)
    alone = "does not say which layers take its numbers; save it with save_indices=True"
    peft = MappingProxyType({"UNILORA": None})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing((*self.parts, NUMBERS), shapes)
        if absent:
            return absent
        a, b = (shapes[part] for part in PLACES)
        fits = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b)
        if not fits or [shapes[part] for part in SCALES] != [a, b] or len(shapes[NUMBERS]) != 1:
            return [f"{shapes_text((*self.parts, NUMBERS), shapes)} do not fit each other"]
        return []

    def shape(self, layer: Header) -> Shape:
        a, b = (layer.shapes[part] for part in PLACES)
        return b[0], a[1]

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        numbers = values.tensors[NUMBERS].double()
        down, up = (
            _taken(numbers, values.tensors[places].long()) * values.tensors[scales].double()
            for places, scales in zip(PLACES, SCALES, strict=True)
        )
        return low_rank(down, up), 0.0


def _taken(numbers: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    if not 0 <= int(places.min()) <= int(places.max()) < len(numbers):
        raise WrongValuesError(f"its unilora_indices are not indices of {len(numbers)} numbers")
    return numbers[places]
