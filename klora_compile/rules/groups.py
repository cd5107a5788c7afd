"""Groups: each LoRA's weight by group of layers and phase of the sampling, from a table.

A row of the table names LoRAs and layers, and has a schedule as the rule of phases writes it:

    {"style *.ff.*": "0:0.6", "content *mid_block.*attn2*": "0:2.3,0.333:2,0.667:1.3"}

The first word is a role or a slot (``content``, ``content.2``), the second one a pattern of layer
names with ``*``, ``?`` and ``[0-9]``. A LoRA acts in a layer with the product of all rows that
match both, and with 1 if none does. So the order of rows does not matter.

Tables come by name too: ``unet-demo``, the default, was found for the first U-Net of the demo, and
on today's it equals the plain sum. Base models have tables of their own
(:attr:`~klora_runtime.families.family.Family.block_weights`), which are refused for others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any, ClassVar

from klora_compile.fields import Table, Text, setting
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import Choice
from klora_compile.rules.phases import Points, points_of, points_text, weight_at
from klora_compile.rules.rule import Rule
from klora_compile.slots import role_of
from klora_runtime.errors import ConfigError, shown
from klora_runtime.families.catalogue import FAMILIES, families_name

#: Weights by layer, from 260 updates on the true drawings of six subjects in two styles, averaged
#: by group.
_UNET_DEMO = {
    "content *mid_block.*attn2*": "0:2.3,0.333:2,0.667:1.3",
    "style *mid_block.*attn2*": "0:1.5,0.667:1.7",
    "content *mid_block.*.ff.*": "0:1.7,0.333:1.5,0.667:0.8",
    "style *mid_block.*.ff.*": "0:0.2,0.667:0.5",
    "content *down_blocks.*attn2*": "0:1.4,0.333:1.3,0.667:1",
    "style *down_blocks.*attn2*": "0:0.7,0.333:0.6,0.667:0.7",
    "content *down_blocks.*.ff.*": "0:1.2,0.333:1.1,0.667:1.2",
    "style *down_blocks.*.ff.*": "0:0.6,0.333:0.5,0.667:0.6",
    "content *up_blocks.*.ff.*": "0:0.8,0.667:0.7",
    "style *up_blocks.*.ff.*": "0:0.6,0.667:0.7",
    "content *up_blocks.*conv*": "0:1,0.333:0.9,0.667:0.6",
    "style *up_blocks.*conv*": "0:0.9,0.333:0.8,0.667:1",
    "content *up_blocks.*.proj_*": "0:1.2,0.333:1,0.667:0.8",
    "style *up_blocks.*.proj_*": "0:0.7,0.333:0.5,0.667:0.6",
}

#: Name of a table -> base models that it is made for; others suit every model whose layers they
#: match.
_MADE_FOR: dict[str, list[str]] = {}
for _family in FAMILIES.values():
    for _name in _family.block_weights:
        _MADE_FOR.setdefault(_name, []).append(_family.key)

#: Name -> table.
TABLES: Mapping[str, Mapping[str, str]] = {
    "unet-demo": _UNET_DEMO,
    **{name: FAMILIES[made_for[0]].block_weights[name] for name, made_for in _MADE_FOR.items()},
}


@dataclass(frozen=True, kw_only=True)
class Groups(Rule):
    """All LoRAs, each with a weight by group of layers and phase; a table as rows -> schedule."""

    name: ClassVar[str] = "groups"
    title: ClassVar[str] = "weights by groups of layers"
    sentence: ClassVar[str] = "Each has its own weight by group of layers and phase of the sampling"
    fates: ClassVar[Mapping[str, str]] = {
        "by its group": "its LoRAs by the rows of the table that match the layer"
    }
    whole: ClassVar[bool] = True
    least: ClassVar[int] = 1

    table: Mapping[str, str | Points] | str = field(
        default="unet-demo",
        metadata=setting(
            "A JSON file: an object with rows such as "
            '{"style *.ff.*": "0:0.6", "content *mid_block.*": "0:1.5,0.5:1"}. A row names a role '
            "or a slot and a pattern of layers, and has weights from a progress on; rows that "
            "match one layer are multiplied. Or a table by name: one that was found for the "
            "U-Net of the demo, or one that a base model has.",
            Table(
                Text("POINTS", "progress:weight, such as 0:1,0.4:0.2"),
                "ROLE PATTERN",
                tuple(TABLES),
            ),
        ),
    )

    def __post_init__(self) -> None:
        """Check the rows and parse their schedules."""
        super().__post_init__()
        rows = {}
        table = TABLES[self.table] if isinstance(self.table, str) else self.table
        for row, points in table.items():
            who, space, pattern = row.partition(" ")
            if not who or not space or not pattern or " " in pattern:
                raise ConfigError(
                    f"table: expected rows of a role or slot and a pattern of layers, such as "
                    f"'style *.ff.*', found {row!r}."
                )
            rows[row] = points_of(f"table, {row}", points)
        object.__setattr__(self, "table", rows)

    def parameters(self) -> dict[str, Any]:
        return {"table": {row: points_text(points) for row, points in self._rows.items()}}

    def misfit(self, slots: Sequence[str]) -> str | None:
        known = {*slots, *map(role_of, slots)}
        strange = [who for row in self._rows if (who := row.partition(" ")[0]) not in known]
        if self._shipped is not None or not strange:
            return None
        return f"table: there is no LoRA {strange[0]!r}; name one of {', '.join(sorted(known))}."

    def misfit_of_base(self, families: Collection[str]) -> str | None:
        made_for = _MADE_FOR.get(self._shipped or "")
        if made_for is None or not {*families}.isdisjoint(made_for):
            return None
        return (
            f"table: {self._shipped} is for {families_name(made_for)}, and these LoRAs are for "
            f"{families_name(families)}. Write a table with patterns of their layers, or take "
            "another rule."
        )

    def weigh(self, layers: Mapping[str, LayerNumbers]) -> dict[str, Any]:
        """Return the number of rows that match no layer, unless all match.

        Raises:
            ConfigError: no row matches a layer.
        """
        named = [each for each in layers.values() if not each.is_stepless]
        idle = [row for row in self._rows if not any(_matches(row, each) for each in named)]
        if named and self._rows and len(idle) == len(self._rows):
            which = "" if self._shipped is None else f" {self._shipped}"
            raise ConfigError(
                f"table: no row of the table{which} matches a layer of these LoRAs, such as "
                f"{shown(named[0].name)}. Write a table with patterns of their layers."
            )
        return {"idle_rows": len(idle)} if idle else {}

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        rows = {slot: list(self._points(slot, layer)) for slot in layer.present}
        starts = {0.0, *(start for own in rows.values() for row in own for start, _ in row)}
        segments = []
        for start in sorted(starts):
            weights = {s: prod(weight_at(row, start) for row in own) for s, own in rows.items()}
            segments.append((start, weights))
        return Choice("by its group", tuple(segments))

    def text(self) -> str:
        return f"{len(self._rows)} rows" if self._shipped is None else self._shipped

    @property
    def _rows(self) -> Mapping[str, Points]:
        """The rows as the constructor parsed them."""
        return self.table  # type: ignore[return-value]

    @property
    def _shipped(self) -> str | None:
        """The name of the table; None for one of the user's own."""
        texts = self.parameters()["table"]
        return next((name for name, rows in TABLES.items() if rows == texts), None)

    def _points(self, slot: str, layer: LayerNumbers) -> Iterator[Points]:
        """Yield the schedules of all rows that match a slot and a layer."""
        for row, points in self._rows.items():
            if row.partition(" ")[0] in (slot, role_of(slot)) and _matches(row, layer):
                yield points


def _matches(row: str, layer: LayerNumbers) -> bool:
    return fnmatchcase(layer.name, row.partition(" ")[2])
