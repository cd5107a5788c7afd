"""AdaLoRA (arXiv 2303.10512): a low-rank delta with a gain for each rank, B diag(E) A.

Ranks that training pruned are not in the file; a layer may have none left. PEFT multiplies by
``lora_alpha`` and divides by the rank before pruning, ``init_r``, plus 1e-5. Of a convolution A has
the kernel in its columns.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.loha import with_kernel
from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
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

A, B, E = Part("lora_A"), Part("lora_B"), Part("lora_E")


class Adalora(Form):
    """The form of AdaLoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "adalora"
    parts = (A, B, E)
    peft = MappingProxyType({"ADALORA": None})

    def problems(self, layer: Header) -> list[str]:
        shapes, settings = layer.shapes, layer.settings
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        a, b = shapes[A], shapes[B]
        fits = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (a[1], b[0])
        if not fits or shapes[E] != (a[0], 1) or a[1] % math.prod(layer.kernel):
            return [f"{shapes_text(self.parts, shapes)} do not fit each other"]
        alpha, first = settings.get("lora_alpha"), settings.get("init_r")
        if type(alpha) not in (int, float) or type(first) is not int or first < 1:
            return [f"PEFT's configuration says its lora_alpha and init_r; {KEEP_CONFIG}"]
        return []

    def shape(self, layer: Header) -> Shape:
        return with_kernel(layer.shapes[B][0], layer.shapes[A][1], layer.kernel)

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        a, b, gains = (values.tensors[part].double() for part in self.parts)
        if not len(a):
            a, b, gains = torch.zeros(1, a.shape[1]), torch.zeros(b.shape[0], 1), torch.zeros(1, 1)
        first = layer.settings["init_r"]
        alpha = layer.settings["lora_alpha"]
        scale = (alpha if alpha > 0 else first) / (first + 1e-5)
        return low_rank(scale * gains * a, torch.as_tensor(b), layer.kernel), 0.0
