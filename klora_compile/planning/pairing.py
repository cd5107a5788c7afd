"""Checks that LoRAs can be fused: their number, roles, shapes and base models."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from klora_compile.reading.layers import LayerFacts
from klora_compile.reading.telling import families_of_layers, possible_families
from klora_compile.rules.lookup import RULE_OF_ONE, RULES
from klora_compile.rules.rule import Rule
from klora_compile.settings.shared import Settings
from klora_compile.slots import HIGH, SCHEDULED, role_of, scheduled, slot_of, slots_of
from klora_runtime.artifact.checks import MAX_SLOTS
from klora_runtime.artifact.schedule import TEXT_ENCODERS
from klora_runtime.errors import ConfigError, PairingError, shown
from klora_runtime.families.catalogue import families_name, family_of


class Told(Protocol):
    """What is known of a LoRA's file without its values, from its header or from a profile."""

    @property
    def path(self) -> Path: ...

    @property
    def families(self) -> tuple[str, ...]: ...

    @property
    def layers(self) -> tuple[LayerFacts, ...]: ...


def check_slots(slots: tuple[str, ...], rule: Rule, settings: Settings) -> None:
    """Check that a rule takes these LoRAs, and that settings name no other ones.

    Args:
        slots: all slots, those of role ``always`` included.
        rule: the rule, which schedules the others.
        settings: the settings that all rules share.

    Raises:
        ConfigError: the rule needs another number or other roles, or a setting names another LoRA.
    """
    ruled = scheduled(slots)
    if len(ruled) < rule.least:
        wanted = "a LoRA" if rule.least == 1 else "two LoRAs or more"
        other = f" or take --rule {RULE_OF_ONE}" if len(ruled) == 1 else ""
        raise ConfigError(
            f"rule {rule.name} needs {wanted}, found {len(ruled)}; name another{other}."
        )
    if len(slots) > MAX_SLOTS:
        raise ConfigError(
            f"a fusion takes at most {MAX_SLOTS} LoRAs, found {len(slots)}; leave some out."
        )
    if rule.most is not None and len(ruled) > rule.most:
        more = ", ".join(name for name, each in RULES.items() if each.most is None)
        raise ConfigError(
            f"rule {rule.name} takes {rule.most} LoRAs, found {len(ruled)}; "
            f"take another rule: {more}."
        )
    if not rule.whole and {role_of(slot) for slot in ruled} != set(SCHEDULED):
        raise ConfigError(
            f"rule {rule.name} needs a content and a style, found {', '.join(ruled)}; "
            f"take another rule: {', '.join(name for name, each in RULES.items() if each.whole)}."
        )
    for slot in settings.weights:
        if slot_of(slot) not in slots:
            raise ConfigError(f"weights: expected {' or '.join(slots)}, found {slot!r}.")
    misfit = rule.misfit(ruled)
    if misfit is not None:
        raise ConfigError(misfit)


def check_loras(loras: Mapping[str, Told], rule: Rule) -> None:
    """Check that LoRAs are for one base model.

    Args:
        loras: source -> survey of its LoRA's header.
        rule: the rule; rules of whole LoRAs need no common layer, nor do LoRAs that always act.

    Raises:
        PairingError: a layer has two shapes, no denoiser layer is common, families differ, or both
            halves of a LoRA change one layer.
        ConfigError: the rule's settings are for another base model.
    """
    advice = _advice(loras)
    layers: dict[str, dict[str, LayerFacts]] = {slot: {} for slot in slots_of(loras)}
    for source, lora in loras.items():
        own = layers[slot_of(source)]
        twice = [facts.name for facts in lora.layers if facts.name in own]
        first = loras.get(f"{slot_of(source)}.{HIGH}")
        if twice and first is not None and first.path == lora.path:
            raise PairingError(
                f"{shown(lora.path)} is named for both denoisers, and {len(twice)} of its layers "
                "are in no second denoiser. Name it for one, without --both-denoisers.",
                map(shown, twice),
            )
        if twice:
            raise PairingError(
                f"both halves of {slot_of(source)} change {len(twice)} layers, so one of them is "
                "not for high noise or low noise alone. Name files of one denoiser each.",
                map(shown, twice),
            )
        own.update({facts.name: facts for facts in lora.layers})
    issues = list(_issues_of_shapes(layers))
    if issues:
        raise PairingError(f"{len(issues)} layers have two shapes. {advice}", issues)
    told = [may_be(lora) for lora in loras.values() if lora.families]
    refuse_other_base(rule, set.intersection(*told) if told else set())
    ruled = scheduled(layers)
    # A common layer says more than a family.
    compared = not rule.whole and len(ruled) == len(layers)
    if not compared and told and not set.intersection(*told):
        raise PairingError(f"the LoRAs are for different models. {advice}")
    common = set.intersection(*(set(layers[slot]) for slot in ruled))
    if not rule.whole and all(name.startswith("text_encoder") for name in common):
        components = {
            slot: sorted({layer.component for layer in own.values()})
            for slot, own in layers.items()
            if slot in ruled
        }
        raise PairingError(
            f"the LoRAs have no denoiser layer in common. {advice}",
            [f"{slot} adapts {', '.join(names)}" for slot, names in components.items()],
        )


def refuse_other_base(rule: Rule, families: Collection[str]) -> None:
    """Refuse settings that are made for other base models.

    Args:
        rule: the rule with its settings.
        families: the base models that the LoRAs may be for; none if that is unknown.

    Raises:
        ConfigError: the settings are for none of these.
    """
    misfit = rule.misfit_of_base(families)
    if misfit is not None:
        raise ConfigError(misfit)


def may_be(lora: Told) -> set[str]:
    """Return the families of a LoRA, and all others that have its layers."""
    denoiser = [layer for layer in lora.layers if layer.component not in TEXT_ENCODERS]
    return {*lora.families, *(possible_families(denoiser) if denoiser else ())}


def families_together(
    loras: Collection[Told], shapes: Mapping[tuple[str, str], tuple[int, ...]]
) -> tuple[str, ...]:
    """Return the families of all LoRAs together; a layer of one LoRA may exclude some of them.

    Args:
        loras: the LoRAs.
        shapes: component and module -> shape, of all their weights.
    """
    told = [set(each.families) for each in loras if each.families]
    common = set.intersection(*told) if told else set[str]()
    if not common:
        found = family_of(shapes)
        return () if found is None else (found,)
    facts = {layer.name: layer for each in loras for layer in each.layers}
    together = set(families_of_layers(facts.values(), ()))
    return tuple(sorted(common & together or common))


def _issues_of_shapes(layers: Mapping[str, Mapping[str, LayerFacts]]) -> Iterator[str]:
    for name in sorted({name for own in layers.values() for name in own}):
        shapes = {slot: own[name].shape for slot, own in layers.items() if name in own}
        if len(set(shapes.values())) > 1:
            found = (f"{list(shape or ())} in {slot.upper()}" for slot, shape in shapes.items())
            yield f"{shown(name)}: {', '.join(found)}"


def _advice(loras: Mapping[str, Told]) -> str:
    first, *others = (
        (f"{slot.upper()} {shown(lora.path)}", f"for {families_name(lora.families)}")
        for slot, lora in loras.items()
    )
    kinds = [" is ".join(first), *map(" ".join, others)]
    count = "two LoRAs" if len(loras) == 2 else "LoRAs"
    return f"{', '.join(kinds)}; take {count} of one base model."
