"""LoRA (arXiv 2106.09685) and LoCon: up @ down, optionally with a Tucker core between them.

A Tucker core (LyCORIS, ``lora_mid``) splits a convolution into three: 1x1 into the rank, the kernel
within the rank, and 1x1 out. Folding it into the first gives a pair of the same rank.

LyCORIS' ``extract_locon`` (``extract_diff`` in its ``utils``) may add the rest of the weight as a
sparse matrix: indices (2, n), values (n,) and size (2,).
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Part,
    Shape,
    Shapes,
    Tensors,
    Values,
    WrongValuesError,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.lazy_torch import torch

DOWN = Part(
    "down",
    (
        ".lora_A.weight",
        ".lora.down.weight",
        ".lora_down.weight",
        ".down.weight",
        ".lora_linear_layer.down.weight",
    ),
)
UP = Part(
    "up",
    (
        ".lora_B.weight",
        ".lora.up.weight",
        ".lora_up.weight",
        ".up.weight",
        ".lora_linear_layer.up.weight",
    ),
)
MID = Part("mid", (".lora_mid.weight",))
#: The sparse rest of an extracted weight.
REST = REST_INDICES, REST_VALUES, REST_SIZE = (
    Part("bias_indices", whole_numbers=True),
    Part("bias_values"),
    Part("bias_size", whole_numbers=True),
)
#: The bias of PEFT and musubi-tuner, scaled like the pair.
UP_BIAS = Part("bias of up", (".lora_B.bias", ".lora_up.bias"))

_PAIR = (DOWN, UP)


class Lora(Form):
    """The form of LoRA and LoCon; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "lora"
    parts = (DOWN, UP, MID, *REST)
    peft = MappingProxyType({"LORA": "lora_alpha"})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing(_PAIR, shapes)
        if absent:
            return absent
        down, up = shapes[DOWN], shapes[UP]
        if any(part in shapes for part in REST) and not _is_sparse(shapes):
            found = shapes_text(REST, shapes)
            expected = "indices (2, n), values (n,), size (2,)"
            return [f"{found} are not a sparse rest: expected {expected}"]
        if MID in shapes:
            return [] if _is_tucker(shapes) else [_no_tucker(shapes)]
        linear = len(down) == len(up) == 2
        conv = 3 <= len(down) == len(up) <= 5 and set(up[2:]) == {1}
        if not (linear or conv) or down[0] != up[1] or 0 in (*down, *up):
            return [
                f"down {list(down)} and up {list(up)} are not a low-rank pair: expected "
                "(rank, in) and (out, rank), or (rank, in, height, width) and (out, rank, 1, 1)"
            ]
        return []

    def rank(self, layer: Header) -> int:
        return layer.shapes[DOWN][0]

    def shape(self, layer: Header) -> Shape:
        shapes = layer.shapes
        tail = shapes[MID if MID in shapes else DOWN][2:]
        return shapes[UP][0], shapes[DOWN][1], *without_ones(tail)

    def is_dense(self, layer: Header) -> bool:
        return REST_VALUES in layer.shapes

    def delta(self, layer: Header, values: Values) -> tuple[LowRank | Dense, float]:
        tensors = values.tensors
        if REST_VALUES in tensors:
            pair = {part: tensor for part, tensor in tensors.items() if part not in REST}
            product, lost = self.delta(layer, replace(values, tensors=pair))
            rows, columns = self._places_of_rest(layer, tensors)
            total = product.matrix().double()
            total.index_put_((rows, columns), tensors[REST_VALUES].double(), accumulate=True)
            return Dense(total.float().reshape(self.shape(layer))), lost
        down, up = tensors[DOWN], tensors[UP]
        if MID in tensors:
            core = tensors[MID].double()
            folded = torch.einsum("ab...,bi->ai...", core, down.double().flatten(1))
            return low_rank(folded.flatten(1), up.double().flatten(1), core.shape[2:]), 0.0
        if not without_ones(down.shape[2:]):  # a 1x1 convolution is a linear layer
            down, up = down.flatten(1), up.flatten(1)
        return LowRank(down, up), 0.0

    def _places_of_rest(self, layer: Header, tensors: Tensors) -> torch.Tensor:
        """Return rows and columns of the rest, (2, n); columns include a convolution's kernel."""
        out, *columns = self.shape(layer)
        expected = [out, math.prod(columns)]
        size, places = tensors[REST_SIZE].long(), tensors[REST_INDICES].long()
        inside = bool((places >= 0).all()) and bool((places < size[:, None]).all())
        if size.tolist() != expected or not inside:
            raise WrongValuesError(f"its sparse rest is outside of a weight of {expected}")
        return places


def pair_of_file(down: FileTensor, up: FileTensor) -> LowRank:
    """Return the delta of a pair that is in a file as it is; :meth:`Lora.delta` gives the same."""
    if not without_ones(down.shape[2:]):
        down, up = down.flattened(), up.flattened()
    return LowRank.of_file(down, up)


def without_ones(kernel: Shape) -> Shape:
    """Return a kernel; empty if it is 1x1."""
    return tuple(kernel) if any(size > 1 for size in kernel) else ()


def _is_sparse(shapes: Shapes) -> bool:
    if any(part not in shapes for part in REST):
        return False
    count = math.prod(shapes[REST_VALUES])
    found = [shapes[part] for part in REST]
    return found == [(2, count), (count,), (2,)]


def _is_tucker(shapes: Shapes) -> bool:
    down, up, core = (shapes[part] for part in (*_PAIR, MID))
    return (
        3 <= len(core) <= 5
        and 2 <= len(down) <= len(core)
        and 2 <= len(up) <= len(core)
        and {1} >= {*down[2:], *up[2:]}
        and core[:2] == (up[1], down[0])
        and 0 not in (*down, *up, *core)
    )


def _no_tucker(shapes: Shapes) -> str:
    return (
        f"{shapes_text((*_PAIR, MID), shapes)} are not a Tucker triple: expected "
        "down (rank, in, 1, 1), mid (rank, rank, height, width), up (out, rank, 1, 1)"
    )
