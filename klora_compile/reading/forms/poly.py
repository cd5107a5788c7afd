"""Poly (arXiv 2202.13914, 2211.03831): a pair mixed from the pairs of several skills.

The columns of A and the rows of B are in splits, and a router holds, for each task, split and
skill, how much the skill counts. The shares of a split's skills add up to one; the delta is
(A B)^T / rank. With one task the file determines the delta; with more the caller names the task.
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

A, B = Part("poly_lora_A"), Part("poly_lora_B")
ROUTER = Part("poly_router.module_logits")

#: PEFT adds this to the sum that shares are divided by.
_LEAST = 1e-12


class Poly(Form):
    """The form of Poly; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "poly"
    parts = (A, B, ROUTER)
    peft = MappingProxyType({"POLY": None})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        a, b, router = shapes[A], shapes[B], shapes[ROUTER]
        fits = len(a) == len(b) == 4 and a[:2] == b[:2] and a[3] == b[2] and 0 not in (*a, *b)
        if not fits or len(router) != 2 or router[1] != a[0] * a[1]:
            return [f"{shapes_text(self.parts, shapes)} do not fit each other"]
        if router[0] != 1:
            return [f"it has {router[0]} tasks, and its delta depends on the number of the task"]
        return []

    def shape(self, layer: Header) -> Shape:
        (splits, _, inner, _), (*_, out) = layer.shapes[A], layer.shapes[B]
        return splits * out, splits * inner

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        a, b, logits = (values.tensors[part].double() for part in self.parts)
        splits, skills, _, rank = a.shape
        shares = torch.sigmoid(logits).view(splits, skills)
        shares = shares / (shares.sum(dim=1, keepdim=True) + _LEAST)
        down = torch.einsum("qs,qsdr->rqd", shares, a).flatten(1)
        up = torch.einsum("qs,qsrd->qdr", shares, b).flatten(0, 1)
        return low_rank(down, up / rank), 0.0
