"""SHiRA (arXiv 2406.13175): a sparse delta, a few numbers at any position of the weight."""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Need,
    Part,
    Values,
    WrongValuesError,
    missing,
)
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

NUMBERS, PLACES = Part("shira_weight"), Part("shira_indices", whole_numbers=True)


class Shira(Form):
    """The form of SHiRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "shira"
    parts = (NUMBERS, PLACES)
    needs = Need.SHAPE
    peft = MappingProxyType({"SHIRA": None})

    def problems(self, layer: Header) -> list[str]:
        absent = missing(self.parts, layer.shapes)
        if absent:
            return absent
        numbers, places = layer.shapes[NUMBERS], layer.shapes[PLACES]
        if len(numbers) != 1 or places != (2, *numbers):
            return [f"shira_indices {list(places)} are not indices of {list(numbers)} numbers"]
        if layer.weight is not None and len(layer.weight) != 2:
            return [f"the base model's weight is {list(layer.weight)}, expected a linear layer's"]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert layer.weight is not None
        rows, columns = values.tensors[PLACES].long()
        out, inner = layer.weight
        for found, length in ((rows, out), (columns, inner)):
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < length:
                raise WrongValuesError(
                    f"its shira_indices are outside of the base model's weight {[out, inner]}"
                )
        delta = torch.zeros(out, inner)
        delta.index_put_((rows, columns), values.tensors[NUMBERS].float(), accumulate=True)
        return Dense(delta), 0.0
