"""HRA (arXiv 2405.17484): the layer's input is reflected along learnt directions.

W becomes W H_1 H_2 ... with H_i = I - 2 u_i u_i^T and unit vectors u_i, which include a
convolution's kernel. With ``apply_GS`` each direction is first made orthogonal to the ones before.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
    Form,
    Header,
    Need,
    Part,
    Values,
    WrongValuesError,
)
from klora_runtime.artifact.delta import LowRank
from klora_runtime.lazy_torch import torch

DIRECTIONS = Part("hra_u")


class Hra(Form):
    """The form of HRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "hra"
    parts = (DIRECTIONS,)
    needs = Need.WEIGHT
    peft = MappingProxyType({"HRA": None})

    def problems(self, layer: Header) -> list[str]:
        shape = layer.shapes[DIRECTIONS]
        if len(shape) != 2 or 0 in shape:
            return [f"hra_u {list(shape)} is not (columns, rank)"]
        if type(layer.settings.get("apply_GS")) is not bool:
            return [f"PEFT's configuration says how its directions are meant; {KEEP_CONFIG}"]
        if layer.weight is not None and math.prod(layer.weight[1:]) != shape[0]:
            return [
                f"hra_u {list(shape)} does not fit the base model's weight {list(layer.weight)}"
            ]
        return []

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        assert values.weight is not None
        directions = values.tensors[DIRECTIONS].double()
        if layer.settings["apply_GS"]:
            directions = torch.linalg.qr(directions)[0]
        lengths = directions.norm(dim=0)
        if not bool((lengths > 0).all()):
            raise WrongValuesError("a direction of its hra_u is zero")
        rows = (directions / lengths).T
        mirrored, ups = values.weight.flatten(1), []
        for row in rows:
            ups.append(-2.0 * mirrored @ row)
            mirrored = mirrored + torch.outer(ups[-1], row)
        return low_rank(rows.contiguous(), torch.stack(ups, dim=1), values.weight.shape[2:]), 0.0
