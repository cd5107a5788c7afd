"""Detection of a LoRA's base model family by shapes, by the table of its names, or by names.

Layers in diffusers' names often fit several similar families; the number of blocks distinguishes
most of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from klora_compile.families.tables import IN_DIFFUSERS_NAMES, WHOLE
from klora_compile.reading.layers import LayerFacts
from klora_runtime.artifact.schedule import TEXT_ENCODERS
from klora_runtime.families.catalogue import FAMILIES, families_of
from klora_runtime.families.family import Family
from klora_runtime.families.rows import Layout

#: Family -> its tables in diffusers' names, one per component.
_TABLES: Mapping[str, tuple[Layout, ...]] = {
    key: tuple(
        table
        for table in (*WHOLE, *IN_DIFFUSERS_NAMES)
        if table.family == key and table.name == "diffusers"
    )
    for key in FAMILIES
}
_BLOCK = re.compile(r"([A-Za-z_.]+?)\.(\d+)\.")


def family_of_layers(layers: Iterable[LayerFacts], families: Collection[str]) -> str | None:
    """Return the only family that :func:`families_of_layers` finds, or None."""
    found = families_of_layers(layers, families)
    return found[0] if len(found) == 1 else None


def families_of_layers(layers: Iterable[LayerFacts], families: Collection[str]) -> tuple[str, ...]:
    """Return the families that the layers may belong to.

    Args:
        layers: layers of diffusers' model.
        families: families of the tables that placed the layers, if a table did.

    Returns:
        Sorted keys of families; empty if the layers say nothing.
    """
    weights = [layer for layer in layers if layer.parameter == "weight"]
    if len(families) == 1:
        return tuple(families)
    denoiser = [layer for layer in weights if layer.component not in TEXT_ENCODERS]
    shapes = {(v.component, v.module): v.shape for v in weights if v.shape is not None}
    marked = families_of(shapes)
    if marked:
        marked = (marked & set(families)) or marked
        own = {k for k in marked if all(_has(FAMILIES[k], each) for each in denoiser)}
        own |= {k for k in _with_marks_of(marked) if k in possible_families(denoiser)}
        return tuple(sorted(_by_depth(own or marked, denoiser) or own or marked))
    if not denoiser or {layer.component for layer in denoiser} == {"unet"}:
        return ()
    found = _by_depth(possible_families(denoiser, families), denoiser)
    if families:
        found -= {key for key in found if _namesake(key) in found}
    return tuple(sorted(found))


def families_having(layers: Iterable[LayerFacts]) -> frozenset[str]:
    """Return the families that have all the denoiser's weights among the layers."""
    return possible_families(
        [v for v in layers if v.parameter == "weight" and v.component not in TEXT_ENCODERS]
    )


def possible_families(
    layers: Sequence[LayerFacts], families: Collection[str] = ()
) -> frozenset[str]:
    """Return the families that have all these layers, in widths of a released model.

    Widths that no released model is known to have exclude no family.

    Args:
        families: families of the tables that placed the layers, if a table did.
    """
    fitting = set(families) & FAMILIES.keys() or {
        key for key, family in FAMILIES.items() if all(_has(family, layer) for layer in layers)
    }
    known = {key: _widths_fit(FAMILIES[key], layers) for key in fitting}
    confirmed = True in known.values()
    return frozenset(key for key, fit in known.items() if not confirmed or fit is not False)


def _with_marks_of(keys: Collection[str]) -> set[str]:
    """Return the families whose layers carry the marks of one of these."""
    return {
        key
        for key, family in FAMILIES.items()
        if any(other.key in keys for other in family.shares_marks_of)
    }


def _namesake(key: str) -> str | None:
    """Return the family whose names a family's blocks share, or None."""
    other = FAMILIES[key].named_after if key in FAMILIES else None
    return None if other is None else other.key


def _has(family: Family, layer: LayerFacts) -> bool:
    """Return whether a layer may belong to a family."""
    first = family.denoisers[0] if layer.component in family.denoisers else layer.component
    for table in _TABLES[family.key]:
        match = table.match(layer.module, flat=False) if table.component == first else None
        if match is not None:
            ratio = match[0].ratio
            shape = layer.shape or ()
            return ratio is None or len(shape) < 2 or shape[0] == ratio * shape[1]
    return False


def _widths_fit(family: Family, layers: Iterable[LayerFacts]) -> bool | None:
    """Return whether the layers have widths of a released model; None if none are recorded."""
    widths = [(re.compile(pattern), known) for pattern, known in family.widths.items()]
    widths += [(mark.names, mark.widths) for mark in family.marks]
    found = None
    for layer in layers:
        if layer.shape is None or len(layer.shape) < 2:
            continue
        known = next((own for names, own in widths if names.search(layer.module)), None)
        if known is not None and layer.shape[1] not in known:
            return False
        found = True if known is not None else found
    return found


def _depths(layers: Iterable[LayerFacts]) -> Mapping[str, int]:
    """Return each list of blocks with the number of its last adapted block plus one."""
    depths: dict[str, int] = {}
    for layer in layers:
        block = _BLOCK.match(layer.module)
        if block is not None:
            depths[block[1]] = max(depths.get(block[1], 0), int(block[2]) + 1)
    return depths


def _deep_enough(families: Collection[str], layers: Iterable[LayerFacts]) -> set[str]:
    """Return the families with enough blocks."""
    depths = _depths(layers)
    return {
        key
        for key in families
        if all(depth <= FAMILIES[key].blocks.get(name, depth) for name, depth in depths.items())
    }


def _by_depth(families: Collection[str], layers: Sequence[LayerFacts]) -> set[str]:
    """Return the families with enough blocks; if all blocks of any are adapted, only those.

    A family that adds blocks to another one is left out if the other's blocks alone are adapted.
    """
    depths, possible = _depths(layers), _deep_enough(families, layers)
    inner = {_BLOCK.sub("", layer.module, count=1) for layer in layers}
    whole = {key for key in possible if _is_whole(FAMILIES[key], depths, ())}
    adding = {k for k in whole if any(o.key in whole for o in FAMILIES[k].shares_marks_of)}
    whole -= {key for key in adding if not _is_whole(FAMILIES[key], depths, inner)}
    return whole or possible


def _is_whole(family: Family, depths: Mapping[str, int], inner: Collection[str]) -> bool:
    """Return whether the last block of each list with such layers is adapted.

    Args:
        depths: from :func:`_depths`.
        inner: paths of layers inside their blocks; lists without an adapted layer count if they
            have one of these.
    """
    tables = [t for t in _TABLES[family.key] if t.component == family.denoisers[0]]
    named = {target for table in tables for row in table.rows for target in row.targets}
    having = {
        name
        for name in family.blocks
        if name in depths or any(f"{name}.{{}}.{path}" in named for path in inner)
    }
    return bool(depths) and any(
        depths == {name: size[name] for name in having if name in size}
        for size in (family.blocks, *family.smaller)
    )
