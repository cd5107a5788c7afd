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
    marked = (marked & set(families)) or marked
    if marked:
        having = {k for k in marked if all(_has(FAMILIES[k], each) for each in denoiser)} or marked
        return tuple(sorted(_without_children(_deep_enough(having, denoiser) or having)))
    if not denoiser or {layer.component for layer in denoiser} == {"unet"}:
        return ()
    fitting = set(families) or {
        key for key, family in FAMILIES.items() if all(_has(family, layer) for layer in denoiser)
    }
    fitting = {key for key in fitting if not _is_of_another_width(key, denoiser)} or fitting
    found = _without_children(_by_depth(fitting, denoiser))
    if families:
        found -= {key for key in found if _namesake(key) in found}
    return tuple(sorted(found))


def _parent(key: str) -> str | None:
    """Return the key of :attr:`Family.parent`, or None."""
    parent = FAMILIES[key].parent if key in FAMILIES else None
    return None if parent is None else parent.key


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


def _is_of_another_width(key: str | None, layers: Iterable[LayerFacts]) -> bool:
    """Return whether a layer that marks the family, or its parent, has another width."""
    if key is None:
        return False
    marks = FAMILIES[key].marks if key in FAMILIES else ()
    return _is_of_another_width(_parent(key), layers) or any(
        mark.names.search(layer.module) and layer.shape[1] not in mark.widths
        for layer in layers
        for mark in marks
        if layer.shape is not None and len(layer.shape) > 1
    )


def _without_children(keys: Collection[str]) -> set[str]:
    """Return the families without those whose parent is among them."""
    return {key for key in keys if _parent(key) not in keys}


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
    """Return the families with enough blocks; if any has its last block adapted, only those."""
    depths, possible = _depths(layers), _deep_enough(families, layers)
    whole = {
        key
        for key in possible
        if depths and all(n == FAMILIES[key].blocks.get(name) for name, n in depths.items())
    }
    return whole or possible
