"""What a merged slot lost to its rank, from the artifact's scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from klora_compile.report.scores import number_of
from klora_compile.slots import made
from klora_runtime.artifact.schedule import Schedule
from klora_runtime.errors import shown

#: Greatest norm that is taken seriously, in scores that any tool may have written.
_MOST = 1e100


@dataclass(frozen=True)
class Truncation:
    """The loss of one merged slot, as shares of Frobenius norms."""

    slot: str
    layers: int
    """Number of layers that it has."""
    whole: float
    """Loss over all its layers together, 0 to 1."""
    worst: float
    """The greatest loss of a layer."""
    layer: str
    """The layer of :attr:`worst`."""

    @property
    def text(self) -> str:
        """The numbers as a sentence."""
        return (
            f"the rank of slot {shown(self.slot)} loses {self.whole:.1%} of its norm, at most "
            f"{self.worst:.1%} of a layer's ({shown(self.layer)})"
        )


def truncations(fusion: Schedule) -> Iterator[Truncation]:
    """Yield what each merged slot lost; nothing for one without plausible scores."""
    for slot in made(fusion.slots):
        losses = {}
        squares, lost = [], []
        for entry in fusion.entries:
            error = number_of(fusion, entry, slot, "error")
            kept = number_of(fusion, entry, slot, "frobenius")
            if error is None or kept is None or not 0.0 <= error <= 1.0 or not 0.0 <= kept <= _MOST:
                continue
            losses[entry.layer] = error
            whole = kept * kept / (1.0 - error * error) if error < 1.0 else 0.0
            squares.append(whole)
            lost.append(whole * error * error)
        if losses:
            worst = max(losses, key=losses.__getitem__)
            total = math.fsum(squares)
            share = math.sqrt(math.fsum(lost) / total) if total else 0.0
            yield Truncation(slot, len(losses), share, losses[worst], worst)
