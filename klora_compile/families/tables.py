"""The tables by which files are read, made from the base models' records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import Family
from klora_runtime.families.rows import Layout, Row


def _together(family: Family) -> Iterator[Layout]:
    """Tables of one name for several components, as one."""
    for name in dict.fromkeys(layout.name for layout in family.layouts):
        own = [layout for layout in family.layouts if layout.name == name]
        if len(own) > 1:
            rows = [replace(r, component=other.component) for other in own[1:] for r in other.rows]
            yield replace(own[0], rows=(*own[0].rows, *rows))


def _mixed(family: Family) -> Iterator[Layout]:
    """All names of each component as one table, those of diffusers behind the authors'."""
    own = [layout for layout in family.layouts if layout.is_whole and layout.name != "diffusers"]
    for first in (*own, *_together(family)):
        others = [layout for layout in family.layouts if layout.component == first.component]
        rows: dict[str, Row] = {}
        for layout in (first, *others, first.in_diffusers_names()):
            for row in layout.rows:
                rows.setdefault(row.source, row)
        yield replace(first, rows=tuple(rows.values()))


def _text_encoders() -> Iterator[Layout]:
    """Every kind of text encoder in every component that it is for some family."""
    encoders = [encoder for family in FAMILIES.values() for encoder in family.text_encoders]
    for encoder in {(e.model.title, e.component): e for e in encoders}.values():
        for layout in encoder.model.layouts:
            yield replace(layout, component=encoder.component)


_LAYOUTS = tuple(layout for family in FAMILIES.values() for layout in family.layouts)

#: For every component of every family one table, or more, that name every module.
WHOLE: tuple[Layout, ...] = tuple(layout for layout in _LAYOUTS if layout.is_whole)

#: Tables of some modules, or of modules that another table names too.
FURTHER: tuple[Layout, ...] = tuple(layout for layout in _LAYOUTS if not layout.is_whole)

#: Files that hold modules of several components under one prefix: their tables as one.
TOGETHER: tuple[Layout, ...] = tuple(
    layout for family in FAMILIES.values() for layout in _together(family)
)

#: Files in diffusers' names, whose modules are those of the tables above.
IN_DIFFUSERS_NAMES: tuple[Layout, ...] = tuple(
    layout.in_diffusers_names()
    for layout in {(table.family, table.component): table for table in reversed(WHOLE)}.values()
    if layout.name != "diffusers"
)[::-1]

#: Files whose trainer renamed only some modules: all names of a component as one table.
MIXED: tuple[Layout, ...] = tuple(
    layout for family in FAMILIES.values() for layout in _mixed(family)
)

TEXT_ENCODERS: tuple[Layout, ...] = tuple(_text_encoders())

#: Last names of parameters that are no module's weight or bias, in files and in diffusers.
PARAMETERS: frozenset[str] = frozenset(
    path.rpartition(".")[2]
    for layout in _LAYOUTS
    for row in layout.rows
    if row.is_parameter
    for path in (row.source, *row.targets)
)

ALL: tuple[Layout, ...] = (*WHOLE, *FURTHER, *IN_DIFFUSERS_NAMES, *TEXT_ENCODERS)
