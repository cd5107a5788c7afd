"""From a linked pair to a fusion: sources, slots, layers, and factors or references to them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.making import made
from klora_runtime.artifact.schedule import CONTENT, STYLE, Reference, Rule, Slot
from klora_runtime.catalogue.document import WHOLE, CataloguedLora, Kind
from klora_runtime.catalogue.factors import Factors
from klora_runtime.linking.entries import LinkedLayer, Pair, layers_of

#: Role of a slot that acts beside the content and the style.
_ALWAYS = "always"


def fusion_of_pair(
    pair: Pair,
    loras: Mapping[str, CataloguedLora],
    kind: Kind,
    tool: str,
    factors: Mapping[str, Factors] | None,
) -> Fusion:
    """Return the fusion of a linked pair, equal to what the compiler makes.

    Args:
        pair: the linked pair.
        loras: slot -> its LoRA: content, style, and those that always act.
        kind: the base models of the pair.
        tool: name and version of the compiler that made the catalogue.
        factors: slot -> its factors; None for a thin fusion.
    """
    terms = pair.terms
    gamma = pair.gamma
    return Fusion.linked(
        partial(_entries, pair, loras, factors),
        sources={
            source_name(slot, half): source
            for slot, lora in loras.items()
            for half, source in lora.sources.items()
        },
        slots={
            slot: Slot(
                slot if slot in (CONTENT, STYLE) else _ALWAYS,
                tuple(source_name(slot, half) for half in lora.sources),
            )
            for slot, lora in loras.items()
        },
        rule=Rule(terms.rule, terms.parameters, {"gamma": gamma} if gamma else {}),
        family=kind.family,
        tool=tool,
        families=kind.families,
        clock=terms.clock,
    )


def source_name(slot: str, half: str) -> str:
    """Return the name of a source of a slot."""
    return slot if half == WHOLE else f"{slot}.{half}"


def _entries(
    pair: Pair, loras: Mapping[str, CataloguedLora], factors: Mapping[str, Factors] | None
) -> tuple[Entry, ...]:
    return tuple(_entry(layer, pair, loras, factors) for layer in layers_of(pair))


def _entry(
    layer: LinkedLayer,
    pair: Pair,
    loras: Mapping[str, CataloguedLora],
    factors: Mapping[str, Factors] | None,
) -> Entry:
    place = layer.place
    held: dict[str, Any] = {}
    for slot in layer.present:
        at = loras[slot].table.index[place.path]
        scale = layer.scales[slot]
        if factors is not None:
            held[slot] = Stored(scale, factors[slot].deltas[at])
            continue
        own = loras[slot].keys
        assert own is not None
        keys = own[at]
        held[slot] = Reference(scale, source_name(slot, keys.half), keys.down, keys.up, keys.rows)
    return made(
        Entry,
        component=place.component,
        module=place.module,
        parameter=place.parameter,
        shape=place.shape,
        fate=layer.fate,
        timeline=layer.timeline,
        factors={} if factors is None else held,
        scores={pair.terms.rule: layer.scores},
        references=held if factors is None else {},
    )
