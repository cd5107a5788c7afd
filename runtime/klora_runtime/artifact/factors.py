"""The rules of ``FORMAT.md`` for factors: the stored delta of one slot of one entry.

A form is a kind together with an encoding; a new form is a new row of :data:`FORMS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from klora_runtime.artifact.dtypes import REAL
from klora_runtime.artifact.q.form import (
    LEAST_STEP,
    MAX_CLASS,
    MAX_LEVEL,
    MOST_STEP,
    NUMBERS_PER_BYTE,
    class_offset,
    matrices_of,
)
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.errors import shown


@dataclass(frozen=True)
class Form:
    """How the JSON writes the factors of a slot."""

    tensors: tuple[str, ...]
    """Keys that name its tensors."""
    dtypes: tuple[str, ...]
    """Dtypes that its tensors may have."""
    others: tuple[str, ...] = ()
    """Further keys."""

    @cached_property
    def keys(self) -> frozenset[str]:
        """All keys."""
        return frozenset(("kind", "encoding", "scale", *self.tensors, *self.others))


_PACKED = Form(("packed",), ("U8",), ("error", "levels", "step"))

#: Kind and encoding -> form.
FORMS: Mapping[tuple[str, str], Form] = {
    ("lowrank", "plain"): Form(("down", "up"), REAL),
    ("lowrank", "q"): _PACKED,
    ("dense", "plain"): Form(("delta",), REAL),
    ("dense", "q"): _PACKED,
    ("reference", "plain"): Form((), (), ("down", "rows", "source", "up")),
}
_KINDS = {kind for kind, _ in FORMS}


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number within the format's range."""
    kind = type(value)
    return (kind is float or kind is int) and -1e38 < value < 1e38  # false for NaN as well


def factors_problems(
    value: Any, shape: list[int], tensors: Mapping[str, TensorInfo], sources: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Yield the problems of the factors of one slot: the place inside them, and the problem.

    Args:
        shape: shape of the entry's parameter.
        tensors: the file's tensors by name.
        sources: names of the slot's sources.
    """
    form = _form_of(value)
    if isinstance(form, str):
        yield "", form
        return
    if value.keys() != form.keys:
        missing = sorted(form.keys - value.keys())
        unknown = sorted(value.keys() - form.keys)
        if missing:
            yield "", f"lacks {', '.join(missing)}"
        if unknown:
            yield "", f"has unknown keys {', '.join(map(shown, unknown))}; update klora"
        return
    if not is_number(value["scale"]):
        yield ".scale", f"not a number: {shown(value['scale'])}"
    if value["kind"] == "reference":
        yield from _reference_problems(value, shape, sources)
        return
    found: dict[str, tuple[int, ...]] = {}
    for part in form.tensors:
        name = value[part]
        info = tensors.get(name) if isinstance(name, str) else None
        if info is None:
            yield f".{part}", f"no tensor {shown(name)} in the file"
            continue
        if info.dtype not in form.dtypes:
            yield f".{part}", f"dtype {info.dtype}, expected {form.dtypes}"
        found[part] = info.shape
    if value["encoding"] == "q":
        yield from _packed_problems(value, shape, found.get("packed"))
    elif len(found) == len(form.tensors) and not _make(value["kind"], found, shape):
        shapes = " and ".join(f"{part} {list(size)}" for part, size in found.items())
        verb = "do" if len(found) > 1 else "does"
        yield "", f"{shapes} {verb} not make {shape}"


def packed_problems(
    entries: Iterable[Mapping[str, Any]], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, str]]:
    """Yield the packed tensors that are too small for their slots: the name, and the problem.

    Two numbers take at least one bit, so a small file cannot claim a huge amount of numbers.

    Args:
        entries: entries whose factors have no problem.
    """
    numbers: Counter[str] = Counter()
    for entry in entries:
        for value in entry["factors"].values():
            if value["encoding"] == "q":
                dense, rank = value["kind"] == "dense", len(value["levels"])
                matrices = matrices_of(entry["shape"], rank, dense=dense)
                numbers[value["packed"]] += sum(rows * length for rows, length in matrices)
    for name, count in numbers.items():
        (size,) = tensors[name].shape
        if count > NUMBERS_PER_BYTE * size:
            yield f"tensor {name}", f"{size} bytes cannot hold the {count} numbers of its slots"


def tensor_names(value: Any) -> list[str]:
    """Return the names of tensors in the factors of one slot; the factors may be invalid."""
    form = _form_of(value)
    named = [] if isinstance(form, str) else [value.get(part) for part in form.tensors]
    return [name for name in named if isinstance(name, str)]


def _form_of(value: Any) -> Form | str:
    """Return the form of factors, or the reason why it is unknown."""
    if not isinstance(value, dict):
        return "expected an object"
    kind, encoding = value.get("kind"), value.get("encoding")
    if not isinstance(kind, str) or kind not in _KINDS:
        return f"unknown kind {shown(kind)}; update klora"
    form = FORMS.get((kind, encoding)) if isinstance(encoding, str) else None
    return form or f"unknown encoding {shown(encoding)}; update klora"


def _make(kind: str, found: Mapping[str, tuple[int, ...]], shape: list[int]) -> bool:
    """Return whether tensors of these shapes give a delta of ``shape``."""
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
    levels, error, dense = value["levels"], value["error"], value["kind"] == "dense"
    if not is_number(error) or not 0.0 <= error <= 1.0:
        yield ".error", f"not a share of 0 to 1: {shown(error)}"
    if not is_number(value["step"]) or not LEAST_STEP <= value["step"] <= MOST_STEP:
        yield ".step", f"not a number of 1e-28 to 1e28: {shown(value['step'])}"
    if found is not None and len(found) != 1:
        yield ".packed", f"shape {list(found)}, expected one size"
    if (
        not isinstance(levels, list)
        or not levels
        or set(map(type, levels)) != {int}
        or not 0 <= min(levels) <= max(levels) <= MAX_LEVEL
        or levels != sorted(levels, reverse=True)
    ):
        yield ".levels", f"not levels of 0 to {MAX_LEVEL}, descending: {shown(levels)}"
    elif len(levels) > 1 and dense:
        yield ".levels", f"a dense delta has one, found {len(levels)}"
    elif len(shape) < 2 and not dense:
        yield "", f"factors do not make {shape}"
    else:
        least = min(length for _, length in matrices_of(shape, len(levels), dense=dense))
        if levels[0] - class_offset(least) > MAX_CLASS:
            yield ".levels", f"{levels[0]} is too high for rows of {least} numbers"


def _reference_problems(
    value: Mapping[str, Any], shape: list[int], sources: Collection[str]
) -> Iterator[tuple[str, str]]:
    if not isinstance(value["source"], str) or value["source"] not in sources:
        yield ".source", f"is not a source of the slot: {shown(value['source'])}"
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
