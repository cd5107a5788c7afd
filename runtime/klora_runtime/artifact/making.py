"""Records made quickly, where all their fields are known to be good."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def made(kind: type[T], /, **fields: Any) -> T:
    """Return a record of a frozen dataclass with all its fields.

    ``kind(...)`` sets each field of a frozen dataclass by a call of its own, which is most of the
    time of reading a document with hundreds of layers. The class must have neither slots nor
    ``__post_init__``.
    """
    record = object.__new__(kind)
    vars(record).update(fields)
    return record
