"""The rules of ``FORMAT.md`` for factors: what is stored of one slot in one entry, by its form.

A form is a kind with an encoding; a new one is a new row of :data:`_FORMS`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.dtypes import REAL
from klora_runtime.artifact.fusion import Reference
from klora_runtime.artifact.q.bitstream import MAX_CLASS, class_offset
from klora_runtime.artifact.q.quantised import LEAST_STEP, MAX_LEVEL, MOST_STEP, Quantised
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.errors import shown


class _Form:
    def __init__(
        self, tensors: tuple[str, ...], dtypes: tuple[str, ...], others: tuple[str, ...] = ()
    ) -> None:
        self.tensors = tensors
        """The keys that name its tensors."""
        self.dtypes = dtypes
        self.keys = frozenset(("kind", "encoding", "scale", *tensors, *others))
        """All of them."""


_PACKED = _Form(("packed",), ("U8",), ("error", "levels", "step"))
_FORMS: Mapping[tuple[str, str], _Form] = {
    ("lowrank", "plain"): _Form(("down", "up"), REAL),
    ("lowrank", "q"): _PACKED,
    ("dense", "plain"): _Form(("delta",), REAL),
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
    if value.keys() != form.keys:
        missing, unknown = sorted(form.keys - value.keys()), sorted(value.keys() - form.keys)
        if missing:
            yield "", f"lacks {', '.join(missing)}"
        if unknown:
            yield "", f"has unknown keys {', '.join(map(shown, unknown))}; update klora"
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


def factors_of(value: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Stored:
    """Checked factors of encoding ``plain`` as values."""
    form = Dense if value["kind"] == "dense" else LowRank
    parts = (tensors[value[part]] for part in _FORMS[value["kind"], "plain"].tensors)
    return Stored(float(value["scale"]), form(*parts))


def quantised_of(value: Mapping[str, Any]) -> Quantised:
    """How checked factors of encoding ``q`` are stored."""
    return Quantised(float(value["step"]), tuple(value["levels"]), float(value["error"]))


def reference_of(value: Mapping[str, Any]) -> Reference:
    """A checked reference as a value."""
    rows = None if value["rows"] is None else tuple((begin, end) for begin, end in value["rows"])
    return Reference(float(value["scale"]), value["source"], value["down"], value["up"], rows)


def factors_json(stored: Stored, names: tuple[str, ...]) -> dict[str, object]:
    """Values as JSON.

    Args:
        names: in the file: of the delta's tensors, or of the tensor that they are packed in.
    """
    kind = "dense" if isinstance(stored.delta, Dense) else "lowrank"
    encoding, others = "plain", {}
    if stored.quantised is not None:
        encoding, how = "q", stored.quantised
        others = {"step": how.step, "levels": list(how.levels), "error": how.error}
    parts = dict(zip(_FORMS[kind, encoding].tensors, names, strict=True))
    return {"kind": kind, "encoding": encoding, "scale": stored.scale, **parts, **others}


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
        or not all(type(level) is int and 0 <= level <= MAX_LEVEL for level in levels)
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


def matrices_of(shape: Sequence[int], rank: int, *, dense: bool) -> tuple[tuple[int, int], ...]:
    """Rows and numbers of a row of what encoding ``q`` stores of one slot.

    Args:
        shape: of the parameter.
        rank: of the factors; of no meaning for a dense delta.
    """
    if not dense:
        return (rank, math.prod(shape[1:])), (rank, shape[0])
    return ((1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:])),)


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int for number in value)
        and 0 <= value[0] < value[1] < 2**31
    )
