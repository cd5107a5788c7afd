"""What a file of one spelling holds for a fusion: its modules, and which entries fill them."""

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
    """Rows of the file's parameter that it fills, in the order of its own; None for all."""


@dataclass(frozen=True)
class Target:
    """One parameter as a file has it."""

    key: str
    """What stands before the parts' endings."""
    parameter: str
    """``weight`` or ``bias``."""
    shape: tuple[int, ...]
    """In the file; that of the entry, or of the module that several entries are fused into."""
    pieces: tuple[Piece, ...]
    pointwise: bool = False
    """Whether it is a 1x1 convolution, whose delta or factors have four dimensions in a file."""


@dataclass(frozen=True)
class Spelling:
    """How a file names its tensors and says what it is."""

    endings: Mapping[Part, str]
    """Of the parts that it has; deltas that are no products need ``DIFF`` and ``DIFF_BIAS``."""
    metadata: Mapping[str, str]
    """What tools look for, beyond what every export says."""
    targets: tuple[Target, ...]
    """Sorted by key and parameter."""
