"""Derived slots: computed from several LoRAs, layer by layer, by a rule.

A derived slot replaces the one of a LoRA, as the projected content of NP-LoRA does, or is *made*:
it stands beside those of all LoRAs, as their merged delta does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from klora_compile.measuring.statistics import OnLayer
from klora_compile.reading.layers import Layer
from klora_compile.rules.rule import Derived, Rule
from klora_compile.settings.config import Config
from klora_compile.settings.shared import Settings
from klora_compile.slots import slot_of
from klora_compile.threads import single_thread
from klora_runtime.artifact.delta import LowRank

#: Form of the layers of made slots.
MADE = "merged"

#: Layer name -> layer.
Layers = Mapping[str, Layer]


@dataclass(frozen=True)
class Derivation:
    """The computation of one layer of a derived slot."""

    slot: str
    name: str
    """Name of the layer."""
    layers: Mapping[str, Layer]
    """Slot -> the layer in each LoRA that it is computed from."""


def derivations(given: Mapping[str, Layers], config: Config) -> list[Derivation]:
    """Return what a rule computes from LoRAs.

    If a LoRA of a derived slot lacks a layer, a slot that replaces the one of a LoRA keeps that
    layer unchanged. A made slot needs two LoRAs with the layer.

    Args:
        given: slot -> layers, of the LoRAs that the rule schedules.
        config: the rule and the shared settings, whose weights a made slot includes.
    """
    found = []
    for slot, origins in config.rule.derives(tuple(given)).items():
        own = slot in given
        names = given[slot] if own else sorted({name for each in origins for name in given[each]})
        for name in names:
            layers = {origin: given[origin][name] for origin in origins if name in given[origin]}
            if len(layers) == len(origins) if own else len(layers) > 1:
                weighed = layers if own else dict(_weighed(layers, config.settings))
                found.append(Derivation(slot, name, weighed))
    return found


def derive(
    given: Mapping[str, Layers],
    jobs: Sequence[Derivation],
    rule: Rule,
    *,
    calibrated: Mapping[str, Mapping[str, Derived]] | None = None,
    on_layer: OnLayer | None = None,
) -> dict[str, Layers]:
    """Return slot -> layers, with derived slots instead of given ones or beside them.

    On a CPU the bits do not depend on the number of threads.

    Args:
        given: see :func:`derivations`.
        jobs: what to compute.
        rule: the rule that computes it.
        calibrated: slot -> layer name -> what a calibration has computed already, all of that slot.
        on_layer: see :data:`~klora_compile.measuring.statistics.OnLayer`.
    """
    if not jobs:
        return dict(given)
    from klora_runtime.devices.precision import full_float32  # it imports torch

    slots = {slot: dict(layers) for slot, layers in given.items()}
    slots |= {job.slot: {} for job in jobs if job.slot not in given}
    with single_thread(), full_float32():
        for done, job in enumerate(jobs, start=1):
            if calibrated is not None and job.slot in calibrated:
                found = calibrated[job.slot].get(job.name)
            else:
                found = rule.derive(job.slot, job.layers)
            if found is not None:
                like = job.layers[job.slot if job.slot in given else next(iter(job.layers))]
                layer = replace(like, delta=found.delta)
                if job.slot not in given:
                    layer = _made(layer, found.error)
                slots[job.slot][job.name] = layer
            if on_layer is not None:
                on_layer(job.name, done, len(jobs))
    return dict(slots)


def note_of(slot: str, origins: Sequence[str], config: Config) -> str | None:
    """Return the artifact's note on how a slot is computed; None if it is a LoRA as given.

    Args:
        slot: the slot.
        origins: slots of the LoRAs that it is computed from.
        config: the rule and the shared settings.
    """
    note = config.rule.derivation(slot)
    if note is None or slot in origins:
        return note
    stated_weights = config.settings.weights
    parts = {n: v for n, v in stated_weights.items() if n != slot_of(n) and slot_of(n) in origins}
    whole = {n: v for n, v in stated_weights.items() if n not in parts}
    settings = replace(config.settings, weights=whole)
    weights = {origin: settings.weight(origin, "") for origin in origins} | parts
    stated = [f"{name} {float(value)!r}" for name, value in weights.items() if value != 1.0]
    return f"{note}, weights: {', '.join(stated)}" if stated else note


def _weighed(layers: Mapping[str, Layer], settings: Settings) -> Iterator[tuple[str, Layer]]:
    for slot, layer in layers.items():
        yield slot, replace(layer, scaling=layer.scaling * settings.weight(slot, layer.component))


def _made(layer: Layer, error: float) -> Layer:
    """Return a layer of a made slot, from one with its delta."""
    delta = layer.delta
    return replace(
        layer,
        rank=delta.rank if isinstance(delta, LowRank) else min(delta.flattened().values.shape),
        alpha=None,
        alpha_source="none",
        scaling=1.0,
        form=MADE,
        error=error,
        pair=None,
    )
