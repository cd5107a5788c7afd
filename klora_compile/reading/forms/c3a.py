"""C3A (arXiv 2407.19342): blocks of circulant matrices, each given by one row."""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.forms.parts import Form, Header, Part, Shape, Values
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

KERNEL = Part("c3a_kernel")


class C3a(Form):
    """The form of C3A; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "c3a"
    parts = (KERNEL,)
    peft = MappingProxyType({"C3A": None})

    def problems(self, layer: Header) -> list[str]:
        shape = layer.shapes[KERNEL]
        fits = len(shape) == 3 and math.prod(shape) > 0
        return [] if fits else [f"c3a_kernel {list(shape)} is not (rows, columns, size) of blocks"]

    def shape(self, layer: Header) -> Shape:
        rows, columns, size = layer.shapes[KERNEL]
        return rows * size, columns * size

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        kernel = values.tensors[KERNEL].double()
        size = kernel.shape[2]
        steps = torch.arange(size)
        turned = kernel[:, :, (steps[None, :] - steps[:, None]) % size]  # rows, columns, i, j
        out, inner = self.shape(layer)
        return Dense((turned.transpose(1, 2).reshape(out, inner) / inner).float()), 0.0
