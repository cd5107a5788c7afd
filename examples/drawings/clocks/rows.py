"""The rows: the plain sum, and K-LoRA by each pattern and clock; and where each is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawings.table.rows import REFERENCE, Row, fusions
from drawings.table.rows import ROWS as TABLE
from klora_compile import Settings, compile_fusion
from klora_compile.rules import Klora
from klora_runtime import apply_fusion

PATTERNS = ("s", "s*")
CLOCKS = ("step", "noise")

#: Of the noise levels in sampling; 1 is none. The base was trained at 2.
SHIFTS = (1.0, 3.0, 5.0)
STEPS = (4, 8, 16)
#: Each picture is also compared with the picture of the same row and seed in so many steps.
MANY = 50


@dataclass(frozen=True)
class Place:
    """How a row is sampled."""

    shift: float
    steps: int

    def of(self, row: str) -> str:
        """Return the name of a row here, as it is kept."""
        return f"{row}, shift {self.shift:g}, {self.steps} steps"


PLACES = tuple(Place(shift, steps) for shift in SHIFTS for steps in STEPS)


def name_of(pattern: str, clock: str) -> str:
    """Return the name of the row of a pattern and a clock."""
    return f"K-LoRA {pattern} by {clock}"


def _timed(pattern: str, clock: str) -> Row:
    def act(pipe: Any, files: Sequence[Path]) -> AbstractContextManager[object]:
        content, style = files
        rule, settings = Klora(pattern=pattern), Settings(clock=clock)
        return apply_fusion(pipe, compile_fusion(content, style, rule, settings))

    return Row(name_of(pattern, clock), fusions, act)


ROWS = (
    next(row for row in TABLE if row.name == REFERENCE),
    *(_timed(pattern, clock) for pattern in PATTERNS for clock in CLOCKS),
)
