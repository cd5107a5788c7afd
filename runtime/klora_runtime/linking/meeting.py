"""Where the layers of two LoRAs meet. It depends on their tables alone, so many pairs share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from klora_runtime.artifact.schedule import CONTENT, STEPLESS, STYLE
from klora_runtime.lazy_torch import torch
from klora_runtime.linking.numbers import Place, Table

#: Meetings that are kept; a catalogue has as many as pairs of different tables.
_KEPT = 256


@dataclass(frozen=True, eq=False)
class Meeting:
    """The layers of two LoRAs and of those that always act beside them."""

    places: tuple[Place, ...]
    """All layers, sorted by component, module and parameter."""
    tables: Mapping[str, Table]
    """Slot -> layers of its LoRA: content, style, and those that always act."""

    @cached_property
    def own(self) -> Mapping[str, tuple[int | None, ...]]:
        """Slot -> for each layer its number in the slot's table, or None."""
        return {
            slot: tuple(table.index.get(place.path) for place in self.places)
            for slot, table in self.tables.items()
        }

    @cached_property
    def rows(self) -> tuple[Mapping[str, int | None], ...]:
        """For each layer: slot -> its number in the slot's table, or None."""
        columns = zip(*self.own.values(), strict=True)
        return tuple(dict(zip(self.own, column, strict=True)) for column in columns)

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """Numbers of the layers that content and style change."""
        rows = zip(self.own[CONTENT], self.own[STYLE], strict=True)
        return tuple(i for i, (c, s) in enumerate(rows) if c is not None and s is not None)

    @cached_property
    def rank_of_shared(self) -> Mapping[int, int]:
        """Number of a shared layer -> its place among them."""
        return {number: place for place, number in enumerate(self.shared)}

    @cached_property
    def shared_in(self) -> Mapping[str, torch.Tensor]:
        """Slot -> (shared,) int64: numbers of the shared layers in the slot's table."""
        return {
            slot: torch.tensor([self.own[slot][i] for i in self.shared], dtype=torch.int64)
            for slot in (CONTENT, STYLE)
        }

    @cached_property
    def components(self) -> tuple[str, ...]:
        """Sorted components with steps in which content or style change a layer."""
        rows = zip(self.places, self.own[CONTENT], self.own[STYLE], strict=True)
        found = {p.component for p, c, s in rows if c is not None or s is not None}
        return tuple(sorted(found - set(STEPLESS)))

    @cached_property
    def weighed(self) -> Mapping[str, torch.Tensor]:
        """Component -> (n,) int64: shared weights, biases excluded, as places among shared."""
        return {
            component: torch.tensor(
                [
                    place
                    for place, number in enumerate(self.shared)
                    if self.places[number].component == component
                    and self.places[number].parameter != "bias"
                ],
                dtype=torch.int64,
            )
            for component in self.components
        }

    @cached_property
    def component_of_shared(self) -> torch.Tensor:
        """(shared,) int64: place of each shared layer's component in :attr:`components`.

        It is -1 for components without steps.
        """
        places = {component: place for place, component in enumerate(self.components)}
        return torch.tensor(
            [places.get(self.places[number].component, -1) for number in self.shared],
            dtype=torch.int64,
        )

    @cached_property
    def weight_of(self) -> tuple[int | None, ...]:
        """For each layer the number of the weight that it follows, if it is such a bias."""
        index = {place.path: number for number, place in enumerate(self.places)}
        found: list[int | None] = []
        for place in self.places:
            number = None
            if place.parameter == "bias":
                number = index.get((place.component, place.module, "weight"))
            owned = number is not None and any(
                self.own[slot][number] is not None for slot in (CONTENT, STYLE)
            )
            found.append(number if owned else None)
        return tuple(found)


def meeting_of(tables: Mapping[str, Table]) -> Meeting:
    """Return where the layers of LoRAs meet.

    Args:
        tables: slot -> layers of its LoRA: content, style, and those that always act.
    """
    return _meeting(tuple(tables.items()))


@lru_cache(_KEPT)
def _meeting(tables: tuple[tuple[str, Table], ...]) -> Meeting:
    every = {place.path: place for _, table in tables for place in table.places}
    return Meeting(tuple(every[path] for path in sorted(every)), dict(tables))
