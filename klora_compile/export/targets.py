"""The modules of an exported file, and the entries of the fusion that fill them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from klora_compile.reading.forms.parts import Part
from klora_runtime.artifact.fusion import Entry


@dataclass(frozen=True)
class Piece:
    """One entry's share of a parameter in the file."""

    entry: Entry
    rows: tuple[range, ...] | None = None
    """Rows of the file's parameter that it fills, in the order of its rows; None for all."""


@dataclass(frozen=True)
class Target:
    """A parameter of the file."""

    key: str
    """The key without the ending of a part."""
    parameter: str
    """``weight`` or ``bias``."""
    shape: tuple[int, ...]
    """Shape in the file: that of the entry, or of the module that joins several entries."""
    pieces: tuple[Piece, ...]
    pointwise: bool = False
    """Whether it is a 1x1 convolution, whose delta or factors have four dimensions in a file."""


@dataclass(frozen=True)
class Spelling:
    """The names and metadata of a file."""

    endings: Mapping[Part, str]
    """Part -> ending of its key; deltas without factors need ``DIFF`` and ``DIFF_BIAS``."""
    metadata: Mapping[str, str]
    """Metadata for tools, in addition to that of every export."""
    targets: tuple[Target, ...]
    """Sorted by key and parameter."""
