"""Verification of an artifact: compile its sources again and compare the results."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from klora_compile.compiler import compile_sources
from klora_compile.measuring.statistics import OnLayer
from klora_compile.planning.pairing import check_loras, check_slots
from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.lookup import RULES, known_rule
from klora_compile.rules.rule import Derived, Rule
from klora_compile.settings.calibration import Calibration
from klora_compile.settings.config import CALIBRATED, Config
from klora_compile.slots import made, scheduled, slots_of
from klora_compile.sources import Lora, other_sources, read_again
from klora_compile.storing.dropping import holds_unused, without_unused
from klora_compile.storing.loss import relative_error
from klora_compile.storing.thin import thin
from klora_runtime.artifact.delta import Delta
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.devices.names import as_device
from klora_runtime.errors import ConfigError, KloraError, shown

T = TypeVar("T")

#: Tolerance between two kinds of device: relative for scores, absolute for breakpoints.
TOLERANCE = 1e-6

#: Relative tolerance between the stated and the measured error of a compressed delta: the stated
#: error has four digits, so it may be off by half a unit of the last digit.
ERROR_TOLERANCE = 6e-4

#: Notes of a source that say where files were: the LoRA's, the base model's.
_PLACES = ("hub", "base")


def verify_fusion(
    fusion: Fusion,
    sources: Mapping[str, Lora],
    *,
    base: str | os.PathLike[str] | None = None,
    device: str = "auto",
    on_layer: OnLayer | None = None,
) -> list[str]:
    """Compile a fusion's LoRAs again with its own settings and compare everything.

    Args:
        fusion: a fusion by any rule.
        sources: slot (``content``, ``style``; ``content.1`` and so on for several) -> LoRA, which
            is read with the fusion's options.
        base: the base model, for LoRAs that need its weights.
        device: where to measure.
        on_layer: see :func:`~klora_compile.compiler.compile_fusion`.

    Returns:
        One sentence per difference; empty if the fusion is what its sources give. Scores may
        differ by 1e-6 of their size and breakpoints by 1e-6, as between a CPU and a GPU. Factors
        must be equal to the bit; the error of compressed ones must be the stated one. Scores of an
        earlier rule that the present rule does not use are not compared, nor is what that rule
        merged. What a base model calibrated is taken as it is, and all that follows is compared. A
        layer may lack the slots that never act.

    Raises:
        LoraError: a file cannot be read completely.
        PairingError: the LoRAs do not match each other.
        ConfigError: the device is unknown.
        KloraError: this klora does not know the fusion's rule or its settings.
    """
    where = as_device(device)
    adapters = read_again(fusion, sources, base)
    wrong = list(other_sources(fusion, adapters))
    if wrong:
        return wrong
    if fusion.rule.name not in RULES:
        raise KloraError(f"rule {shown(fusion.rule.name)} is unknown to this klora; update it.")
    try:
        config = Config.from_parameters(fusion.rule.name, fusion.rule.parameters)
        check_slots(slots_of(adapters), config.rule, config.settings)
    except (ConfigError, TypeError) as error:
        return [f"rule: its parameters are not valid: {error}"]
    check_loras({name: adapter.survey for name, adapter in adapters.items()}, config.rule)
    again = compile_sources(
        adapters,
        config,
        device=where,
        calibrated=calibrated_slots(fusion, config.rule),
        on_layer=on_layer,
    )
    if fusion.is_thin:
        again = thin(again, adapters)
    return list(_compare(_without(fusion, other_merges(fusion)), again))


def _compare(fusion: Fusion, again: Fusion) -> Iterator[str]:
    fusion, again = _without_places(fusion), _without_places(again)
    for part in ("sources", "slots", "family", "families", "clock"):
        if getattr(fusion, part) != getattr(again, part):
            yield f"{part}: stated {getattr(fusion, part)}, computed {getattr(again, part)}"
    if fusion.rule.name != again.rule.name:
        yield f"rule: stated {shown(fusion.rule.name)}, picked {again.rule.name}"
        return
    for part in ("parameters", "derived"):
        if not _close(getattr(fusion.rule, part), getattr(again.rule, part)):
            yield f"rule.{part}: stated and computed values differ"
    sums = again.rule.name in RULES and "top_k" in RULES[again.rule.name].needs
    stated, computed = _by_name(fusion), _by_name(again)
    yield from (f"{name}: is in no source" for name in sorted(stated.keys() - computed.keys()))
    yield from (f"{name}: is missing" for name in sorted(computed.keys() - stated.keys()))
    for name in sorted(stated.keys() & computed.keys()):
        yield from (
            f"{name}: {what} differs" for what in _compare_entry(stated[name], computed[name], sums)
        )


def _without_places(fusion: Fusion) -> Fusion:
    """Return a fusion that does not say where its files were: equal ones may lie anywhere."""
    sources = {
        name: replace(source, notes={k: v for k, v in source.notes.items() if k not in _PLACES})
        for name, source in fusion.sources.items()
    }
    return replace(fusion, sources=sources)


def not_compared(fusion: Fusion) -> tuple[str, ...]:
    """Return in words what a fusion also holds, of earlier rules, and verification skips."""
    skipped = {
        "sums of an earlier rule": keeps_other_sums(fusion),
        "what an earlier rule merged": bool(other_merges(fusion)),
    }
    return tuple(what for what, there in skipped.items() if there)


def calibrated_slots(fusion: Fusion, rule: Rule) -> dict[str, dict[str, Derived]] | None:
    """Return slot -> layer name -> what a calibration gave, as a fusion states it; None if none.

    Without the base model it cannot be computed again.
    """
    if not isinstance(rule, Calibrated):
        return None
    return {
        slot: {
            entry.layer: Derived(entry.factors[slot].delta)
            for entry in fusion.entries
            if slot in entry.factors
        }
        for slot in rule.derives(scheduled(fusion.slots))
        if slot in fusion.slots
    }


def not_computed(fusion: Fusion) -> Iterator[str]:
    """Yield in words what only the base model could tell, and verification takes as stated."""
    found = Calibration.from_parameters(fusion.rule.parameters.get(CALIBRATED))
    rule = known_rule(fusion.rule.name, fusion.rule.parameters)
    if isinstance(rule, Calibrated):
        for slot, own in (calibrated_slots(fusion, rule) or {}).items():
            yield f"the factors of {slot} in {len(own)} layers, which need the base model"
    elif found is not None:
        yield (
            f"the weights in the parameters of rule {shown(fusion.rule.name)}, which rule "
            f"{shown(found.by)} fitted with the base model {shown(found.model)}"
        )


def other_merges(fusion: Fusion) -> tuple[str, ...]:
    """Return made slots of an earlier rule, which never act; verification skips them."""
    rule = known_rule(fusion.rule.name, fusion.rule.parameters)
    own = {} if rule is None else rule.derives(scheduled(fusion.slots))
    idle = (slot for slot in made(fusion.slots) if slot not in own)
    return tuple(s for s in idle if not any(e.timeline.uses(s) for e in fusion.entries))


def _without(fusion: Fusion, slots: Sequence[str]) -> Fusion:
    """Return a fusion without some slots that never act."""
    if not slots:
        return fusion

    def less(numbers: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in numbers.items() if name not in slots}

    entries = tuple(
        replace(
            entry,
            timeline=Timeline(entry.timeline.starts, less(entry.timeline.coefficients)),
            factors=less(entry.factors),
            references=less(entry.references),
            scores={rule: less(scores) for rule, scores in entry.scores.items()},
        )
        for entry in fusion.entries
    )
    return replace(fusion, slots=less(fusion.slots), entries=entries)


def keeps_other_sums(fusion: Fusion) -> bool:
    """Return whether a fusion has scores of an earlier rule, which verification skips."""
    if fusion.rule.name not in RULES or "top_k" in RULES[fusion.rule.name].needs:
        return False
    return any(
        isinstance(side, Mapping) and side.get("top_k") is not None
        for entry in fusion.entries
        for side in entry.scores.get(fusion.rule.name, {}).values()
    )


def _by_name(fusion: Fusion) -> dict[str, Entry]:
    return {entry.path: entry for entry in fusion.entries}


def _compare_entry(one: Entry, other: Entry, sums: bool) -> Iterator[str]:
    if not holds_unused(one):
        other = without_unused(other)
    if one.shape != other.shape:
        yield "shape"
    if one.fate != other.fate:
        yield "fate"
    if not _close(list(one.timeline.rows()), list(other.timeline.rows()), absolute=TOLERANCE):
        yield "timeline"
    if not _close(one.scores if sums else _without_sums(one.scores, other.scores), other.scores):
        yield "scores"
    if one.references != other.references:
        yield "where its factors lie"
    if one.factors.keys() != other.factors.keys():
        yield "set of stored slots"
        return
    for slot, stored in one.factors.items():
        delta, expected = stored.delta, other.factors[slot].delta
        if stored.scale != other.factors[slot].scale:
            yield f"scale of {slot}"
        pairs = zip(delta.tensors, expected.tensors, strict=False)
        if type(delta) is not type(expected):
            yield f"kind of {slot}"
        elif stored.quantised is not None:
            yield from _compare_compressed(slot, delta, stored.quantised.error, expected)
        elif not all(_same(own, other) for own, other in pairs):
            yield f"factors of {slot}"


def _compare_compressed(slot: str, delta: Delta, stated: float, expected: Delta) -> Iterator[str]:
    found = relative_error(expected, delta)
    if not math.isclose(found, stated, rel_tol=ERROR_TOLERANCE, abs_tol=1e-9):
        yield f"error of compressed {slot} (stated {stated:.3g}, found {found:.3g})"


def _without_sums(stated: Mapping[str, Any], computed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stated scores without those that only an earlier rule of the artifact used."""
    return {
        key: _without_sums(value, computed[key])
        if isinstance(value, Mapping) and isinstance(computed.get(key), Mapping)
        else value
        for key, value in stated.items()
        if key in computed
    } | ({"k": None} if "k" in computed else {})


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _close(one: Any, other: Any, absolute: float = 0.0) -> bool:
    """Return whether values are equal, numbers within relative TOLERANCE or ``absolute``."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_close(one[k], other[k], absolute) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_close(a, b, absolute) for a, b in pairs)
    if type(one) is bool or type(other) is bool:
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=absolute)
    return bool(one == other)
