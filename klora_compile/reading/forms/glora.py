"""GLoRA (arXiv 2306.07967): a product with the weight, plus a low-rank delta.

LyCORIS: W A1 A2 + B1 B2, times alpha / rank; of a convolution A1 A2 mixes the input's channels.
Under ``rs_lora`` it trains with alpha / sqrt(rank), and writes alpha as it is, unlike in its other
forms: only the record of the training says it (``ss_network_args``).
Of a linear layer that is a pair of factors of twice the rank.

PEFT: the delta is W * A + B, element by element, where A and B are low-rank matrices, columns or
single numbers; the bias b becomes b + b * D + E + W C. Nothing is scaled.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.factoring import low_rank, pays
from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Need,
    Part,
    Shape,
    Shapes,
    Tensors,
    Values,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.lazy_torch import torch

A1, A2, B1, B2, BM = (Part(name, (f".{name}.weight",)) for name in ("a1", "a2", "b1", "b2", "bm"))


class Glora(Form):
    """The form of LyCORIS' GLoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "glora"
    parts = (A1, A2, B1, B2, BM)
    needs = Need.WEIGHT
    root_is_folded = False

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing((A1, A2, B1, B2), shapes)
        if absent:
            return absent
        if not _fits(shapes):
            expected = "a1 (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in, kernel)"
            return [f"{shapes_text(self.parts, shapes)} make no GLoRA: expected {expected}"]
        own = self.shape(layer)
        if layer.weight is not None and math.prod(layer.weight) != math.prod(own):
            return [f"its delta is {list(own)}, and the base model's weight {list(layer.weight)}"]
        return []

    def rank(self, layer: Header) -> int:
        return layer.shapes[A2][0]

    def shape(self, layer: Header) -> Shape:
        shapes = layer.shapes
        kernel = shapes[BM if BM in shapes else B2][2:]
        own = tuple(kernel) if any(size > 1 for size in kernel) else ()
        return shapes[B1][0], shapes[B2][1], *own

    def is_dense(self, layer: Header) -> bool:
        out, inner, *kernel = self.shape(layer)
        return bool(kernel) or not pays(2 * self.rank(layer), out, inner)

    def delta(self, layer: Header, values: Values) -> tuple[LowRank | Dense, float]:
        assert values.weight is not None
        weight = values.weight
        a1, a2, b1, b2 = (values.tensors[part].double() for part in (A1, A2, B1, B2))
        a1, a2, b1 = a1.flatten(1), a2.flatten(1), b1.flatten(1)
        if weight.dim() == 2:
            b2 = b2.flatten(1)
            return low_rank(torch.cat([a2, b2]), torch.cat([weight @ a1, b1], dim=1)), 0.0
        if BM in values.tensors:
            core = values.tensors[BM].double()
            added = torch.einsum("mn...,om,ni->oi...", core, b1, b2.flatten(1))
        else:
            added = torch.einsum("or,ri...->oi...", b1, b2)
        mixed = torch.einsum("oj...,jr,ri->oi...", weight, a1, a2)
        return Dense((mixed + added).float()), 0.0


def _fits(shapes: Shapes) -> bool:
    a1, a2, b1, b2 = (shapes[part] for part in (A1, A2, B1, B2))
    if min(map(len, (a1, a2, b1, b2))) < 2 or 0 in (*a1, *a2, *b1, *b2):
        return False
    ones = {1} >= {*a1[2:], *a2[2:], *b1[2:]}
    core = shapes.get(BM)
    if core is not None and (core[:2] != (b1[1], b2[0]) or len(core) < 3 or 0 in core):
        return False
    return ones and a1[0] == a2[1] == b2[1] and a1[1] == a2[0] == b1[1] == b2[0]


def _path(letter: str) -> tuple[Part, Part, Part, Part]:
    """Return the parts of one of PEFT's matrices: two factors, one tensor, or ``zeros``."""
    return (
        Part(f"glora_{letter}.Xd"),
        Part(f"glora_{letter}.Xu"),
        Part(f"glora_{letter}.X"),
        Part(f"glora_{letter}.zeros"),
    )


_PATHS = {letter: _path(letter) for letter in "ABCDE"}


class PeftGlora(Form):
    """The form of PEFT's GLoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "glora"
    parts = tuple(part for path in _PATHS.values() for part in path)
    needs = Need.WEIGHT
    peft = MappingProxyType({"GLORA": None})

    def problems(self, layer: Header) -> list[str]:
        for letter, path in _PATHS.items():
            problem = _path_problem(letter, path, layer)
            if problem:
                return [problem]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        weight = values.weight
        scale, added = (_value(values.tensors, letter) for letter in "AB")
        return Dense((weight * scale + added.expand(weight.shape)).float()), 0.0

    def changes_bias(self, layer: Header) -> bool:
        parts = {part for letter in "CDE" for part in _PATHS[letter][:3]}
        return layer.has_bias and not parts.isdisjoint(layer.shapes)

    def bias_delta(self, layer: Header, values: Values) -> torch.Tensor:
        assert values.weight is not None
        assert values.bias is not None
        column, scale, added = (_value(values.tensors, letter) for letter in "CDE")
        mixed = (values.weight @ column.expand(values.weight.shape[1], 1)).squeeze(1)
        return values.bias * scale.flatten() + added.flatten() + mixed


def _path_problem(letter: str, path: tuple[Part, Part, Part, Part], layer: Header) -> str:
    shapes, weight = layer.shapes, layer.weight
    down, up, whole, _ = path
    if (down in shapes) != (up in shapes):
        return f"has {shapes_text(path, shapes)}, expected both factors or neither"
    found = {part for part in path if part in shapes}
    if len(found - {up}) > 1:
        return f"{shapes_text(path, shapes)} are two of one matrix"
    if down in shapes:
        own: Shape = (shapes[down][0], shapes[up][-1])
        if shapes[down][-1] != shapes[up][0] or len(shapes[down]) != 2 or len(shapes[up]) != 2:
            return f"{shapes_text(path, shapes)} are not factors"
    elif whole in shapes:
        own = shapes[whole]
    else:
        return ""
    if weight is None:
        return ""
    out, inner = weight[:2]
    expected: dict[str, tuple[Shape, ...]] = {
        "A": ((out, inner), (out, 1), (1,)),
        "C": ((inner, 1),),
        "D": ((out,), (1,)),
    }
    allowed = expected[{"B": "A", "E": "D"}.get(letter, letter)]
    if own not in allowed or len(weight) > 2:
        return f"{shapes_text(path, shapes)} do not fit the base model's weight {list(weight)}"
    return ""


def _value(tensors: Tensors, letter: str) -> torch.Tensor:
    down, up, whole, _ = _PATHS[letter]
    if down in tensors:
        return tensors[down].double() @ tensors[up].double()
    if whole in tensors:
        return tensors[whole].double()
    return torch.zeros(1, dtype=torch.float64)
