"""The modules of an exported file, and the entries of the fusion that fill them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from klora_compile.reading.forms.parts import Part
from klora_runtime.artifact.fusion import Entry
from klora_runtime.errors import KloraError, shown


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
    """``weight``, ``bias``, or another parameter, which has no factors in a file."""
    shape: tuple[int, ...]
    """Shape in the file: that of the entry, or of the module that joins several entries."""
    pieces: tuple[Piece, ...]
    pointwise: bool = False
    """Whether it is a 1x1 convolution, whose delta or factors have four dimensions in a file."""

    @property
    def has_factors(self) -> bool:
        """Whether a file may have factors of its delta."""
        return self.parameter == "weight" and len(self.shape) > 1


@dataclass(frozen=True)
class Spelling:
    """The names and metadata of a file."""

    endings: Mapping[Part, str]
    """Part -> ending of its key; deltas without factors need ``DIFF`` and ``DIFF_BIAS``."""
    metadata: Mapping[str, str]
    """Metadata for tools, in addition to that of every export."""
    targets: tuple[Target, ...]
    """Sorted by key and parameter."""


def is_of_layer(entry: Entry) -> bool:
    """Return whether the entry changes a layer's weight or its bias."""
    return entry.parameter in ("weight", "bias")


def without_keys(entries: Sequence[Entry]) -> KloraError:
    """Return the error for parameters that no loader reads under any key."""
    return KloraError(
        f"{len(entries)} parameters are neither a layer's weight nor its bias, and ordinary LoRA "
        "files of this kind have no keys for them. Apply the artifact itself.",
        [shown(entry.path) for entry in entries],
    )
