"""Compilation of LoRA files to a fusion: read, derive, measure, plan, assemble."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from klora_compile.measured import LayersOfSlots, MeasuredLoras, MeasuredSlot, layer_ks, shifted
from klora_compile.measuring.norms import Pair
from klora_compile.measuring.places import place_of
from klora_compile.measuring.statistics import OnLayer, Statistics
from klora_compile.planning.deriving import MADE, note_of
from klora_compile.planning.fates import fate_with
from klora_compile.planning.pairing import families_together
from klora_compile.planning.plan import Plan, make_plan
from klora_compile.profiles.store import CACHE_BYTES, Store
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer, layer_name
from klora_compile.reading.provenance import source_stated
from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.lookup import RULES, usual_rule
from klora_compile.rules.rule import Derived, Rule
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_compile.settings.shared import Settings
from klora_compile.slots import made, role_of, scheduled, slot_of, slots_of
from klora_compile.sources import Lora, by_source, read_sources
from klora_runtime import __version__
from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule as StatedRule
from klora_runtime.artifact.schedule import Slot
from klora_runtime.errors import ConfigError
from klora_runtime.lazy_torch import torch


def compile_fusion(
    content: Lora | Sequence[Lora],
    style: Lora | Sequence[Lora] = (),
    rule: Rule | None = None,
    settings: Settings | None = None,
    *,
    always: Mapping[str, Lora] | None = None,
    options: ReadOptions | None = None,
    device: str = "auto",
    cache: Path | None = None,
    on_layer: OnLayer | None = None,
    weight_names: Mapping[str, str] | None = None,
) -> Fusion:
    """Compile LoRAs of subjects and LoRAs of styles into a fusion.

    Args:
        content: the LoRA of a subject: a file, a folder, a name on the Hugging Face Hub (see
            :func:`~klora_compile.reading.adapter.read_adapter`) or an adapter, or two of them as
            :class:`~klora_compile.halves.Halves`; or several LoRAs, for rules that take more than
            two.
        style: the LoRA of a style, or several; none for one LoRA alone, or beside those that
            always act.
        rule: the fusion rule with its settings; by default K-LoRA as published, and for one LoRA
            alone the direct sum.
        settings: the settings that all rules share.
        always: name -> a LoRA that acts beside the others, in all its layers at every step, such
            as ``{"turbo": "lightning.safetensors"}``. No rule sees it. Its weight is 1, or what
            ``Settings(weights={"turbo": 0.8})`` says.
        options: how to read files; see :func:`~klora_compile.reading.adapter.read_adapter`.
        device: where to measure; see :func:`klora_runtime.devices.names.as_device`.
        cache: a folder that keeps statistics, so that a LoRA is measured only once; it is created
            if missing. By default nothing is kept.
        on_layer: called after each derived and each measured layer with its name, the number of
            these so far and the total over all LoRAs.
        weight_names: slot -> the file in a repository of the Hub that has several, such as
            ``{"content": "fox.safetensors"}``.

    Returns:
        The fusion, with its factors on the CPU in the dtypes of the files. It holds each delta
        that is not zero, also where the schedule never uses it, so :func:`reschedule` can make any
        other schedule from it. Write it with :func:`klora_runtime.save_fusion`.

    Raises:
        LoraError: a file cannot be read completely.
        PairingError: the LoRAs are for different models, or share no denoiser layer.
        ConfigError: the device is unknown, or the rule does not take these LoRAs; or a name on the
            Hub means no file, or several.
        KloraError: the Hub does not give a file.
    """
    loras, where = by_source(content, style, always), place_of(device)
    config = Config.of(default_rule(slots_of(loras)) if rule is None else rule, settings)
    adapters = read_sources(loras, config, options, weight_names=weight_names)
    store = None if cache is None else Store(cache, limit=CACHE_BYTES)
    return compile_sources(adapters, config, device=where, store=store, on_layer=on_layer)


def default_rule(slots: Iterable[str]) -> Rule:
    """Return the rule for these slots if none is named."""
    return RULES[usual_rule(len(scheduled(slots)))]()


def refuse_uncalibrated(rule: Rule, calibrated: bool) -> None:
    """Refuse a rule that needs a base model without one, and a base model for another rule.

    Raises:
        ConfigError: see above.
    """
    if calibrated and not isinstance(rule, Calibrated):
        names = [name for name, kind in RULES.items() if issubclass(kind, Calibrated)]
        raise ConfigError(
            f"rule {rule.name} needs no base model. Leave --calibrate out, or take --rule "
            f"{' or '.join(names)}."
        )
    if isinstance(rule, Calibrated) and not calibrated:
        raise ConfigError(rule.unmade)


def compile_sources(
    adapters: Mapping[str, Adapter],
    config: Config,
    *,
    device: str | torch.device,
    store: Store | None = None,
    on_layer: OnLayer | None = None,
    calibrated: Mapping[str, Mapping[str, Derived]] | None = None,
) -> Fusion:
    """Compile adapters; see :func:`compile_fusion`.

    Args:
        adapters: source -> LoRA; :func:`~klora_compile.sources.read_sources` has checked that they
            match each other and the config.
        config: the rule and the shared settings.
        device: where to measure, from :func:`place_of`.
        store: keeps statistics, so that a LoRA is measured only once; None to keep nothing.
        on_layer: see :func:`compile_fusion`.
        calibrated: slot -> layer name -> what a calibration computed.

    Raises:
        ConfigError: the rule needs a calibration.
        LoraError: the values of a layer cannot be measured.
        PairingError: only one LoRA adapts some layers, and the settings do not allow it.
    """
    loras = MeasuredLoras(adapters, device=device, store=store, calibrated=calibrated)
    return compile_measured(loras, config, on_layer=on_layer)


def compile_measured(
    loras: MeasuredLoras, config: Config, *, on_layer: OnLayer | None = None
) -> Fusion:
    """Compile LoRAs; what was computed of them before is not computed again.

    Args:
        loras: the LoRAs.
        config: the rule and the shared settings.
        on_layer: see :func:`compile_fusion`.

    Raises:
        ConfigError: see :func:`compile_sources`.
        LoraError: see :func:`compile_sources`.
        PairingError: see :func:`compile_sources`.
    """
    config = loras.settled(config)
    rule = config.rule
    if loras.calibrated is None:
        refuse_uncalibrated(rule, False)
    jobs = loras.lacking(config)
    total = len(jobs) + sum(map(len, loras.given.values()))
    slots = loras.slots(config, jobs, on_layer=shifted(on_layer, 0, total))
    layers = {slot: each.layers for slot, each in slots.items()}
    ruled = {slot: slots[slot] for slot in scheduled(slots)}
    more = {slot: slots[slot] for slot in made(slots)}
    beside = {slot: each for slot, each in slots.items() if slot not in (*ruled, *more)}
    own = {slot: layers[slot] for slot in ruled}
    ks = layer_ks(own, rule)
    sides = _sides(ruled, ks, rule, shifted(on_layer, len(jobs), total))
    products = _products(loras.products(own), sides) if rule.needs_products else {}
    numbers = _numbers(
        {slot: layers[slot] for slot in (*ruled, *beside)},
        *(sides, ks, products, _norms(more), _norms(beside)),
    )
    return _fusion(loras.adapters, layers, make_plan(numbers, config), config)


def _sides(
    slots: Mapping[str, MeasuredSlot],
    ks: Mapping[str, int],
    rule: Rule,
    on_layer: OnLayer | None,
) -> dict[str, dict[str, Side]]:
    """Return slot -> layer name -> its numbers; only norms if the rule needs no more."""
    total = sum(len(each.layers) for each in slots.values())
    sums = {name: (k,) for name, k in ks.items()}
    sides: dict[str, dict[str, Side]] = {}
    for slot, each in slots.items():
        on_own = shifted(on_layer, sum(map(len, sides.values())), total)
        own = each.layers
        if "l1" not in rule.needs:
            norms = each.norms(on_own)
            sides[slot] = {name: _side(own[name], norm, rule) for name, norm in norms.items()}
            continue
        sides[slot] = {
            name: _with_sums(_side(own[name], found.frobenius, rule), found, ks.get(name))
            for name, found in each.statistics(sums, on_own).items()
        }
    return sides


def _norms(slots: Mapping[str, MeasuredSlot]) -> dict[str, dict[str, Side]]:
    """Return slot -> layer name -> its numbers, for slots that no rule compares."""
    return {
        slot: {
            name: Side(
                layer.rank,
                layer.scaling,
                abs(layer.scaling) * each.norms()[name],
                error=layer.error if layer.form == MADE else None,
            )
            for name, layer in each.layers.items()
        }
        for slot, each in slots.items()
    }


def _products(
    products: Mapping[str, Mapping[Pair, float]], sides: Mapping[str, Mapping[str, Side]]
) -> dict[str, dict[Pair, float]]:
    """Return layer name -> two slots -> inner product of their scaled deltas."""
    return {
        name: {
            (one, other): sides[one][name].scaling * sides[other][name].scaling * product
            for (one, other), product in pairs.items()
        }
        for name, pairs in products.items()
    }


def _side(layer: Layer, norm: float, rule: Rule) -> Side:
    scaling = 1.0 if rule.ignores_alpha else layer.scaling
    return Side(rank=layer.rank, scaling=scaling, frobenius=abs(scaling) * norm)


def _with_sums(side: Side, statistics: Statistics, k: int | None) -> Side:
    scaling = abs(side.scaling)
    top_k = None if k is None else scaling * statistics.top_k[k]
    return replace(side, l1=scaling * statistics.l1, top_k=top_k)


def _numbers(
    layers: LayersOfSlots,
    sides: Mapping[str, Mapping[str, Side]],
    ks: Mapping[str, int],
    products: Mapping[str, Mapping[Pair, float]],
    made: Mapping[str, Mapping[str, Side]],
    beside: Mapping[str, Mapping[str, Side]],
) -> dict[str, LayerNumbers]:
    numbers = {}
    for layer in _in_order(layers):
        weight = None
        if layer.parameter == "bias":
            weight = layer_name(layer.component, layer.module, "weight")
        numbers[layer.name] = LayerNumbers(
            component=layer.component,
            k=ks.get(layer.name),
            sides={slot: own.get(layer.name) for slot, own in sides.items()},
            weight=weight,
            made={slot: own.get(layer.name) for slot, own in made.items()},
            beside={slot: own.get(layer.name) for slot, own in beside.items()},
            name=layer.name,
            products=products.get(layer.name),
        )
    return numbers


def _in_order(layers: LayersOfSlots) -> list[Layer]:
    """Return each layer once, in the order of an artifact."""
    every = {name: layer for own in layers.values() for name, layer in own.items()}
    return sorted(every.values(), key=lambda v: (v.component, v.module, v.parameter))


def _fusion(
    sources: Mapping[str, Adapter], layers: LayersOfSlots, plan: Plan, config: Config
) -> Fusion:
    every = _in_order(layers)
    rule = config.rule
    shapes = {(v.component, v.module): v.shape for v in every if v.parameter == "weight"}
    families = families_together([each.survey for each in sources.values()], shapes)
    return Fusion(
        sources={name: source_stated(adapter) for name, adapter in sources.items()},
        slots=_slots(sources, config),
        rule=StatedRule(rule.name, config.parameters(), plan.derived),
        family=families[0] if len(families) == 1 else None,
        entries=tuple(_entry(layer, layers, plan, rule) for layer in every),
        tool=f"klora {__version__}",
        families=families if len(families) > 1 else (),
        clock=config.settings.clock,
    )


def _slots(sources: Iterable[str], config: Config) -> dict[str, Slot]:
    """Return all slots, each with the sources that it comes from: its own, or its origins'."""
    given = slots_of(sources)
    derived = config.rule.derives(scheduled(given))
    origins: dict[str, tuple[str, ...]] = {**{slot: (slot,) for slot in given}, **derived}
    return {
        slot: Slot(
            role_of(slot),
            tuple(source for each in own for source in sources if slot_of(source) == each),
            note_of(slot, own, config),
        )
        for slot, own in origins.items()
    }


def _entry(layer: Layer, layers: LayersOfSlots, plan: Plan, rule: Rule) -> Entry:
    planned = plan.layers[layer.name]
    return Entry(
        component=layer.component,
        module=layer.module,
        parameter=layer.parameter,
        shape=layer.shape,
        fate=fate_with(planned.fate, planned.present),
        timeline=planned.timeline,
        factors={
            slot: Stored(planned.scales[slot], layers[slot][layer.name].delta)
            for slot in planned.present
        },
        scores={rule.name: planned.scores},
    )
