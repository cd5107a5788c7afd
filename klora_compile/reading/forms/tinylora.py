"""TinyLoRA (arXiv 2602.04118): a fixed pair with a mix of random matrices between its factors.

The delta is B (v_1 P_1 + v_2 P_2 + ...) A. The file has A, B and P of each layer, and the vectors
v, which layers may share. A layer's number in the trained model determines its vector. That number
is in no file, but ``projection_seed`` plus the number is the seed of P, so P shows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
    Form,
    Header,
    Part,
    Shape,
    Values,
    WrongValuesError,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import LowRank
from klora_runtime.lazy_torch import torch

A, B, P = Part("tinylora_A"), Part("tinylora_B"), Part("tinylora_P")

_VECTOR = "tinylora_v."

#: Relative tolerance of the numbers of P; bfloat16 has eight bits.
_ROUNDING = 2.0**-7
#: Number of values of P that suffices to distinguish two layers.
_ENOUGH = 64
#: Greatest size of P, which is drawn for each layer of the file; published ones have 256 numbers.
_MOST = 2**20


class Tinylora(Form):
    """The form of TinyLoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "tinylora"
    parts = (A, B, P)
    shared_beginnings = (_VECTOR,)
    peft = MappingProxyType({"TINYLORA": None})

    def problems(self, layer: Header) -> list[str]:
        shapes, settings = layer.shapes, layer.settings
        if P not in shapes:
            return ["has no tinylora_P; save it with save_projection=True"]
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        vectors = _vectors(shapes)
        if not vectors:
            return ["the file has no tinylora_v"]
        a, b, p = (shapes[part] for part in self.parts)
        fits = len(a) == len(b) == 2 and a[0] == b[1] and p[1:] == (a[0], a[0])
        fits = fits and all(shapes[part] == p[:1] for part in vectors)
        if not fits or 0 in (*a, *b) or math.prod(p) > _MOST:
            return [f"{shapes_text((*self.parts, *vectors[:1]), shapes)} do not fit each other"]
        seed, tying = settings.get("projection_seed"), settings.get("weight_tying")
        if type(seed) is not int or not isinstance(tying, int | float) or not 0 <= tying <= 1:
            return [f"PEFT's configuration says whose its vectors are; {KEEP_CONFIG}"]
        return []

    def shape(self, layer: Header) -> Shape:
        return layer.shapes[B][0], layer.shapes[A][1]

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        a, b, p = (values.tensors[part].double() for part in self.parts)
        mixed = torch.einsum("u,uij->ij", _own(layer, values).double(), p)
        return low_rank(mixed @ a, torch.as_tensor(b)), 0.0


def _vectors(parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if part.name.startswith(_VECTOR)]


def _own(layer: Header, values: Values) -> torch.Tensor:
    """Return the vector of a layer."""
    vectors = {part.name.removeprefix(_VECTOR): part for part in _vectors(values.tensors)}
    count, tying = values.peers.count, layer.settings["weight_tying"]
    groups = max(1, round(count * (1.0 - tying)))
    number = _number(layer, values.tensors[P], count) if groups > 1 else 0
    name = str(min(number // (count // groups), groups - 1))
    if name not in vectors:
        raise WrongValuesError(f"the file has no {_VECTOR}{name}, which is its vector")
    return values.tensors[vectors[name]]


def _number(layer: Header, p: torch.Tensor, count: int) -> int:
    """Return the layer's number in the trained model, from 0."""
    candidates = _beginnings(layer.settings["projection_seed"], count, tuple(p.shape))
    own = p.flatten()[: candidates.shape[1]].float()
    away = (candidates - own).abs() > _ROUNDING * own.abs() + 1e-6
    found = (~away.any(dim=1)).nonzero().flatten().tolist()
    if len(found) != 1:
        raise WrongValuesError(
            "its tinylora_P did not grow from the projection_seed of PEFT's configuration, so that "
            "nothing tells which vector is its own"
        )
    return int(found[0])


@lru_cache(maxsize=8)
def _beginnings(seed: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the first numbers of P of each layer, (count, n)."""
    rows = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        std = 1.0 / shape[1] ** 0.5
        rows.append(torch.normal(0.0, std, size=shape, generator=generator).flatten()[:_ENOUGH])
    return torch.stack(rows)
