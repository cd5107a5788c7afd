"""Canonical JSON: one spelling for each value, and strict parsing."""

from __future__ import annotations

import json
from typing import Any

from klora_runtime.errors import shown

#: Without the search for circles, which is a good part of the time; a circle is too deep instead.
_ENCODER = json.JSONEncoder(
    sort_keys=True,
    separators=(",", ":"),
    ensure_ascii=True,
    allow_nan=False,
    check_circular=False,
)


def parse_json(raw: bytes | str, *, canonical: bool = False) -> Any:
    """Parse JSON and refuse what Python's parser accepts: duplicate keys, NaN and Infinity.

    Args:
        canonical: skip the search for duplicate keys; the caller compares the text with
            :func:`canonical_json` of the result, which has each key once.

    Raises:
        ValueError: the text is not JSON, has one of these faults, or is not UTF-8.
        RecursionError: the JSON is nested too deeply.
    """
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    hook = None if canonical else _unique
    return json.loads(text, object_pairs_hook=hook, parse_constant=_no_constant)


def canonical_json(value: object) -> str:
    """Write ``value`` canonically: sorted keys, no spaces, ASCII, shortest round-trip floats.

    Raises:
        TypeError, ValueError: JSON cannot hold a value.
        RecursionError: the value is nested too deeply, or holds itself.
    """
    return _ENCODER.encode(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(double)} appears twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
