"""GraLoRA (arXiv 2505.20355): a low-rank pair per block of the weight, and one for the whole.

Inputs and outputs are split into k groups. The ranks of A, (k, in / k, r), are also split into k
shares: share n of input group m meets share m of output group n in B, (k, r, out / k). Everything
is scaled by alpha / (r + rank of the whole's pair); alpha / r is the scale that every form has.
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

A, B = Part("gralora_A"), Part("gralora_B")
WHOLE_A = Part("gralora_A_general", (".gralora_A_general.weight",))
WHOLE_B = Part("gralora_B_general", (".gralora_B_general.weight",))


class Gralora(Form):
    """The form of GraLoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "gralora"
    parts = (A, B, WHOLE_A, WHOLE_B)
    peft = MappingProxyType({"GRALORA": "alpha"})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing((A, B), shapes)
        if absent:
            return absent
        a, b = shapes[A], shapes[B]
        fits = len(a) == len(b) == 3 and a[0] == b[0] and a[2] == b[1] and 0 not in (*a, *b)
        if fits and (WHOLE_A in shapes or WHOLE_B in shapes):
            down, up = shapes.get(WHOLE_A, ()), shapes.get(WHOLE_B, ())
            out, inner = self.shape(layer)
            fits = (*down[:1], inner) == down and (out, *down[:1]) == up
        if not fits or a[2] % a[0]:
            return [f"{shapes_text(self.parts, shapes)} do not fit each other"]
        return []

    def rank(self, layer: Header) -> int:
        return layer.shapes[A][2]

    def shape(self, layer: Header) -> Shape:
        (groups, inner, _), (_, _, out) = layer.shapes[A], layer.shapes[B]
        return groups * out, groups * inner

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        a, b = (values.tensors[part].double() for part in (A, B))
        groups, inner, rank = a.shape
        out, share = b.shape[2], rank // groups
        ups, downs = [], []
        for group in range(groups):  # input groups
            for other in range(groups):  # output groups
                down = torch.zeros(share, groups * inner, dtype=a.dtype)
                up = torch.zeros(groups * out, share, dtype=a.dtype)
                own = a[group, :, other * share : (other + 1) * share]
                down[:, group * inner : (group + 1) * inner] = own.T
                theirs = b[other, group * share : (group + 1) * share]
                up[other * out : (other + 1) * out] = theirs.T
                downs.append(down)
                ups.append(up)
        if WHOLE_A in values.tensors:
            downs.append(values.tensors[WHOLE_A].double())
            ups.append(values.tensors[WHOLE_B].double())
        gain = rank / (rank + layer.shapes.get(WHOLE_A, (0,))[0])
        return low_rank(torch.cat(downs), gain * torch.cat(ups, dim=1)), 0.0
