"""Compilation of LoRA files to a fusion: read, derive, measure, plan, assemble."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from klora_compile.measuring.norms import Pair, frobenius_norms, inner_products
from klora_compile.measuring.places import place_of
from klora_compile.measuring.statistics import OnLayer, Statistics
from klora_compile.planning.deriving import MADE, derivations, derive, note_of
from klora_compile.planning.fates import fate_with
from klora_compile.planning.pairing import families_together
from klora_compile.planning.picking import settled
from klora_compile.planning.plan import Plan, make_plan
from klora_compile.profiles.once import measure_once
from klora_compile.profiles.store import CACHE_BYTES, Store
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer, layer_name
from klora_compile.reading.provenance import source_stated
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.lookup import DEFAULT_RULE, RULE_OF_ONE, RULES
from klora_compile.rules.rule import Rule
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_compile.settings.shared import Settings
from klora_compile.slots import role_of, scheduled, slot_of, slots_of
from klora_compile.sources import Lora, by_source, read_sources
from klora_runtime import __version__
from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule as StatedRule
from klora_runtime.artifact.schedule import Slot
from klora_runtime.lazy_torch import torch

#: Slot -> layer name -> layer.
LayersOfSlots = Mapping[str, Mapping[str, Layer]]


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
    return RULES[RULE_OF_ONE if len(scheduled(slots)) == 1 else DEFAULT_RULE]()


def compile_sources(
    adapters: Mapping[str, Adapter],
    config: Config,
    *,
    device: str | torch.device,
    store: Store | None = None,
    on_layer: OnLayer | None = None,
) -> Fusion:
    """Compile adapters; see :func:`compile_fusion`.

    Args:
        adapters: source -> LoRA; :func:`~klora_compile.sources.read_sources` has checked that they
            match each other and the config.
        config: the rule and the shared settings.
        device: where to measure, from :func:`place_of`.
        store: keeps statistics, so that a LoRA is measured only once; None to keep nothing.
        on_layer: see :func:`compile_fusion`.

    Raises:
        LoraError: the values of a layer cannot be measured.
        PairingError: only one LoRA adapts some layers, and the settings do not allow it.
    """
    own = _by_slot(adapters)
    ruled = scheduled(own)
    beside = {slot: each for slot, each in own.items() if slot not in ruled}
    given = {slot: own[slot] for slot in ruled}
    config = settled(config, given)
    rule = config.rule
    jobs = derivations(given, config)
    total = len(jobs) + sum(map(len, given.values()))
    derived = derive(given, jobs, rule, on_layer=_shifted(on_layer, 0, total))
    layers = {slot: derived[slot] for slot in ruled}
    more = {slot: each for slot, each in derived.items() if slot not in ruled}
    ks = layer_ks(layers, rule)
    sides = _sides(layers, ks, rule, device, store, _shifted(on_layer, len(jobs), total))
    products = _products(layers, sides) if rule.needs_products else {}
    numbers = _numbers({**layers, **beside}, sides, ks, products, _norms(more), _norms(beside))
    return _fusion(adapters, {**layers, **more, **beside}, make_plan(numbers, config), config)


def _measured(
    layers: Collection[Layer],
    sums: Mapping[str, Sequence[int]],
    device: str | torch.device,
    on_layer: OnLayer | None,
) -> dict[str, Statistics]:
    """Measure layers without a cache."""
    from klora_compile.measuring.measure import measure  # it imports torch

    return measure(layers, sums, device=torch.device(device), on_layer=on_layer)


def _by_slot(adapters: Mapping[str, Adapter]) -> dict[str, Mapping[str, Layer]]:
    """Return slot -> layer name -> layer; the layers of a LoRA in two files are together."""
    found: dict[str, Mapping[str, Layer]] = {}
    for source, adapter in adapters.items():
        slot = slot_of(source)
        found[slot] = {**found.get(slot, {}), **adapter.layers}
    return found


def layer_ks(layers: LayersOfSlots, rule: Rule) -> dict[str, int]:
    """Return K of each layer that two or more LoRAs adapt, if the rule uses Top-K sums (eq. 5)."""
    ks = {}
    for name in sorted({name for own in layers.values() for name in own}):
        found = [own[name] for own in layers.values() if name in own]
        k = rule.count([layer.rank for layer in found], found[0].numel)
        if len(found) > 1 and k is not None:
            ks[name] = k
    return ks


def _sides(
    layers: LayersOfSlots,
    ks: Mapping[str, int],
    rule: Rule,
    device: str | torch.device,
    store: Store | None,
    on_layer: OnLayer | None,
) -> dict[str, dict[str, Side]]:
    """Return slot -> layer name -> its numbers; only norms if the rule needs no more."""
    total = sum(map(len, layers.values()))
    sides: dict[str, dict[str, Side]] = {}
    for slot, own in layers.items():
        values, sums = own.values(), {name: (k,) for name, k in ks.items()}
        shifted = _shifted(on_layer, sum(map(len, sides.values())), total)
        if "l1" not in rule.needs:
            norms = frobenius_norms(values, on_layer=shifted)
            sides[slot] = {name: _side(own[name], norm, rule) for name, norm in norms.items()}
            continue
        if store is None:
            found = _measured(values, sums, device, shifted)
        else:
            found = measure_once(values, sums, device=device, store=store, on_layer=shifted)
        sides[slot] = {
            name: _with_sums(_side(own[name], each.frobenius, rule), each, ks.get(name))
            for name, each in found.items()
        }
    return sides


def _norms(layers: LayersOfSlots) -> dict[str, dict[str, Side]]:
    """Return slot -> layer name -> its numbers, for slots that no rule compares."""
    return {
        slot: {
            name: Side(
                own[name].rank,
                own[name].scaling,
                abs(own[name].scaling) * norm,
                error=own[name].error if own[name].form == MADE else None,
            )
            for name, norm in frobenius_norms(own.values()).items()
        }
        for slot, own in layers.items()
    }


def _products(
    layers: LayersOfSlots, sides: Mapping[str, Mapping[str, Side]]
) -> dict[str, dict[Pair, float]]:
    """Return layer name -> two slots -> inner product of their scaled deltas."""
    return {
        name: {
            (one, other): sides[one][name].scaling * sides[other][name].scaling * product
            for (one, other), product in pairs.items()
        }
        for name, pairs in inner_products(layers).items()
    }


def _shifted(on_layer: OnLayer | None, done: int, total: int) -> OnLayer | None:
    """Return a callback for one LoRA that reports to ``on_layer`` of all LoRAs."""
    if on_layer is None:
        return None
    return lambda name, index, _: on_layer(name, done + index, total)


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
