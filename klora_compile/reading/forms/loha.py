"""LoHa (FedPara, arXiv 2108.06098): the elementwise product of two low-rank matrices.

(A1 B1) * (A2 B2) is a sum over pairs of their columns, so that it is itself a pair of factors, of
rank r squared. Where those are more numbers than the matrix, the matrix is made. With Tucker cores
(``hada_t1``, ``hada_t2``) the matrices are those of a convolution, the factors' dimensions the
other way round, as LyCORIS writes them.
"""

from __future__ import annotations

import torch

from klora_compile.reading.factoring import low_rank, pays
from klora_compile.reading.forms.parts import Part, Shape, Shapes, Tensors, missing, shapes_text
from klora_runtime.artifact.delta import Dense, LowRank

_FIRST = (Part.HADA_W1_A, Part.HADA_W1_B)
_SECOND = (Part.HADA_W2_A, Part.HADA_W2_B)
_CORES = (Part.HADA_T1, Part.HADA_T2)


class Loha:
    """See :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "loha"
    parts = (*_FIRST, *_SECOND, *_CORES)

    def problems(self, shapes: Shapes, kernel: Shape) -> list[str]:
        absent = missing((*_FIRST, *_SECOND), shapes)
        if absent:
            return absent
        cores = [part for part in _CORES if part in shapes]
        if len(cores) == 1:
            return [f"has only {cores[0].value}, expected both cores or neither"]
        fit = _fits_cores(shapes) if cores else _fits(shapes, kernel)
        expected = (
            "a (rank, out), b (rank, in), t (rank, rank, height, width)"
            if cores
            else "a (out, rank), b (rank, in)"
        )
        found = shapes_text(self.parts, shapes)
        return [] if fit else [f"{found} make no LoHa: expected {expected}"]

    def rank(self, shapes: Shapes) -> int:
        return shapes[Part.HADA_W1_B][0]

    def shape(self, shapes: Shapes, kernel: Shape) -> Shape:
        if Part.HADA_T1 in shapes:
            out, inner = shapes[Part.HADA_W1_A][1], shapes[Part.HADA_W1_B][1]
            return out, inner, *shapes[Part.HADA_T1][2:]
        return with_kernel(shapes[Part.HADA_W1_A][0], shapes[Part.HADA_W1_B][1], kernel)

    def is_dense(self, shapes: Shapes, kernel: Shape) -> bool:
        if Part.HADA_T1 in shapes:
            return True
        rank = shapes[Part.HADA_W1_B][0] * shapes[Part.HADA_W2_B][0]
        return not pays(rank, shapes[Part.HADA_W1_A][0], shapes[Part.HADA_W1_B][1])

    def delta(self, tensors: Tensors, kernel: Shape, error: float) -> tuple[LowRank | Dense, float]:
        a1, b1, a2, b2 = (tensors[part].double() for part in (*_FIRST, *_SECOND))
        if Part.HADA_T1 in tensors:
            t1, t2 = (tensors[part].double() for part in _CORES)
            product = tucker(t1, a1, b1) * tucker(t2, a2, b2)
            return Dense(product.float()), 0.0
        out, inner = a1.shape[0], b1.shape[1]
        if pays(a1.shape[1] * a2.shape[1], out, inner):
            up = (a1[:, :, None] * a2[:, None, :]).reshape(out, -1)
            down = (b1[:, None, :] * b2[None, :, :]).reshape(-1, inner)
            return low_rank(down, up, kernel), 0.0
        product = (a1 @ b1) * (a2 @ b2)
        return Dense(product.float().reshape(with_kernel(out, inner, kernel))), 0.0


def with_kernel(out: int, columns: int, kernel: Shape) -> Shape:
    """Shape of a weight whose kernel is folded into its columns."""
    size = 1
    for length in kernel:
        size *= length
    return out, columns // size, *kernel


def tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The weight (out, in, *kernel) of a core (i, j, *kernel) between a (i, out) and b (j, in)."""
    return torch.einsum("ij...,io,jn->on...", core, a, b)


def _fits(shapes: Shapes, kernel: Shape) -> bool:
    found = [shapes[part] for part in (*_FIRST, *_SECOND)]
    if any(len(shape) != 2 or 0 in shape for shape in found):
        return False
    a1, b1, a2, b2 = found
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
    for (a, b), t in ((_FIRST, Part.HADA_T1), (_SECOND, Part.HADA_T2)):
        if not (len(shapes[a]) == len(shapes[b]) == 2 and 3 <= len(shapes[t]) <= 5):
            return False
        if shapes[t][:2] != (shapes[a][0], shapes[b][0]) or 0 in (*shapes[a], *shapes[b]):
            return False
    return (
        shapes[Part.HADA_W1_A][1] == shapes[Part.HADA_W2_A][1]
        and shapes[Part.HADA_W1_B][1] == shapes[Part.HADA_W2_B][1]
        and shapes[Part.HADA_T1][2:] == shapes[Part.HADA_T2][2:]
        and 0 not in shapes[Part.HADA_T1]
        and 0 not in shapes[Part.HADA_T2]
    )
