"""The values of a file's layers, each brought to factors or to a dense delta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from klora_compile.reading.describing import Tensors
from klora_compile.reading.factoring import compact
from klora_compile.reading.forms.catalogue import BIASES, MAGNITUDES
from klora_compile.reading.forms.dora import Axis, dora_delta
from klora_compile.reading.forms.full import Full
from klora_compile.reading.forms.parts import Part
from klora_compile.reading.layers import Layer, LayerFacts, Pair
from klora_compile.reading.pieces import Piece
from klora_runtime.artifact.delta import Delta, Dense, is_finite
from klora_runtime.artifact.tensor_file import without_float8
from klora_runtime.families.rows import Placement


class Weights(Protocol):
    """A base model."""

    def weight(self, component: str, module: str, parameter: str = "weight") -> torch.Tensor: ...


def evaluate(
    piece: Piece,
    file: Tensors,
    *,
    base: Weights | None,
    axis: Axis | None,
    max_error: float,
) -> Iterator[Layer | str]:
    """The layers of a piece with their values, or what is wrong with them.

    Args:
        base: the base model, for pieces that need it.
        axis: of :func:`~klora_compile.reading.pieces.file_axis`.
        max_error: see :class:`~klora_compile.settings.read_options.ReadOptions`.
    """
    tensors = {part: without_float8(file.tensor(key)) for part, key in _numbers(piece)}
    if not all(map(is_finite, tensors.values())):
        yield "holds NaN or infinity"
        return
    delta, lost = _delta(piece, tensors, max_error)
    if piece.needs_base:
        assert base is not None
        found = _against_base(piece, delta, tensors, base, axis)
        if isinstance(found, str):
            yield found
            return
        delta = found
    if not (_lies_as_it_is(piece) or delta.is_finite()):
        yield "its delta overflows float32"
        return
    yield from _placed(piece, delta, lost, max_error)


def _lies_as_it_is(piece: Piece) -> bool:
    """Whether its layers are numbers of the file, none of them computed."""
    stored = isinstance(piece.form, Full) and len(piece.facts.shape) == 1
    return not piece.needs_base and (piece.part is not None or stored or _is_pair(piece))


def _numbers(piece: Piece) -> list[tuple[Part, str]]:
    """Parts and keys of the tensors that a piece is made of; its description has the alpha."""
    if piece.part is not None:
        return [(piece.part, piece.module.parts[piece.part])]
    others = {Part.ALPHA, *BIASES}
    return [(part, key) for part, key in piece.module.parts.items() if part not in others]


def _delta(
    piece: Piece, tensors: Mapping[Part, torch.Tensor], max_error: float
) -> tuple[Delta, float]:
    if piece.part is not None:
        return Dense(tensors[piece.part]), 0.0
    assert piece.form is not None
    return piece.form.delta(tensors, piece.kernel, max_error)


def _placed(piece: Piece, delta: Delta, lost: float, max_error: float) -> Iterator[Layer]:
    for place, facts in zip(piece.places, piece.layers, strict=True):
        part = delta if place.rows is None else delta.rows(place.rows)
        small, rank, error = compact(part, max_error)
        yield Layer(
            component=facts.component,
            module=facts.module,
            delta=small,
            rank=facts.rank if facts.rank is not None and facts.parameter == "weight" else rank,
            alpha=facts.alpha,
            alpha_source=facts.alpha_source,
            scaling=1.0 if piece.needs_base else _scaling(facts),
            form=facts.form,
            parameter=facts.parameter,
            error=math.hypot(lost, error),
            pair=_pair(piece, place),
        )


def _is_pair(piece: Piece) -> bool:
    plain = piece.form is not None and piece.facts.form == "lora"
    return plain and Part.MID not in piece.module.parts


def _pair(piece: Piece, place: Placement) -> Pair | None:
    if not _is_pair(piece):
        return None
    parts = piece.module.parts
    return Pair(parts[Part.DOWN], parts[Part.UP], place.rows)


def _scaling(facts: LayerFacts) -> float:
    if facts.alpha is None or facts.rank is None:
        return 1.0
    return facts.alpha / facts.rank


def _against_base(
    piece: Piece,
    delta: Delta,
    tensors: Mapping[Part, torch.Tensor],
    base: Weights,
    axis: Axis | None,
) -> Dense | str:
    """The delta of a piece that says what the weight becomes."""
    shape = piece.facts.shape
    weight = torch.empty(shape, dtype=torch.float64)
    for place, layer in zip(piece.places, piece.layers, strict=True):
        own = base.weight(layer.component, layer.module).double()
        if own.numel() != math.prod(layer.shape):
            return (
                f"{layer.name} is {list(own.shape)} in the base model, expected {list(layer.shape)}"
            )
        own = own.reshape(layer.shape)
        if place.rows is None:
            weight = own
            continue
        start = 0
        for rows in place.rows:
            weight[rows.start : rows.stop] = own[start : start + len(rows)]
            start += len(rows)
    if piece.facts.form == "value":
        return Dense((delta.matrix().reshape(shape) - weight).float())
    assert axis is not None
    magnitude = next(tensors[part] for part in MAGNITUDES if part in tensors)
    scaled = _scaling(piece.facts) * delta.matrix().reshape(shape)
    return Dense(dora_delta(weight, scaled, magnitude, axis).float())
