"""DeLoRA (arXiv 2503.18225): a low-rank delta with strength and directions learnt separately.

The delta is B diag(lambda / (r |a_i| |b_i|)) A, with its columns multiplied by the norms of the
weight's columns, which are in the file.
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
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import LowRank
from klora_runtime.lazy_torch import torch

A, B = Part("delora_A"), Part("delora_B")
STRENGTH, NORMS = Part("delora_lambda"), Part("delora_w_norm")

#: PEFT's lower bound of the norms.
_LEAST = 1e-4


class Delora(Form):
    """The form of DeLoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "delora"
    parts = (A, B, STRENGTH, NORMS)
    peft = MappingProxyType({"DELORA": None})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        a, b = shapes[A], shapes[B]
        fits = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b)
        if not fits or shapes[STRENGTH] != (1,) or shapes[NORMS] != a[1:]:
            return [f"{shapes_text(self.parts, shapes)} do not fit each other"]
        return []

    def shape(self, layer: Header) -> Shape:
        return layer.shapes[B][0], layer.shapes[A][1]

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        a, b, strength, norms = (values.tensors[part].double() for part in self.parts)
        lengths = a.norm(dim=1).clamp_min(_LEAST) * b.norm(dim=0).clamp_min(_LEAST)
        gains = strength / (len(a) * lengths)
        return low_rank(gains[:, None] * a * norms, torch.as_tensor(b)), 0.0
