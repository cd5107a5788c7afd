"""The values of a file's layers, converted to factors or to a dense delta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from klora_compile.reading.describing import Tensors
from klora_compile.reading.factoring import compact
from klora_compile.reading.forms.catalogue import BIASES, MAGNITUDES
from klora_compile.reading.forms.dora import Axis, dora_delta
from klora_compile.reading.forms.full import Full
from klora_compile.reading.forms.lora import DOWN, MID, REST, UP, pair_of_file
from klora_compile.reading.forms.parts import Need, Part, Peers, Shape, Values, WrongValuesError
from klora_compile.reading.layers import Layer, LayerFacts, Pair, layer_name
from klora_compile.reading.pieces import Piece
from klora_runtime.artifact.delta import Delta, Dense, is_finite
from klora_runtime.artifact.dtypes import REAL
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.artifact.tensor_file import without_float8
from klora_runtime.families.rows import Placement
from klora_runtime.lazy_torch import torch


class Weights(Protocol):
    """A base model with values."""

    def weight(self, component: str, module: str, parameter: str = "weight") -> torch.Tensor: ...


def evaluate(
    piece: Piece,
    file: Tensors,
    *,
    base: Weights | None,
    axis: Axis | None,
    max_error: float,
    peers: Mapping[str, Peers],
) -> Iterator[Layer | str]:
    """Yield the layers of a piece with their values, or their problems.

    Args:
        base: the base model, for pieces that need it.
        axis: the result of :func:`~klora_compile.reading.pieces.file_axis`.
        max_error: see :class:`~klora_compile.settings.read_options.ReadOptions`.
        peers: the result of :func:`~klora_compile.reading.pieces.peers`.
    """
    stored = _stored_pair(piece, file)
    if stored is not None:
        if not all(part.is_finite() for part in stored):
            yield "holds NaN or infinity"
            return
        yield from _placed(piece, pair_of_file(*stored), 0.0, max_error)
        return
    tensors = {part: without_float8(file.tensor(key)) for part, key in _numbers(piece)}
    if not all(map(is_finite, tensors.values())):
        yield "holds NaN or infinity"
        return
    values = _values(piece, tensors, base, max_error, peers)
    if isinstance(values, str):
        yield values
        return
    try:
        delta, lost = _delta(piece, values, axis)
    except WrongValuesError as error:
        yield str(error)
        return
    if not (_lies_as_it_is(piece) or delta.is_finite()):
        yield "its delta overflows float32"
        return
    yield from _placed(piece, delta, lost, max_error)


def _stored_pair(piece: Piece, file: Tensors) -> tuple[FileTensor, FileTensor] | None:
    """Return down and up of a piece that are in a file as they are; None for any other piece."""
    if piece.needs_base or not _is_pair(piece):
        return None
    keys = [piece.module.parts[part] for part in (DOWN, UP)]
    if any(file.tensors[key].dtype not in REAL for key in keys):
        return None
    down, up = (file.stored(key) for key in keys)
    return None if down is None or up is None else (down, up)


def _lies_as_it_is(piece: Piece) -> bool:
    """Return whether its layers are tensors of the file, without any computation."""
    stored = isinstance(piece.form, Full) and len(piece.facts.shape or ()) == 1
    return not piece.needs_base and (piece.part is not None or stored or _is_pair(piece))


def _numbers(piece: Piece) -> list[tuple[Part, str]]:
    """Return part and key of each tensor of a piece."""
    if piece.part is not None:
        return [(piece.part, piece.module.parts[piece.part])]
    own = [(part, key) for part, key in piece.module.parts.items() if part not in BIASES]
    return [*own, *piece.shared.items()]


def _values(
    piece: Piece,
    tensors: Mapping[Part, torch.Tensor],
    base: Weights | None,
    max_error: float,
    peers: Mapping[str, Peers],
) -> Values | str:
    """Return the values that a piece is computed from, or why the base model does not fit."""
    values = Values(tensors, max_error)
    if piece.form is not None:
        values = replace(values, peers=peers.get(piece.form.name, Peers()))
    if piece.needs is not Need.WEIGHT:
        return values
    assert base is not None
    weight = _of_base(piece, base, "weight")
    bias = _of_base(piece, base, "bias") if piece.facts.parameter == "bias" else None
    if isinstance(weight, str):
        return weight
    if isinstance(bias, str):
        return bias
    return replace(values, weight=weight, bias=bias)


def _delta(piece: Piece, values: Values, axis: Axis | None) -> tuple[Delta, float]:
    if piece.part is not None:
        return Dense(values.tensors[piece.part].reshape(piece.facts.shape or ())), 0.0
    assert piece.form is not None
    if piece.facts.parameter == "bias":
        return Dense(piece.form.bias_delta(piece.header, values).float()), 0.0
    delta, lost = piece.form.delta(piece.header, values)
    if piece.facts.form != "dora":
        return delta, lost
    assert axis is not None
    assert values.weight is not None
    magnitude = next(values.tensors[part] for part in MAGNITUDES if part in values.tensors)
    scaled = _scaling(piece.facts) * delta.matrix().reshape(values.weight.shape)
    return Dense(dora_delta(values.weight, scaled, magnitude, axis).float()), lost


def _placed(piece: Piece, delta: Delta, lost: float, max_error: float) -> Iterator[Layer]:
    for place, facts in zip(piece.places, piece.layers, strict=True):
        part = delta if place.rows is None else delta.rows(place.rows)
        small, rank, error = compact(part, max_error)
        if place.parameter is not None:  # no layer multiplies with it
            small, error = part, 0.0
        yield Layer(
            component=facts.component,
            module=facts.module,
            delta=small,
            rank=facts.rank if facts.rank is not None and facts.parameter == "weight" else rank,
            alpha=facts.alpha,
            alpha_source=facts.alpha_source,
            scaling=1.0 if facts.form == "dora" else _scaling(facts),
            form=facts.form,
            parameter=facts.parameter,
            error=math.hypot(lost, error),
            pair=_pair(piece, place),
        )


def _is_pair(piece: Piece) -> bool:
    plain = piece.form is not None and piece.facts.form == "lora"
    return plain and piece.module.parts.keys().isdisjoint((MID, *REST))


def _pair(piece: Piece, place: Placement) -> Pair | None:
    if not _is_pair(piece):
        return None
    parts = piece.module.parts
    return Pair(parts[DOWN], parts[UP], place.rows)


def _scaling(facts: LayerFacts) -> float:
    if facts.alpha is None or facts.rank is None:
        return 1.0
    return facts.alpha / facts.rank


def _shape(piece: Piece) -> Shape:
    """Return the shape of the weight of a piece, or beside it."""
    if piece.facts.parameter == "weight":
        assert piece.facts.shape is not None
        return piece.facts.shape
    assert piece.header.weight is not None
    return piece.header.weight


def _of_base(piece: Piece, base: Weights, parameter: str) -> torch.Tensor | str:
    """Return the base model's parameter for the piece's module, float64, or the problem.

    If the file joins several layers, the rows are in the order of the file.
    """
    shape = _shape(piece) if parameter == "weight" else _shape(piece)[:1]
    joined = torch.empty(shape, dtype=torch.float64)
    for place, layer in zip(piece.places, piece.layers, strict=True):
        name = parameter if place.parameter is None else place.parameter
        own = base.weight(layer.component, layer.module, name).double()
        rows = shape[0] if place.rows is None else sum(map(len, place.rows))
        expected = (rows, *shape[1:])
        if own.numel() != math.prod(expected):
            full = layer_name(layer.component, layer.module, name)
            return f"{full} is {list(own.shape)} in the base model, expected {list(expected)}"
        own = own.reshape(expected)
        if place.rows is None:
            return own
        start = 0
        for span in place.rows:
            joined[span.start : span.stop] = own[start : start + len(span)]
            start += len(span)
    return joined
