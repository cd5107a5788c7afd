"""Derived slots: computed from several LoRAs, layer by layer, by a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from klora_compile.reading.layers import Layer
from klora_compile.rules.rule import Rule
from klora_compile.threads import single_thread


def layers_of_slots(
    given: Mapping[str, Mapping[str, Layer]], rule: Rule
) -> dict[str, Mapping[str, Layer]]:
    """Return slot -> layer name -> layer, with the derived slots in place of the given ones.

    If a LoRA of a derived slot lacks a layer, the slot has the layer of its own LoRA unchanged. On
    a CPU the bits do not depend on the number of threads.
    """
    slots = dict(given)
    if not rule.derives:
        return slots
    with single_thread():
        for slot, origins in rule.derives.items():
            derived = dict(slots[slot])
            for name in derived:
                layers = {
                    origin: given[origin][name] for origin in origins if name in given[origin]
                }
                if len(layers) == len(origins):
                    derived[name] = replace(derived[name], delta=rule.derive(slot, layers))
            slots[slot] = derived
    return slots
