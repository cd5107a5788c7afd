"""Conversion of module paths with underscores, as in kohya's sd-scripts, back to dots.

sd-scripts replaces every dot of a module path by an underscore, and the names themselves contain
underscores: ``down_blocks_0_attn1_to_out_0``. A vocabulary of the names in a model resolves this:
at each place, the longest matching name is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from klora_compile.families.tables import WHOLE
from klora_runtime.families.rows import Layout


@dataclass(frozen=True)
class Vocabulary:
    """Names that may occur between two dots of a module path; numbers are always allowed."""

    names: frozenset[str]
    roots: frozenset[str]
    """Names that a path may begin with."""

    @cached_property
    def _by_first_word(self) -> Mapping[str, Sequence[tuple[int, str]]]:
        """First word of a name -> number of words and name of all that begin so, longest first."""
        found: dict[str, list[tuple[int, str]]] = {}
        for words in sorted((name.split("_") for name in self.names), key=len, reverse=True):
            found.setdefault(words[0], []).append((len(words), "_".join(words)))
        return found

    def dotted(self, flat: str) -> str | None:
        """Return ``flat`` with dots between its names; None if it is not a path of these names."""
        words, parts, place = flat.split("_"), [], 0
        while place < len(words):
            for count, name in self._by_first_word.get(words[place], ()):
                if count == 1 or "_".join(words[place : place + count]) == name:
                    break
            else:
                count, name = 1, words[place]
                if not name.isdecimal():
                    return None
            parts.append(name)
            place += count
        return ".".join(parts) if parts[0] in self.roots else None


def vocabulary(layouts: Iterable[Layout]) -> Vocabulary:
    """Return the vocabulary of all module paths of some tables."""
    paths = [row.source.split(".") for layout in layouts for row in layout.rows]
    names = frozenset(name for path in paths for name in path) - {"{}"}
    return Vocabulary(names, frozenset(path[0] for path in paths))


#: The vocabulary of UNets in diffusers' names.
UNET = vocabulary(layout.in_diffusers_names() for layout in WHOLE if layout.component == "unet")
