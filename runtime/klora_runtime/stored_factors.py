"""The rules of ``FORMAT.md`` for factors: what is stored of one slot in one entry, by its kind.

A new kind is a new row of :data:`_KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from klora_runtime.errors import shown
from klora_runtime.fusion import Dense, Factors
from klora_runtime.safetensors_file import TensorInfo

#: Kind -> the keys that name its tensors.
_KINDS: Mapping[str, tuple[str, ...]] = {"lowrank": ("down", "up"), "dense": ("delta",)}
_DTYPES = ("F32", "F16", "BF16")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number of the format's range."""
    return type(value) in (int, float) and abs(value) < 1e38  # false for NaN as well


def factors_problems(
    value: Any, shape: list[int], tensors: Mapping[str, TensorInfo], used: set[str]
) -> Iterator[tuple[str, str]]:
    """What is wrong with the factors of one slot: where inside them, and what.

    Args:
        shape: of the entry's parameter.
        tensors: the file's, by name.
        used: gets the names of those that are used here.
    """
    if not isinstance(value, dict):
        yield "", "expected an object"
        return
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        yield "", f"unknown kind {shown(kind)}; update klora"
        return
    if value.get("encoding") != "plain":
        yield "", f"unknown encoding {shown(value.get('encoding'))}; update klora"
        return
    expected = {"kind", "encoding", "scale", *_KINDS[kind]}
    missing, unknown = sorted(expected - set(value)), sorted(set(value) - expected)
    if missing:
        yield "", f"lacks {', '.join(missing)}"
    if unknown:
        yield "", f"has unknown keys {', '.join(map(shown, unknown))}; update klora"
    if missing or unknown:
        return
    if not is_number(value["scale"]):
        yield ".scale", f"not a number: {shown(value['scale'])}"
    found: dict[str, tuple[int, ...]] = {}
    for part in _KINDS[kind]:
        name = value[part]
        info = tensors.get(name) if isinstance(name, str) else None
        if info is None:
            yield f".{part}", f"no tensor {shown(name)} in the file"
            continue
        used.add(name)
        if info.dtype not in _DTYPES:
            yield f".{part}", f"dtype {info.dtype}, expected {_DTYPES}"
        found[part] = info.shape
    if len(found) == len(_KINDS[kind]) and not _make(kind, found, shape):
        shapes = " and ".join(f"{part} {list(size)}" for part, size in found.items())
        verb = "do" if len(found) > 1 else "does"
        yield "", f"{shapes} {verb} not make {shape}"


def factors_of(value: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Factors | Dense:
    """Checked factors as values."""
    scale = float(value["scale"])
    stored = [tensors[value[part]] for part in _KINDS[value["kind"]]]
    return Dense(scale, *stored) if value["kind"] == "dense" else Factors(scale, *stored)


def factors_json(factors: Factors | Dense, names: tuple[str, ...]) -> dict[str, object]:
    """Values as JSON.

    Args:
        names: of ``factors.tensors`` in the file.
    """
    kind = "dense" if isinstance(factors, Dense) else "lowrank"
    return {
        "kind": kind,
        "encoding": "plain",
        "scale": factors.scale,
        **dict(zip(_KINDS[kind], names, strict=True)),
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
