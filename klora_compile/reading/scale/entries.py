"""Alphas in separate entries of a file's metadata.

An entry counts if its name, or the part after its last dot, *is* one of three words. Before the dot
may be a component, a module, or anything else; the entry is then for that component, that module,
or all layers. ``transformer.r`` beside ``transformer.lora_alpha`` is the rank that alpha is divided
by. Files of videos have such entries (huggingface/diffusers#14408), and sglang reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from klora_compile.reading.scale.training import SILENT, rank_of, stated_number
from klora_runtime.families.catalogue import FAMILIES

_ALPHAS = ("alpha", "lora_alpha", "network_alpha")
_RANK = "r"

_COMPONENTS = {component for family in FAMILIES.values() for component in family.components}


@dataclass(frozen=True)
class Entry:
    """An alpha in the metadata."""

    key: str
    alpha: float
    rank: int | None
    """The rank beside it; None if there is none."""

    def is_for(self, component: str, module: str) -> bool:
        """Return whether the entry applies to a layer."""
        scope = self.key.rpartition(".")[0]
        first, _, inner = scope.partition(".")
        if first in _COMPONENTS:
            return first == component and inner in ("", module)
        return not any(part.isdigit() for part in scope.split(".")) or scope == module


def entries_of(metadata: Mapping[str, str], where: str) -> Sequence[Entry]:
    """Return all alphas in separate entries.

    Raises:
        LoraError: an alpha is not a number.
    """
    return tuple(_entries(metadata, where))


def _entries(metadata: Mapping[str, str], where: str) -> Iterator[Entry]:
    for key, text in sorted(metadata.items()):  # the order in files is arbitrary
        scope, dot, name = key.rpartition(".")
        if name in _ALPHAS and text not in SILENT:
            alpha = stated_number(text, key, where)
            yield Entry(key, alpha, rank_of(metadata.get(f"{scope}{dot}{_RANK}")))
