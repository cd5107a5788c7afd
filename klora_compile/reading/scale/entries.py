"""Alphas that a file's metadata state in entries of their own.

An entry counts whose name, or what stands behind its last dot, *is* one of three words. In front of
the dot may be a component, a module, or anything else; then the entry is for that component, that
module, or all layers. ``transformer.r`` beside ``transformer.lora_alpha`` is the rank that alpha is
divided by. Seen in files of MiniMax-H3 (huggingface/diffusers#14408), and read by sglang.
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
    """One alpha of the metadata."""

    key: str
    alpha: float
    rank: int | None
    """The rank beside it; None where none is stated."""

    def is_for(self, component: str, module: str) -> bool:
        """Whether it speaks for a layer."""
        scope = self.key.rpartition(".")[0]
        first, _, inner = scope.partition(".")
        if first in _COMPONENTS:
            return first == component and inner in ("", module)
        return not any(part.isdigit() for part in scope.split(".")) or scope == module


def entries_of(metadata: Mapping[str, str], where: str) -> Sequence[Entry]:
    """All alphas in entries of their own.

    Raises:
        LoraError: one of them is no number.
    """
    return tuple(_entries(metadata, where))


def _entries(metadata: Mapping[str, str], where: str) -> Iterator[Entry]:
    for key, text in sorted(metadata.items()):  # writers leave the order to chance
        scope, dot, name = key.rpartition(".")
        if name in _ALPHAS and text not in SILENT:
            alpha = stated_number(text, key, where)
            yield Entry(key, alpha, rank_of(metadata.get(f"{scope}{dot}{_RANK}")))
