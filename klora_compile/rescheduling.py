"""A new schedule for an existing fusion, from its scores and without its sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from klora_compile.planning.deriving import note_of
from klora_compile.planning.fates import fate_with
from klora_compile.planning.pairing import check_slots, refuse_other_base
from klora_compile.planning.plan import LayerPlan, make_plan
from klora_compile.reading.layers import layer_name
from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.kit.picking import Picking
from klora_compile.rules.rule import Rule
from klora_compile.settings.config import Config
from klora_compile.settings.shared import Settings
from klora_compile.slots import in_order, made, role_of, scheduled
from klora_runtime import __version__
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule as StatedRule
from klora_runtime.errors import ConfigError, KloraError, shown

#: Greatest norm, and inner product, that scores may state; its square is a float64 too.
_MOST = 1e100


def reschedule(
    fusion: Fusion, rule: Rule | None = None, settings: Settings | None = None
) -> Fusion:
    """Return a fusion with the schedule that its sources have under other settings.

    The factors are the same tensors, so a handle swaps to the result without loading any.

    To change one setting of a rule, begin with the fusion's own:
    ``replace(Klora.from_parameters(fusion.rule.parameters), bias=0.2)``. To change its clock:
    ``replace(Settings.from_parameters(fusion.rule.parameters), clock="noise")``.

    Args:
        fusion: a compiled or loaded fusion.
        rule: the rule with its settings; by default the fusion's own.
        settings: the settings that all rules share; by default the fusion's own.

    Returns:
        The fusion that :func:`~klora_compile.compiler.compile_fusion` gives with these settings,
        less the slots that were dropped from the given one.

    Raises:
        ConfigError: a setting needs the sources, or does not fit these LoRAs.
        KloraError: the fusion lacks slots that the new schedule uses; ``issues`` names them.
    """
    before = Config.of_fusion(fusion)
    same = rule is None or rule == before.rule
    config = Config(
        before.rule if rule is None else rule,
        before.settings if settings is None else settings,
        before.picked if same else None,
        before.calibration if same else None,
    )
    if isinstance(config.rule, Calibrated) and config.calibration is None:
        raise ConfigError(config.rule.unmade)
    if isinstance(config.rule, Picking):
        raise ConfigError(
            f"rule {config.rule.name} measures the LoRAs together, which an artifact does not "
            f"hold; compile its sources with --rule {config.rule.name}."
        )
    slots = in_order(fusion.slots)
    _refuse_other_roles(fusion)
    check_slots(tuple(s for s in slots if s not in made(slots)), config.rule, config.settings)
    refuse_other_base(config.rule, fusion.candidates)
    _refuse_other_alphas(before.rule, config.rule)
    _refuse_other_factors(fusion, slots, config)
    numbers = {entry.layer: _numbers(entry, slots, fusion.rule.name) for entry in fusion.entries}
    for entry in fusion.entries:
        _refuse_other_sums(entry, numbers[entry.layer], fusion.rule.name, config.rule)
    plan = make_plan(numbers, config)
    missing = list(_missing(fusion, plan.layers))
    if missing:
        raise KloraError(
            f"{len(missing)} layers need a LoRA that this artifact dropped there. Compile its "
            "sources again without --drop-unused.",
            missing,
        )
    return replace(
        fusion,
        rule=StatedRule(config.rule.name, config.parameters(), plan.derived),
        entries=tuple(_entry(entry, plan.layers[entry.layer], config) for entry in fusion.entries),
        tool=f"klora {__version__}",
        clock=config.settings.clock,
    )


def _refuse_other_roles(fusion: Fusion) -> None:
    """Refuse slots whose names do not say their roles, which another writer may have chosen."""
    for name, slot in fusion.slots.items():
        if role_of(name) != slot.role:
            raise ConfigError(
                f"slots: {shown(name)} has the role {slot.role}, and its name does not say so; "
                "compile its sources again."
            )


def _refuse_other_alphas(before: Rule, after: Rule) -> None:
    """Refuse settings that would need the network alpha otherwise than it was measured."""
    if before.ignores_alpha != after.ignores_alpha:
        was, would = ("ignored", "applied") if before.ignores_alpha else ("applied", "ignored")
        raise ConfigError(
            f"these settings need the network alpha {would}; this artifact was measured with "
            f"it {was}. Compile its sources again."
        )


def _refuse_other_factors(fusion: Fusion, slots: Sequence[str], config: Config) -> None:
    """Refuse settings that would need other factors than the stored ones.

    A made slot that the rule does not use stays, and is idle.
    """
    rule = config.rule
    derived = rule.derives(scheduled(slots))
    for name in dict.fromkeys((*slots, *derived)):
        wanted = note_of(name, derived.get(name, (name,)), config)
        if name in fusion.slots:
            note = fusion.slots[name].derived
            if wanted == note or (name in made(slots) and name not in derived):
                continue
            stated = "is the LoRA as given" if note is None else f"is {shown(note)}"
        else:
            stated = "is not in this artifact"
        other = "the LoRA as given" if wanted is None else wanted
        raise ConfigError(
            f"slot {name} {stated}, rule {rule.name} with these settings needs {other}; compile "
            "its sources again."
        )


def _numbers(entry: Entry, slots: Sequence[str], rule: str) -> LayerNumbers:
    scores = entry.scores.get(rule)
    sides = {slot: scores.get(slot) for slot in slots} if scores is not None else {}
    known = all(
        _is_side(side) if side is not None else not entry.timeline.uses(slot)
        for slot, side in sides.items()
    )
    if scores is None or not known:
        raise KloraError(
            f"{shown(entry.layer)}: the artifact has no usable scores of rule {shown(rule)}; "
            "compile its sources again."
        )
    weight = None
    if entry.parameter == "bias":
        weight = layer_name(entry.component, entry.module, "weight")
    read = {slot: side and Side.from_scores(side) for slot, side in sides.items()}
    ruled = scheduled(slots)
    return LayerNumbers(
        component=entry.component,
        k=scores.get("k"),
        sides={slot: read[slot] for slot in ruled},
        weight=weight,
        made={slot: read[slot] for slot in made(slots)},
        beside={s: side for s, side in read.items() if s not in ruled and s not in made(slots)},
        name=entry.layer,
        products=_products(scores.get("products")),
    )


def _products(stated: object) -> dict[tuple[str, str], float] | None:
    """Return inner products from scores; None if there are none, or not by pairs of slots."""
    if not isinstance(stated, Mapping):
        return None
    found = {}
    for pair, value in stated.items():
        one, space, other = pair.partition(" ")
        if not space or not isinstance(value, int | float) or abs(value) > _MOST:
            return None
        found[one, other] = float(value)
    return found


def _is_side(value: object) -> bool:
    """Return whether scores are plausible: a delta is zero in all its norms or in none."""
    if not isinstance(value, Mapping):
        return False
    if not all(isinstance(value.get(name), int | float) for name in ("rank", "scaling")):
        return False
    norms = [value[name] for name in ("l1", "top_k", "frobenius") if value.get(name) is not None]
    usable = all(isinstance(norm, int | float) and 0 <= norm <= _MOST for norm in norms)
    return usable and (all(norms) or not any(norms))


def _refuse_other_sums(entry: Entry, layer: LayerNumbers, before: str, rule: Rule) -> None:
    """Refuse scores that lack the rule's numbers, or whose sums are over another K."""
    owners = [side for side in layer.sides.values() if side is not None]
    if layer.is_stepless or len(owners) < 2:
        return
    if any(getattr(side, name) is None for side in owners for name in rule.needs):
        raise ConfigError(
            f"rule {rule.name} needs {' and '.join(rule.needs)} of each layer; this artifact "
            f"was compiled with rule {before}, which did not measure them. Compile the sources "
            f"with --rule {rule.name}."
        )
    if rule.needs_products and not _has_products(layer):
        raise ConfigError(
            f"rule {rule.name} needs the inner products of the LoRAs, which rule {before} did not "
            f"measure. Compile the sources with --rule {rule.name}."
        )
    k = rule.count([side.rank for side in owners], math.prod(entry.shape))
    if k is not None and k != layer.k:
        raise ConfigError(
            f"top_k: {shown(entry.layer)} was measured over its {layer.k} largest weights; "
            f"these settings need {k}. Compile the sources again."
        )


def _has_products(layer: LayerNumbers) -> bool:
    known = layer.products or {}
    return all(pair in known for pair in combinations(layer.owners, 2))


def _missing(fusion: Fusion, layers: Mapping[str, LayerPlan]) -> Iterator[str]:
    for entry in fusion.entries:
        there = {*entry.factors, *entry.references}
        lost = [slot for slot in layers[entry.layer].used if slot not in there]
        if lost:
            yield f"{shown(entry.layer)}: {', '.join(lost)}"


def _entry(entry: Entry, planned: LayerPlan, config: Config) -> Entry:
    return replace(
        entry,
        fate=fate_with(planned.fate, (*entry.factors, *entry.references)),
        timeline=planned.timeline,
        scores={config.rule.name: planned.scores},
    )
