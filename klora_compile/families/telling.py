"""The base model family of a LoRA, told by shapes, by the table of its names, or by its names.

Layers in diffusers' names often fit several families that are built alike; how many blocks there
are tells most of them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from klora_compile.families.tables import IN_DIFFUSERS_NAMES, WHOLE
from klora_compile.reading.layers import LayerFacts
from klora_runtime.artifact.fusion import TEXT_ENCODERS
from klora_runtime.families.catalogue import family_of
from klora_runtime.families.rows import Layout

#: Family -> first name of its blocks -> how many there are. Only of families that share names.
_DEPTHS: Mapping[str, Mapping[str, int]] = {
    "flux.1": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "chroma": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "hunyuan-video": {"transformer_blocks": 20, "single_transformer_blocks": 40},
    "flux.2": {"transformer_blocks": 8, "single_transformer_blocks": 48},
}

#: A family whose models were trained from those of another one: LoRAs of layers that both have are
#: the other one's.
_TRAINED_FROM: Mapping[str, str] = {"chroma": "flux.1"}

_TABLES = (*(table for table in WHOLE if table.name == "diffusers"), *IN_DIFFUSERS_NAMES)
_BLOCK = re.compile(r"([A-Za-z_]+)\.(\d+)\.")


def family_of_layers(layers: Iterable[LayerFacts], families: Collection[str]) -> str | None:
    """A family of the catalogue or of the tables, or None where several are left.

    Args:
        layers: of diffusers' model.
        families: of the tables that placed them, where their names were for a table.
    """
    weights = [layer for layer in layers if layer.parameter == "weight"]
    if len(families) == 1:
        return next(iter(families))
    by_shape = family_of({(v.component, v.module): v.shape for v in weights})
    if by_shape is not None:
        return by_shape
    denoiser = [layer for layer in weights if layer.component not in TEXT_ENCODERS]
    if not denoiser or {layer.component for layer in denoiser} == {"unet"}:
        return None
    fitting = set(families) or {
        table.family for table in _TABLES if all(_has(table, layer) for layer in denoiser)
    }
    found = _by_depth(fitting, [layer.module for layer in denoiser])
    found -= {family for family in found if _TRAINED_FROM.get(family) in found}
    return found.pop() if len(found) == 1 else None


def _has(table: Layout, layer: LayerFacts) -> bool:
    component = "transformer" if layer.component == "transformer_2" else layer.component
    if component != table.component:
        return False
    match = table.match(layer.module, flat=False)
    if match is None:
        return False
    ratio = match[0].ratio
    return ratio is None or len(layer.shape) < 2 or layer.shape[0] == ratio * layer.shape[1]


def _by_depth(families: Collection[str], modules: Iterable[str]) -> set[str]:
    """Those that have as many blocks; of them the ones whose last block is adapted, if any."""
    depths: dict[str, int] = {}
    for module in modules:
        block = _BLOCK.match(module)
        if block is not None:
            depths[block[1]] = max(depths.get(block[1], 0), int(block[2]) + 1)
    known = {family: _DEPTHS.get(family, depths) for family in families}
    possible = {
        family
        for family, own in known.items()
        if all(depth <= own.get(name, depth) for name, depth in depths.items())
    }
    whole = {
        family
        for family in possible
        if family in _DEPTHS and all(d == known[family].get(n) for n, d in depths.items())
    }
    return whole or possible
