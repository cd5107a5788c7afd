"""Conversion of module paths with underscores, as in kohya's sd-scripts, back to dots.

sd-scripts replaces every dot of a module path by an underscore, and the names themselves contain
underscores: ``down_blocks_0_attn1_to_out_0``. A vocabulary of the names in a model resolves this:
at each place, the longest matching name is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from klora_compile.families.tables import WHOLE
from klora_runtime.families.rows import Layout


@dataclass(frozen=True)
class Vocabulary:
    """Names that may occur between two dots of a module path; numbers are always allowed."""

    names: frozenset[str]
    roots: frozenset[str]
    """Names that a path may begin with."""
    _step: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        longest_first = sorted(self.names, key=lambda name: (-len(name), name))
        names = "|".join(map(re.escape, longest_first))
        object.__setattr__(self, "_step", re.compile(rf"({names}|\d+)(?:_|$)"))

    def dotted(self, flat: str) -> str | None:
        """Return ``flat`` with dots between its names; None if it is not a path of these names."""
        parts, position = [], 0
        while position < len(flat):
            match = self._step.match(flat, position)
            if match is None:
                return None
            parts.append(match[1])
            position = match.end()
        whole = bool(parts) and parts[0] in self.roots and not flat.endswith("_")
        return ".".join(parts) if whole else None


def vocabulary(layouts: Iterable[Layout]) -> Vocabulary:
    """Return the vocabulary of all module paths of some tables."""
    paths = [row.source.split(".") for layout in layouts for row in layout.rows]
    names = frozenset(name for path in paths for name in path) - {"{}"}
    return Vocabulary(names, frozenset(path[0] for path in paths))


#: The vocabulary of UNets in diffusers' names.
UNET = vocabulary(layout.in_diffusers_names() for layout in WHOLE if layout.component == "unet")
