"""Where modules go that a file names as the model's authors do: one table for all of them.

A name such as ``double_blocks_0_img_attn_qkv`` may be in the tables of several families. All of a
file's modules are of one model, so the tables that name every one of them decide together; where
they say different things, nothing is guessed.

Two kinds of files have names that no table has as they stand. musubi-tuner's ``convert_lora.py``
guesses which underscores of a flat name were dots: such names are found by their letters alone, for
one flat name is one module. Other trainers rename only some modules to the authors' names: such
files are read by all names of one family together. Both are tried only where no table has all names
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
from klora_runtime.errors import shown
from klora_runtime.families.rows import Layout, Placement, Row

#: The tables of denoisers; of equal ones the first gives the file's layout its name.
_TABLES: tuple[Layout, ...] = tuple(
    table
    for table in (*WHOLE, *FURTHER, *IN_DIFFUSERS_NAMES, *TOGETHER)
    if table.component in ("unet", "transformer")
)
_MIXED: tuple[Layout, ...] = tuple(
    table for table in MIXED if table.component in ("unet", "transformer")
)
_IN_DIFFUSERS_NAMES = tuple(table for table in _TABLES if table.name == "diffusers")


@dataclass(frozen=True)
class Stem:
    """A module as a file names it."""

    name: str
    flat: bool
    """Whether underscores stand for dots."""


@dataclass(frozen=True)
class Choice:
    """The table of a file's modules, and the modules that are not in it."""

    table: Layout | None
    """None where no module is left. Of tables that say the same, one in diffusers' names."""
    families: frozenset[str] = frozenset()
    """Of all tables that say the same."""
    strangers: Mapping[Stem, str] = field(default_factory=dict)
    """Modules that the table does not have, and why they are none."""
    ambiguous: Mapping[Stem, str] = field(default_factory=dict)
    """Modules that may go to two places; then the table is one of several."""


def choose(shapes: Mapping[Stem, tuple[int, int] | None], family: str | None = None) -> Choice:
    """The table that says where all these modules go, or most of them.

    Args:
        shapes: at least one module, and rows and columns of its weight where they are known; they
            decide where names do not.
        family: as the file states it; it decides where widths do not either.
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
    """Whether some table has all of these modules."""
    return bool(_fitting(stems, None))


def in_authors_names(stems: Collection[Stem]) -> bool:
    """Whether modules that a file names behind diffusers' component are for a table nevertheless.

    They are where a table has all or most of them, some under names that diffusers has not. A name
    that no model has does not change how the others are read.
    """
    if any(all(_exact(table, stem) for stem in stems) for table in _IN_DIFFUSERS_NAMES):
        return False
    _, found = _best(stems)
    strange = [s for s in found if not any(_exact(table, s) for table in _IN_DIFFUSERS_NAMES)]
    return bool(strange) and 2 * len(found) > len(stems)


def _fitting(stems: Collection[Stem], family: str | None) -> list[Layout]:
    """The tables that have all of these modules, by the strictest reading that any allows.

    Args:
        family: as the file states it; a less strict reading is taken if only that fits it.
    """
    strictest: list[Layout] = []
    for tables, match in ((_TABLES, _exact), (_TABLES, _match), (_MIXED, _match)):
        found = [table for table in tables if all(match(table, stem) for stem in stems)]
        if any(family in (None, table.family) for table in found):
            return found
        strictest = strictest or found
    return strictest


def _best(stems: Collection[Stem]) -> tuple[Layout, list[Stem]]:
    """The table that has most of these modules, and which it has."""
    found = ((table, [s for s in stems if _match(table, s)]) for table in (*_TABLES, *_MIXED))
    return max(found, key=lambda each: len(each[1]))


def component_of(table: Layout, stem: Stem) -> str:
    """The component that a table of :func:`choose` sends a module to."""
    match = _match(table, stem)
    assert match is not None
    return match[0].component or table.component


def targets_of(table: Layout, stem: Stem) -> tuple[Placement, ...]:
    """The modules of diffusers that one becomes, whatever its rows."""
    match = _match(table, stem)
    assert match is not None
    return match[0].targets_of(match[1])


def in_diffusers_names(path: str) -> Placement:
    """What a path means that a file has in diffusers' names: a module, or a parameter of one."""
    module, _, last = path.rpartition(".")
    return Placement(module, None, last) if last in PARAMETERS else Placement(path, None)


def placements(
    table: Layout, stem: Stem, out: int, inner: int | None
) -> tuple[Placement, ...] | str:
    """The modules of diffusers that one becomes, and the rows of each.

    Args:
        table: of :func:`choose`.
        out: rows of the module's weight.
        inner: its columns; None where the file has only a bias of it.

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
    """Whether the columns of a weight change where its rows go."""
    found = set()
    for inner in (out, max(1, out // 2), max(1, out // 3)):
        try:
            found.add(row.placements(numbers, out, inner))
        except ValueError:
            found.add(())
    return len(found) > 1


def _match(table: Layout, stem: Stem) -> tuple[Row, tuple[str, ...]] | None:
    """A module in a table, by its letters where it is not there as it stands."""
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
    """Where a table sends a module; equal for tables that say the same."""
    match = _match(table, stem)
    assert match is not None
    row, numbers = match
    targets = tuple(target.format(*numbers) for target in row.targets)
    return row.component or table.component, targets, row.split


def _strangers(stems: Sequence[Stem]) -> Iterator[tuple[Stem, str]]:
    """The modules that are not in the table that names most."""
    best, found = _best(stems)
    known = next(iter(found), None)
    for stem in stems:
        if known is None:
            yield stem, "klora knows no model with a module of this name"
        elif not _match(best, stem):
            yield stem, f"is not a module of {best.family}, though {shown(known.name)} is"
