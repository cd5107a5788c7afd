"""LoHa (FedPara, arXiv 2108.06098): the elementwise product of two low-rank matrices.

(A1 B1) * (A2 B2) is a sum over pairs of columns, so it is a pair of factors of rank r squared. If
these have more numbers than the matrix, the matrix is computed. With Tucker cores (``hada_t1``,
``hada_t2``) the matrices are a convolution's, and LyCORIS writes the factors' dimensions in reverse
order. OneTrainer (``LoHaModule`` in its ``module/LoRAModule.py``) gives a convolution's factors
four dimensions: a (out, rank, 1, 1), b (rank, in, height, width).
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.factoring import low_rank, pays
from klora_compile.reading.forms.lora import without_ones
from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Part,
    Shape,
    Shapes,
    Values,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.lazy_torch import torch

W1_A, W1_B, W2_A, W2_B, T1, T2 = (
    Part(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
)
_FIRST = (W1_A, W1_B)
_SECOND = (W2_A, W2_B)
_CORES = (T1, T2)


class Loha(Form):
    """The form of LoHa; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "loha"
    parts = (*_FIRST, *_SECOND, *_CORES)
    peft = MappingProxyType({"LOHA": "alpha"})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing((*_FIRST, *_SECOND), shapes)
        if absent:
            return absent
        cores = [part for part in _CORES if part in shapes]
        if len(cores) == 1:
            return [f"has only {cores[0].name}, expected both cores or neither"]
        fit = _fits_cores(shapes) if cores else _fits(shapes, layer.kernel)
        expected = (
            "a (rank, out), b (rank, in), t (rank, rank, height, width)"
            if cores
            else "a (out, rank), b (rank, in) or (rank, in, height, width)"
        )
        found = shapes_text(self.parts, shapes)
        return [] if fit else [f"{found} make no LoHa: expected {expected}"]

    def rank(self, layer: Header) -> int:
        return layer.shapes[W1_B][0]

    def shape(self, layer: Header) -> Shape:
        shapes = layer.shapes
        if T1 in shapes:
            out, inner = shapes[W1_A][1], shapes[W1_B][1]
            return out, inner, *without_ones(shapes[T1][2:])
        out, (_, inner, *own) = shapes[W1_A][0], shapes[W1_B]
        return (
            (out, inner, *without_ones(tuple(own)))
            if own
            else with_kernel(out, inner, layer.kernel)
        )

    def is_dense(self, layer: Header) -> bool:
        shapes = layer.shapes
        if T1 in shapes:
            return True
        rank = shapes[W1_B][0] * shapes[W2_B][0]
        return not pays(rank, shapes[W1_A][0], math.prod(shapes[W1_B][1:]))

    def delta(self, layer: Header, values: Values) -> tuple[LowRank | Dense, float]:
        tensors, kernel = values.tensors, layer.kernel
        a1, b1, a2, b2 = (tensors[part].double() for part in (*_FIRST, *_SECOND))
        if b1.dim() > 2:
            kernel = without_ones(b1.shape[2:])
            a1, b1, a2, b2 = (factor.flatten(1) for factor in (a1, b1, a2, b2))
        if T1 in tensors:
            t1, t2 = (tensors[part].double() for part in _CORES)
            product = tucker(t1, a1, b1) * tucker(t2, a2, b2)
            return Dense(product.float().reshape(self.shape(layer))), 0.0
        out, inner = a1.shape[0], b1.shape[1]
        if pays(a1.shape[1] * a2.shape[1], out, inner):
            up = (a1[:, :, None] * a2[:, None, :]).reshape(out, -1)
            down = (b1[:, None, :] * b2[None, :, :]).reshape(-1, inner)
            return low_rank(down, up, kernel), 0.0
        product = (a1 @ b1) * (a2 @ b2)
        return Dense(product.float().reshape(with_kernel(out, inner, kernel))), 0.0


def with_kernel(out: int, columns: int, kernel: Shape) -> Shape:
    """Return the shape of a weight whose kernel is folded into its columns."""
    size = 1
    for length in kernel:
        size *= length
    return out, columns // size, *kernel


def tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the weight (out, in, *kernel) of core (i, j, *kernel), a (i, out) and b (j, in)."""
    return torch.einsum("ij...,io,jn->on...", core, a, b)


def _fits(shapes: Shapes, kernel: Shape) -> bool:
    a1, b1, a2, b2 = found = [shapes[part] for part in (*_FIRST, *_SECOND)]
    if any(0 in shape for shape in found) or not 2 <= len(b1) <= 5:
        return False
    if any(len(shape) != len(b1) for shape in found) or {1} < {1, *a1[2:], *a2[2:]}:
        return False
    if len(b1) > 2:
        return (a1[1], a2[1], a1[0], b1[1:]) == (b1[0], b2[0], a2[0], b2[1:])
    size = with_kernel(1, 1, kernel)[2:]
    folded = 1
    for length in size:
        folded *= length
    return (
        a1[1] == b1[0]
        and a2[1] == b2[0]
        and a1[0] == a2[0]
        and b1[1] == b2[1]
        and b1[1] % folded == 0
    )


def _fits_cores(shapes: Shapes) -> bool:
    for (a, b), t in ((_FIRST, T1), (_SECOND, T2)):
        if not (len(shapes[a]) == len(shapes[b]) == 2 and 3 <= len(shapes[t]) <= 5):
            return False
        if shapes[t][:2] != (shapes[a][0], shapes[b][0]) or 0 in (*shapes[a], *shapes[b]):
            return False
    return (
        shapes[W1_A][1] == shapes[W2_A][1]
        and shapes[W1_B][1] == shapes[W2_B][1]
        and shapes[T1][2:] == shapes[T2][2:]
        and 0 not in shapes[T1]
        and 0 not in shapes[T2]
    )
