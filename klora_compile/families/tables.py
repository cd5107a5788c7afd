"""The tables for reading files, made from the base models' records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import Family
from klora_runtime.families.rows import Layout, Row


def _together(family: Family) -> Iterator[Layout]:
    """Yield joint tables of layouts that have one name for several components."""
    for name in dict.fromkeys(layout.name for layout in family.layouts):
        own = [layout for layout in family.layouts if layout.name == name]
        if len(own) > 1:
            rows = [replace(r, component=other.component) for other in own[1:] for r in other.rows]
            yield replace(own[0], rows=(*own[0].rows, *rows))


def _mixed(family: Family) -> Iterator[Layout]:
    """Yield one table per component with all its names, diffusers' names last."""
    own = [layout for layout in family.layouts if layout.is_whole and layout.name != "diffusers"]
    for first in (*own, *_together(family)):
        others = [layout for layout in family.layouts if layout.component == first.component]
        rows: dict[str, Row] = {}
        for layout in (first, *others, first.in_diffusers_names()):
            for row in layout.rows:
                rows.setdefault(row.source, row)
        yield replace(first, rows=tuple(rows.values()))


def _text_encoders() -> Iterator[Layout]:
    """Yield the tables of text encoders, for each component that they are in some family."""
    encoders = [encoder for family in FAMILIES.values() for encoder in family.text_encoders]
    for encoder in {(e.model.title, e.component): e for e in encoders}.values():
        for layout in encoder.model.layouts:
            yield replace(layout, component=encoder.component)


_LAYOUTS = tuple(layout for family in FAMILIES.values() for layout in family.layouts)

#: Tables that name every module; every component of every family has one or more.
WHOLE: tuple[Layout, ...] = tuple(layout for layout in _LAYOUTS if layout.is_whole)

#: Tables of some modules, or of modules that another table also names.
FURTHER: tuple[Layout, ...] = tuple(layout for layout in _LAYOUTS if not layout.is_whole)

#: Joint tables for files that hold modules of several components under one prefix.
TOGETHER: tuple[Layout, ...] = tuple(
    layout for family in FAMILIES.values() for layout in _together(family)
)

#: Tables for files in diffusers' names, with the modules of the tables above.
IN_DIFFUSERS_NAMES: tuple[Layout, ...] = tuple(
    layout.in_diffusers_names()
    for layout in {(table.family, table.component): table for table in reversed(WHOLE)}.values()
    if layout.name != "diffusers"
)[::-1]

#: Tables with all names of a component, for files whose trainer renamed only some modules.
MIXED: tuple[Layout, ...] = tuple(
    layout for family in FAMILIES.values() for layout in _mixed(family)
)

TEXT_ENCODERS: tuple[Layout, ...] = tuple(_text_encoders())

#: Last names, in files and in diffusers, of parameters that are neither weight nor bias.
PARAMETERS: frozenset[str] = frozenset(
    path.rpartition(".")[2]
    for layout in _LAYOUTS
    for row in layout.rows
    if row.is_parameter
    for path in (row.source, *row.targets)
)

ALL: tuple[Layout, ...] = (*WHOLE, *FURTHER, *IN_DIFFUSERS_NAMES, *TEXT_ENCODERS)
