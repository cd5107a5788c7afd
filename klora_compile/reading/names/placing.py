"""Placing of modules in the names of a model's authors: one table for all modules of a file.

A name such as ``double_blocks_0_img_attn_qkv`` may be in the tables of several families. All
modules of a file belong to one model, so the tables that name all of them decide together; if they
disagree, nothing is guessed.

Two kinds of files have names that no table has exactly. musubi-tuner's ``convert_lora.py`` guesses
which underscores of a flat name were dots; such names are matched by their letters alone, because a
flat name means one module. Other trainers rename only some modules to the authors' names; such
files are read with all names of one family together. Both are tried only if no table has all names
exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from klora_compile.families.tables import (
    FURTHER,
    IN_DIFFUSERS_NAMES,
    MIXED,
    PARAMETERS,
    TOGETHER,
    WHOLE,
)
from klora_compile.reading.names.table_index import Stem, TableIndex
from klora_runtime.errors import shown
from klora_runtime.families.rows import Layout, Placement, Row

_EXACT = (*WHOLE, *FURTHER, *IN_DIFFUSERS_NAMES, *TOGETHER)
#: Of equal tables, the first one names the file's layout.
TABLES = TableIndex(_EXACT)
_MIXED = TableIndex(MIXED)
_ALL = TableIndex((*_EXACT, *MIXED))
_IN_DIFFUSERS_NAMES = TableIndex(table for table in _EXACT if table.name == "diffusers")


@dataclass(frozen=True)
class Choice:
    """The table for a file's modules, and the modules that it lacks."""

    table: Layout | None
    """Table; None if no module is left. Of tables that agree, one in diffusers' names."""
    families: frozenset[str] = frozenset()
    """Families of all tables that agree."""
    strangers: Mapping[Stem, str] = field(default_factory=dict)
    """Modules that the table lacks -> the reason."""
    ambiguous: Mapping[Stem, str] = field(default_factory=dict)
    """Modules with several possible destinations; the table is then one of several."""


def choose(shapes: Mapping[Stem, tuple[int, int] | None], family: str | None = None) -> Choice:
    """Choose the table that places all these modules, or most of them.

    Args:
        shapes: one or more modules -> rows and columns of the weight, if known, which decide if
            names do not.
        family: the family that the file states, which decides if widths do not.
    """
    stems = list(shapes)
    fitting = _fitting(stems, family)
    if not fitting:
        strangers = dict(_strangers(stems))
        rest = {stem: shape for stem, shape in shapes.items() if stem not in strangers}
        found = choose(rest, family) if rest else Choice(None)
        return replace(found, strangers=strangers)
    alike = [t for t in fitting if all(_has_ratio(t, stem, shapes[stem]) for stem in stems)]
    fitting = alike or fitting
    fitting = [table for table in fitting if table.family == family] or fitting
    different = {tuple(_meaning(table, stem) for stem in stems): table for table in fitting}
    ambiguous: dict[Stem, str] = {}
    if len(different) > 1:
        families = ", ".join(sorted({table.family for table in fitting}))
        widths = "" if alike else "; the widths match none of them"
        ambiguous = {
            stem: f"is ambiguous: {families} have a module of this name, each at another place"
            f"{widths}"
            for stem in stems
            if len({_meaning(table, stem) for table in fitting}) > 1
        }
    table = next((table for table in fitting if table.name == "diffusers"), fitting[0])
    return Choice(table, frozenset(table.family for table in fitting), {}, ambiguous)


def fits(stems: Collection[Stem]) -> bool:
    """Return whether a table has all these modules."""
    return bool(_fitting(stems, None))


def in_authors_names(stems: Collection[Stem]) -> bool:
    """Return whether modules after a component of diffusers are in the authors' names.

    They are if a table has all or most of them, and some of the names are not diffusers'. A name
    that no model has does not change how the others are read.
    """
    if _IN_DIFFUSERS_NAMES.having_all(stems, _exact):
        return False
    _, found = _best(stems)
    strange = [stem for stem in found if not _IN_DIFFUSERS_NAMES.have(stem, _exact)]
    return bool(strange) and 2 * len(found) > len(stems)


def _fitting(stems: Collection[Stem], family: str | None) -> list[Layout]:
    """Return the tables that have all these modules, by the strictest possible reading.

    Args:
        family: the family that the file states; a less strict reading is used if only that fits it.
    """
    strictest: list[Layout] = []
    for tables, match in ((TABLES, _exact), (TABLES, _match), (_MIXED, _match)):
        found = tables.having_all(stems, match)
        if any(family in (None, table.family) for table in found):
            return found
        strictest = strictest or found
    return strictest


def _best(stems: Collection[Stem]) -> tuple[Layout, list[Stem]]:
    """Return the table with most of these modules, and those modules."""
    table = _ALL.having_most(stems, _match)
    return table, [stem for stem in stems if _match(table, stem)]


def component_of(table: Layout, stem: Stem) -> str:
    """Return the component of a module in a table from :func:`choose`."""
    match = _match(table, stem)
    assert match is not None
    return match[0].component or table.component


def targets_of(table: Layout, stem: Stem) -> tuple[Placement, ...]:
    """Return the modules of diffusers that a module becomes, whatever its rows."""
    match = _match(table, stem)
    assert match is not None
    return match[0].targets_of(match[1])


def in_diffusers_names(path: str) -> Placement:
    """Return the meaning of a path in diffusers' names: a module, or a parameter of one."""
    module, _, last = path.rpartition(".")
    return Placement(module, None, last) if last in PARAMETERS else Placement(path, None)


def placements(
    table: Layout, stem: Stem, out: int, inner: int | None
) -> tuple[Placement, ...] | str:
    """Return the modules of diffusers that a module becomes, and the rows of each.

    Args:
        table: the table from :func:`choose`.
        out: rows of the module's weight.
        inner: columns of the weight; None if the file has only its bias.

    Returns:
        The placements, or why there are none.
    """
    match = _match(table, stem)
    assert match is not None
    row, numbers = match
    if inner is None:
        if row.ratio is None and _needs_columns(row, numbers, out):
            return (
                "only its bias is in the file; the weight is needed to know how its rows are split"
            )
        inner = out if row.ratio is None else int(out / row.ratio)
    try:
        return row.placements(numbers, out, inner)
    except ValueError as error:
        return f"cannot be split into {', '.join(row.targets)}: {error}"


def _needs_columns(row: Row, numbers: tuple[str, ...], out: int) -> bool:
    """Return whether the destination of rows depends on the columns of the weight."""
    found = set()
    for inner in (out, max(1, out // 2), max(1, out // 3)):
        try:
            found.add(row.placements(numbers, out, inner))
        except ValueError:
            found.add(())
    return len(found) > 1


def _match(table: Layout, stem: Stem) -> tuple[Row, tuple[str, ...]] | None:
    """Return the row of a module, exactly or else by its letters."""
    found = _exact(table, stem)
    if found is not None or stem.flat:
        return found
    return table.match(stem.name.replace(".", "_"), flat=True)


def _exact(table: Layout, stem: Stem) -> tuple[Row, tuple[str, ...]] | None:
    return table.match(stem.name, flat=stem.flat)


def _has_ratio(table: Layout, stem: Stem, shape: tuple[int, int] | None) -> bool:
    match = _match(table, stem)
    assert match is not None
    ratio = match[0].ratio
    return ratio is None or shape is None or shape[0] == ratio * shape[1]


def _meaning(table: Layout, stem: Stem) -> tuple[object, ...]:
    """Return a key of a module's destination, equal for tables that agree."""
    match = _match(table, stem)
    assert match is not None
    row, numbers = match
    targets = tuple(target.format(*numbers) for target in row.targets)
    return row.component or table.component, targets, row.split


def _strangers(stems: Sequence[Stem]) -> Iterator[tuple[Stem, str]]:
    """Yield the modules that are missing in the table with most names, with the reason."""
    best, found = _best(stems)
    known = next(iter(found), None)
    for stem in stems:
        if known is None:
            yield stem, "klora knows no model with a module of this name"
        elif not _match(best, stem):
            yield stem, f"is not a module of {best.family}, though {shown(known.name)} is"
