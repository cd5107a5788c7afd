"""Checks of a module's tensors: dtypes, shapes that fit each other, and sizes.

Each check yields full sentences, so that a refusal lists all problems at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from klora_compile.reading.forms.lora import UP_BIAS
from klora_compile.reading.forms.parts import ALPHA, Form, Header, Part
from klora_compile.reading.pieces import Piece
from klora_runtime.artifact.dtypes import DTYPES, FLOAT8, REAL
from klora_runtime.artifact.safetensors_file import TensorInfo

#: Greatest number of elements of a delta. The largest of a published model has 0.2 of this.
MAX_ELEMENTS = 2**29

#: Dtypes of indices and flags.
_NUMBERS = frozenset(REAL + FLOAT8)
_INTEGERS = ("U8", "I16", "I32", "I64")


def dtype_problems(tensors: Mapping[Part, TensorInfo]) -> Iterator[str]:
    """Yield the problems of a module's dtypes, and of the shape of its alpha."""
    for part, info in tensors.items():
        if part is ALPHA:
            if math.prod(info.shape) != 1:
                yield "alpha is not one number"
            continue
        if part.whole_numbers:
            if info.dtype not in _INTEGERS:
                found = DTYPES[info.dtype].in_torch
                yield f"{part.name} is torch.{found}, expected uint8, int16, int32 or int64"
            continue
        if info.dtype not in _NUMBERS:
            found = DTYPES[info.dtype].in_torch
            yield (f"{part.name} is torch.{found}, expected float32, float16, bfloat16 or float8")


def form_problems(form: Form | None, header: Header) -> list[str]:
    """Return the problems of a module's shapes; ``form`` is None if only a bias changes."""
    if form is not None:
        return form.problems(header)
    return ["has lora_B.bias but no lora_B.weight"] if UP_BIAS in header.shapes else []


def size_problems(weights: Sequence[Piece], biases: Sequence[Piece]) -> Iterator[str]:
    """Yield the problems of the sizes of a module's deltas, and of a weight and its bias."""
    for piece in (*weights, *biases):
        shape = piece.facts.shape
        if shape is None:
            continue
        if math.prod(shape) > MAX_ELEMENTS:
            yield (
                f"its delta {list(shape)} would have {math.prod(shape)} elements, at most "
                f"{MAX_ELEMENTS} are read"
            )
        if piece.part is not None and len(shape) != 1:
            yield f"its bias is {list(shape)}, expected one dimension"
    if len(biases) > 1:
        yield "has two biases"
    whole = weights[0].facts.shape if weights else None
    own = biases[0].facts.shape if biases else None
    if whole is not None and own is not None and own != whole[:1]:
        rows, found = whole[0], list(own)
        yield f"its bias is {found}, expected [{rows}], one value for each row of its weight"
