"""OSF (PEFT): the small singular directions of the weight are trained, the large ones stay.

The file has U diag(S) V of the trained small directions. Their old part is the weight without its
largest singular directions; the number of these is the number of directions not in the file.
"""

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

U, S, V = (Part(f"osf_svd_params.{name}_low") for name in "USV")


class Osf(Form):
    """The form of OSF; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "osf"
    parts = (U, S, V)
    needs = Need.WEIGHT
    peft = MappingProxyType({"OSF": None})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        u, s, v = (shapes[part] for part in self.parts)
        if not (len(u) == len(v) == 2 and len(s) == 1) or not u[1] == s[0] == v[0] > 0:
            return [f"{shapes_text(self.parts, shapes)} do not fit each other"]
        own = self.shape(layer)
        if layer.weight is not None and (layer.weight != own or s[0] > min(own)):
            return [f"it has {s[0]} directions of {list(own)}, and the base {list(layer.weight)}"]
        return []

    def shape(self, layer: Header) -> Shape:
        return layer.shapes[U][0], layer.shapes[V][1]

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        u, s, v = (values.tensors[part].double() for part in self.parts)
        left, sizes, right = torch.linalg.svd(values.weight, full_matrices=False)
        kept = len(sizes) - len(s)
        small = values.weight - (left[:, :kept] * sizes[:kept]) @ right[:kept]
        return Dense(((u * s) @ v - small).float()), 0.0
