"""Module paths written with underscores, as kohya's sd-scripts does, turned back into dots.

sd-scripts replaces every dot of a module path by an underscore, and the names themselves have
underscores: ``down_blocks_0_attn1_to_out_0``. The way back is a vocabulary of the names that
occur in a model; the longest name that fits is taken at each place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from klora_compile.families.tables import WHOLE
from klora_runtime.families.rows import Layout


@dataclass(frozen=True)
class Vocabulary:
    """Names that may occur between two dots of a module path; numbers always may."""

    names: frozenset[str]
    roots: frozenset[str]
    """Those that a path may begin with."""
    _step: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        longest_first = sorted(self.names, key=lambda name: (-len(name), name))
        names = "|".join(map(re.escape, longest_first))
        object.__setattr__(self, "_step", re.compile(rf"({names}|\d+)(?:_|$)"))

    def dotted(self, flat: str) -> str | None:
        """``flat`` with dots between its names, or None where it is no path of these."""
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
    """The names between the dots of all module paths of some tables."""
    paths = [row.source.split(".") for layout in layouts for row in layout.rows]
    names = frozenset(name for path in paths for name in path) - {"{}"}
    return Vocabulary(names, frozenset(path[0] for path in paths))


#: Names of UNets, in diffusers' names.
UNET = vocabulary(layout.in_diffusers_names() for layout in WHOLE if layout.component == "unet")
