"""The rules of ``FORMAT.md`` for factors: what is stored of one slot in one entry, by its form.

A form is a kind with an encoding; a new one is a new row of :data:`_FORMS`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from klora_runtime.errors import ArtifactError, shown
from klora_runtime.fusion import Dense, Factors, Reference
from klora_runtime.quantised import MAX_WIDTH, Quantised, Vectors, unpack
from klora_runtime.safetensors_file import TensorInfo


class _Form(NamedTuple):
    tensors: tuple[str, ...]
    """The keys that name its tensors."""
    dtypes: tuple[str, ...]
    others: tuple[str, ...] = ()
    """Its keys besides these, the kind, the encoding and the scale."""


_REAL = ("F32", "F16", "BF16")
_PACKED = _Form(("packed",), ("U8",), ("error", "widths"))
_FORMS: Mapping[tuple[str, str], _Form] = {
    ("lowrank", "plain"): _Form(("down", "up"), _REAL),
    ("lowrank", "q"): _PACKED,
    ("dense", "plain"): _Form(("delta",), _REAL),
    ("dense", "q"): _PACKED,
    ("reference", "plain"): _Form((), (), ("down", "rows", "source", "up")),
}
_KINDS = {kind for kind, _ in _FORMS}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number of the format's range."""
    return type(value) in (int, float) and abs(value) < 1e38  # false for NaN as well


def factors_problems(
    value: Any,
    shape: list[int],
    tensors: Mapping[str, TensorInfo],
    used: set[str],
    sources: Collection[str],
) -> Iterator[tuple[str, str]]:
    """What is wrong with the factors of one slot: where inside them, and what.

    Args:
        shape: of the entry's parameter.
        tensors: the file's, by name.
        used: gets the names of those that are used here.
        sources: of the slot.
    """
    if not isinstance(value, dict):
        yield "", "expected an object"
        return
    kind, encoding = value.get("kind"), value.get("encoding")
    if not isinstance(kind, str) or kind not in _KINDS:
        yield "", f"unknown kind {shown(kind)}; update klora"
        return
    form = _FORMS.get((kind, encoding)) if isinstance(encoding, str) else None
    if form is None:
        yield "", f"unknown encoding {shown(encoding)}; update klora"
        return
    expected = {"kind", "encoding", "scale", *form.tensors, *form.others}
    missing, unknown = sorted(expected - set(value)), sorted(set(value) - expected)
    if missing:
        yield "", f"lacks {', '.join(missing)}"
    if unknown:
        yield "", f"has unknown keys {', '.join(map(shown, unknown))}; update klora"
    if missing or unknown:
        return
    if not is_number(value["scale"]):
        yield ".scale", f"not a number: {shown(value['scale'])}"
    if kind == "reference":
        yield from _reference_problems(value, shape, sources)
        return
    found: dict[str, tuple[int, ...]] = {}
    for part in form.tensors:
        name = value[part]
        info = tensors.get(name) if isinstance(name, str) else None
        if info is None:
            yield f".{part}", f"no tensor {shown(name)} in the file"
            continue
        used.add(name)
        if info.dtype not in form.dtypes:
            yield f".{part}", f"dtype {info.dtype}, expected {form.dtypes}"
        found[part] = info.shape
    if encoding == "q":
        yield from _packed_problems(value, shape, found.get("packed"))
    elif len(found) == len(form.tensors) and not _make(kind, found, shape):
        shapes = " and ".join(f"{part} {list(size)}" for part, size in found.items())
        verb = "do" if len(found) > 1 else "does"
        yield "", f"{shapes} {verb} not make {shape}"


def factors_of(
    value: Mapping[str, Any], shape: Sequence[int], tensors: Mapping[str, torch.Tensor]
) -> Factors | Dense:
    """Checked factors as values.

    Raises:
        ArtifactError: a scale of packed numbers is NaN or infinite, which only they tell.
    """
    scale, kind = float(value["scale"]), value["kind"]
    stored = [tensors[value[part]] for part in _FORMS[kind, value["encoding"]].tensors]
    if value["encoding"] == "plain":
        return Dense(scale, stored[0]) if kind == "dense" else Factors(scale, stored[0], stored[1])
    quantised = Quantised(tuple(value["widths"]), stored[0], float(value["error"]))
    factors = from_quantised(scale, quantised, shape, dense=kind == "dense")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in factors.tensors):
        raise ArtifactError(f"tensor {value['packed']}: holds a scale that is NaN or infinite.")
    return factors


def from_quantised(
    scale: float, quantised: Quantised, shape: Sequence[int], *, dense: bool
) -> Factors | Dense:
    """Packed numbers as what they stand for, in float32.

    Args:
        scale: alpha / rank of the source.
        shape: of the parameter.
        dense: whether they are a delta, not its factors.
    """
    vectors = vectors_of(shape, dense=dense)
    values = unpack(quantised.packed, quantised.widths, vectors)
    if dense:
        return Dense(scale, values.reshape(tuple(shape)), quantised)
    rank, out, inner = len(values), shape[0], vectors.parts[0]
    down = values[:, :inner].reshape(rank, *shape[1:]).contiguous()
    up = values[:, inner:].T.reshape(out, rank, *(1 for _ in shape[2:])).contiguous()
    return Factors(scale, down, up, quantised)


def vectors_of(shape: Sequence[int], *, dense: bool) -> Vectors:
    """The size of a slot's vectors: see :func:`from_quantised`."""
    return Vectors((math.prod(shape),) if dense else (math.prod(shape[1:]), shape[0]))


def reference_of(value: Mapping[str, Any]) -> Reference:
    """A checked reference as a value."""
    rows = None if value["rows"] is None else tuple((begin, end) for begin, end in value["rows"])
    return Reference(float(value["scale"]), value["source"], value["down"], value["up"], rows)


def stored_tensors(factors: Factors | Dense) -> tuple[torch.Tensor, ...]:
    """What a file holds of factors."""
    return factors.tensors if factors.quantised is None else (factors.quantised.packed,)


def factors_json(factors: Factors | Dense, names: tuple[str, ...]) -> dict[str, object]:
    """Values as JSON.

    Args:
        names: of ``stored_tensors(factors)`` in the file.
    """
    kind = "dense" if isinstance(factors, Dense) else "lowrank"
    encoding, others = "plain", {}
    if factors.quantised is not None:
        encoding = "q"
        others = {"widths": list(factors.quantised.widths), "error": factors.quantised.error}
    parts = dict(zip(_FORMS[kind, encoding].tensors, names, strict=True))
    return {"kind": kind, "encoding": encoding, "scale": factors.scale, **parts, **others}


def reference_json(reference: Reference) -> dict[str, object]:
    """A reference as JSON."""
    rows = None if reference.rows is None else [list(pair) for pair in reference.rows]
    return {
        "kind": "reference",
        "encoding": "plain",
        "scale": reference.scale,
        "source": reference.source,
        "down": reference.down,
        "up": reference.up,
        "rows": rows,
    }


def _make(kind: str, found: Mapping[str, tuple[int, ...]], shape: list[int]) -> bool:
    """Whether tensors of these shapes give a delta of ``shape``."""
    if kind == "dense":
        return found["delta"] == tuple(shape)
    down, up = found["down"], found["up"]
    rank = down[0] if down else 0
    tail = (1,) * len(shape[2:])
    return (
        len(shape) > 1 and rank > 0 and down == (rank, *shape[1:]) and up == (shape[0], rank, *tail)
    )


def _packed_problems(
    value: Mapping[str, Any], shape: list[int], found: tuple[int, ...] | None
) -> Iterator[tuple[str, str]]:
    widths, error, dense = value["widths"], value["error"], value["kind"] == "dense"
    if not is_number(error) or not 0.0 <= error <= 1.0:
        yield ".error", f"not a share of 0 to 1: {shown(error)}"
    if (
        not isinstance(widths, list)
        or not widths
        or not all(type(width) is int and 0 < width <= MAX_WIDTH for width in widths)
        or widths != sorted(widths, reverse=True)
    ):
        yield ".widths", f"not widths of 1 to {MAX_WIDTH} bits, descending: {shown(widths)}"
    elif len(widths) > 1 and dense:
        yield ".widths", f"a dense delta is one vector, found {len(widths)}"
    elif len(shape) < 2 and not dense:
        yield "", f"factors do not make {shape}"
    elif found is not None:
        expected = (vectors_of(shape, dense=dense).nbytes(widths),)
        if found != expected:
            yield ".packed", f"shape {list(found)}, expected {list(expected)} for its widths"


def _reference_problems(
    value: Mapping[str, Any], shape: list[int], sources: Collection[str]
) -> Iterator[tuple[str, str]]:
    if not isinstance(value["source"], str) or value["source"] not in sources:
        yield ".source", f"is no source of the slot: {shown(value['source'])}"
    for part in ("down", "up"):
        if not isinstance(value[part], str):
            yield f".{part}", f"not a key of a file: {shown(value[part])}"
    if len(shape) < 2:
        yield "", f"factors do not make {shape}"
    rows = value["rows"]
    if rows is not None and (
        not isinstance(rows, list)
        or not all(_is_range(each) for each in rows)
        or sum(end - begin for begin, end in rows) != shape[0]
    ):
        yield ".rows", f"not [first, end] of {shape[0]} rows in all: {shown(rows)}"


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int for number in value)
        and 0 <= value[0] < value[1] < 2**31
    )
