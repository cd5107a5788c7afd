"""LoKr (LyCORIS, arXiv 2309.14859): the Kronecker product of two full or factored matrices.

kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2), so it is a pair of factors of rank r1 r2; a full
matrix counts as its own factor beside an identity. If both are full, the singular values of the
product are the products of theirs, which give the smallest rank without computing the matrix.
LyCORIS divides alpha by the rank of a factored matrix and has no scale if both are full.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.factoring import kronecker, low_rank, pays
from klora_compile.reading.forms.loha import tucker, with_kernel
from klora_compile.reading.forms.lora import without_ones
from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Part,
    Shape,
    Shapes,
    Tensors,
    Values,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.lazy_torch import torch

W1, W1_A, W1_B, W2, W2_A, W2_B, T2 = (
    Part(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
)
_FIRST = (W1_A, W1_B)
_SECOND = (W2_A, W2_B)


class Lokr(Form):
    """The form of LoKr; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "lokr"
    parts = (W1, *_FIRST, W2, *_SECOND, T2)
    settings_state_rank = True
    peft = MappingProxyType({"LOKR": "alpha"})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        for whole, pair in ((W1, _FIRST), (W2, _SECOND)):
            found = [part.name for part in (whole, *pair) if part in shapes]
            if found not in ([whole.name], [part.name for part in pair]):
                named = ", ".join(found) or f"neither {whole.name} nor its factors"
                return [f"has {named}, expected {whole.name}, or {' and '.join(_names(pair))}"]
        fit = _fits(shapes) and self._folds(shapes, layer.kernel)
        text = shapes_text(self.parts, shapes)
        return [] if fit else [f"{text} make no LoKr: w1 and w2 do not fit each other"]

    def rank(self, layer: Header) -> int | None:
        ranks = [layer.shapes[b][0] for b in (_SECOND[1], _FIRST[1]) if b in layer.shapes]
        return ranks[0] if ranks else None

    def shape(self, layer: Header) -> Shape:
        return self._shape(layer.shapes, layer.kernel)

    def _shape(self, shapes: Shapes, kernel: Shape) -> Shape:
        a, b = _first_shape(shapes)
        c, d, *own = _second_shape(shapes)
        if own:
            return a * c, b * d, *without_ones(tuple(own))
        return with_kernel(a * c, b * d, kernel)

    def is_dense(self, layer: Header) -> bool:
        shapes = layer.shapes
        (a, b), (c, *d) = _first_shape(shapes), _second_shape(shapes)
        first = shapes[_FIRST[1]][0] if _FIRST[1] in shapes else min(a, b)
        second = shapes[_SECOND[1]][0] if _SECOND[1] in shapes else min(c, math.prod(d))
        if T2 in shapes:
            second = min(c, math.prod(d))
        return not pays(first * second, a * c, b * math.prod(d))

    def delta(self, layer: Header, values: Values) -> tuple[LowRank | Dense, float]:
        tensors, error = values.tensors, values.error
        shape = self.shape(layer)
        out, inner = shape[0], math.prod(shape[1:])
        first, second = _pair(tensors, W1, _FIRST), _pair(tensors, W2, _SECOND)
        if T2 in tensors:
            core, a, b = (tensors[part].double() for part in (T2, *_SECOND))
            second = (tucker(core, a, b).flatten(1),)
        if len(first) == len(second) == 1:
            found = kronecker(first[0], second[0], error)
            if found is not None:
                down, up, lost = found
                return low_rank(down, up, shape[2:]), lost
        else:
            (u1, d1), (u2, d2) = _factors(first), _factors(second)
            if pays(len(d1) * len(d2), out, inner):
                return low_rank(torch.kron(d1, d2), torch.kron(u1, u2), shape[2:]), 0.0
        product = torch.kron(_product(first), _product(second))
        return Dense(product.float().reshape(shape)), 0.0

    def _folds(self, shapes: Shapes, kernel: Shape) -> bool:
        """Return whether the columns of a convolution without a core hold its kernel."""
        own = len(_second_shape(shapes)) > 2
        return own or math.prod(_second_shape(shapes)[1:]) % math.prod(kernel) == 0


def _names(parts: tuple[Part, ...]) -> list[str]:
    return [part.name for part in parts]


def _first_shape(shapes: Shapes) -> Shape:
    if W1 in shapes:
        return shapes[W1]
    return shapes[_FIRST[0]][0], shapes[_FIRST[1]][1]


def _second_shape(shapes: Shapes) -> Shape:
    """Return (c, d), and the kernel if the tensors show it."""
    if W2 in shapes:
        return shapes[W2]
    a, b = (shapes[part] for part in _SECOND)
    if T2 in shapes:
        return a[1], b[1], *shapes[T2][2:]
    return a[0], b[1]


def _fits(shapes: Shapes) -> bool:
    if any(0 in shapes[part] for part in Lokr.parts if part in shapes):
        return False
    matrices = [shapes[part] for part in (W1, *_FIRST, *_SECOND) if part in shapes]
    whole = shapes.get(W2)
    if any(len(shape) != 2 for shape in matrices) or (whole and not 2 <= len(whole) <= 5):
        return False
    if _FIRST[0] in shapes and shapes[_FIRST[0]][1] != shapes[_FIRST[1]][0]:
        return False
    ranks = {shapes[b][0] for b in (_FIRST[1], _SECOND[1]) if b in shapes}
    if len(ranks) > 1:  # it would be unclear which rank divides alpha
        return False
    core = shapes.get(T2)
    if core is not None:
        fitting = _SECOND[0] in shapes and 3 <= len(core) <= 5
        return fitting and core[:2] == (shapes[_SECOND[0]][0], shapes[_SECOND[1]][0])
    return _SECOND[0] not in shapes or shapes[_SECOND[0]][1] == shapes[_SECOND[1]][0]


def _pair(tensors: Tensors, whole: Part, pair: tuple[Part, Part]) -> tuple[torch.Tensor, ...]:
    """Return a matrix as one tensor or as two factors, float64."""
    parts = (whole,) if whole in tensors else pair
    return tuple(tensors[part].double().flatten(1) for part in parts)


def _factors(matrix: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (up, down) of a matrix; a full matrix gets an identity on its shorter side."""
    if len(matrix) == 2:
        return matrix[0], matrix[1]
    (whole,) = matrix
    rows, columns = whole.shape
    identity = torch.eye(min(rows, columns), dtype=whole.dtype)
    return (whole, identity) if columns <= rows else (identity, whole)


def _product(matrix: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return matrix[0] if len(matrix) == 1 else matrix[0] @ matrix[1]
