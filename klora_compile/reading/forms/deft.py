"""DEFT and PaRa (PEFT): a subspace of the layer's output is removed, and another one added.

The new weight is W - Q (M^T W) + s Q R, where Q and M come from P: both are its orthonormal basis
(``qr``), or P and its positive numbers (``relu``). s is alpha / rank, or 1 without an alpha; PaRa
(``para``) adds nothing.
"""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
    Form,
    Header,
    Need,
    Part,
    Values,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import LowRank
from klora_runtime.lazy_torch import torch

P, R = Part("deft_P"), Part("deft_R")

_METHODS = ("relu", "qr")


class Deft(Form):
    """The form of DEFT and PaRa; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "deft"
    parts = (P, R)
    needs = Need.WEIGHT
    peft = MappingProxyType({"DEFT": None})

    def problems(self, layer: Header) -> list[str]:
        shapes, settings = layer.shapes, layer.settings
        method, alpha = settings.get("decomposition_method"), settings.get("alpha")
        known = method in _METHODS and type(settings.get("para")) is bool
        if not known or type(alpha) not in (int, float, type(None)):
            return [f"PEFT's configuration says how its deft_P is meant; {KEEP_CONFIG}"]
        absent = missing((P,) if settings["para"] else self.parts, shapes)
        if absent:
            return absent
        p, weight = shapes[P], layer.weight
        if len(p) != 2 or 0 in p:
            return [f"deft_P {list(p)} is not (rows, rank)"]
        if weight is None:
            return []
        fits = len(weight) == 2 and p[0] == weight[0] and p[1] <= p[0]
        if not fits or shapes.get(R, (p[1], weight[1])) != (p[1], weight[1]):
            found = shapes_text(self.parts, shapes)
            return [f"{found} do not fit the base model's weight {list(weight)}"]
        return []

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        assert values.weight is not None
        p, settings = values.tensors[P].double(), layer.settings
        by_qr = settings["decomposition_method"] == "qr"
        basis = torch.linalg.qr(p)[0] if by_qr else torch.as_tensor(p)
        removed = (basis if by_qr else basis.clamp_min(0.0)).T @ values.weight
        if settings["para"]:
            return low_rank(-removed, basis), 0.0
        scale = settings["alpha"] / p.shape[1] if settings.get("alpha") else 1.0
        return low_rank(scale * values.tensors[R].double() - removed, basis), 0.0
