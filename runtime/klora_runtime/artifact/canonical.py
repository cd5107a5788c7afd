"""JSON with one spelling for each value, and none that the standard forbids."""

from __future__ import annotations

import json
from typing import Any

from klora_runtime.errors import shown


def parse_json(raw: bytes | str, *, canonical: bool = False) -> Any:
    """JSON without what the standard parser lets pass: duplicate keys, NaN and Infinity.

    Args:
        canonical: duplicate keys pass, for the caller compares the text with what
            :func:`canonical_json` makes of the result, which has each key once.

    Raises:
        ValueError: also for the cases above and for bytes that are not UTF-8.
        RecursionError: nested too deeply.
    """
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    hook = None if canonical else _unique
    return json.loads(text, object_pairs_hook=hook, parse_constant=_no_constant)


def canonical_json(value: object) -> str:
    """The one way to write ``value``: sorted keys, no spaces, ASCII, shortest round-trip floats."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(double)} appears twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
