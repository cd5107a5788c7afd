"""Two LoRA files in, one fusion out: read, measure, plan, put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from klora_compile.config import Config
from klora_compile.measure import OnLayer, Statistics, measure, resolve_device
from klora_compile.plan import CONTENT, STYLE, LayerNumbers, Plan, Side, make_plan
from klora_compile.reading.adapter import Adapter, read_adapter
from klora_compile.reading.deltas import Delta, LowRank
from klora_compile.reading.layers import Layer, layer_name
from klora_compile.reading.options import ReadOptions
from klora_compile.reading.provenance import provenance
from klora_compile.statistics_cache import measure_once
from klora_runtime import __version__
from klora_runtime.errors import PairingError, shown
from klora_runtime.families import family_name, family_of
from klora_runtime.fusion import Dense, Entry, Factors, Fusion, Rule, Slot, Source

RULE = "klora"


def compile_fusion(
    content: str | os.PathLike[str] | Adapter,
    style: str | os.PathLike[str] | Adapter,
    config: Config | None = None,
    *,
    options: ReadOptions | None = None,
    device: str = "auto",
    cache: Path | None = None,
    on_layer: OnLayer | None = None,
) -> Fusion:
    """Compile a content LoRA and a style LoRA into a fusion.

    Args:
        content: the LoRA of a subject: a file or folder, or an adapter that was read already.
        style: the LoRA of a style.
        config: the settings; the paper's by default.
        options: how to read files; see :func:`~klora_compile.reading.adapter.read_adapter`.
        device: where to measure: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        cache: a file that keeps statistics, so that a LoRA is measured once;
            :func:`klora_compile.statistics_cache.cache_file` names the user's.
        on_layer: called after each layer that was measured with its name, how many are done
            and how many there are over both LoRAs.

    Returns:
        The fusion, its factors on the CPU in the dtypes of the files. Write it with
        :func:`klora_runtime.save_fusion`.

    Raises:
        LoraError: a file cannot be read completely.
        PairingError: the LoRAs are for different models, or share no denoiser layer.
        ConfigError: an unknown device.
    """
    config = config or Config()
    where = resolve_device(device)
    adapters = {
        slot: lora if isinstance(lora, Adapter) else read_adapter(lora, options)
        for slot, lora in ((CONTENT, content), (STYLE, style))
    }
    check_pair(adapters[CONTENT], adapters[STYLE])
    ks = layer_ks(adapters[CONTENT], adapters[STYLE], config.top_k)
    total = sum(len(adapter.layers) for adapter in adapters.values())
    statistics: dict[str, dict[str, Statistics]] = {}
    for slot, adapter in adapters.items():
        done = sum(map(len, statistics.values()))
        layers, sums = list(adapter.layers.values()), {name: (k,) for name, k in ks.items()}
        shifted = _shifted(on_layer, done, total)
        if cache is None:
            statistics[slot] = measure(layers, sums, device=where, on_layer=shifted)
        else:
            statistics[slot] = measure_once(
                layers, sums, device=where, file=cache, on_layer=shifted
            )
    ignore_alpha = config.parameters()["network_alpha"] == "ignored"
    numbers = _numbers(adapters, statistics, ks, ignore_alpha)
    return _fusion(adapters, make_plan(numbers, config), numbers, config)


def check_pair(content: Adapter, style: Adapter) -> None:
    """See that two adapters are of one base model.

    Raises:
        PairingError: a common layer has two shapes, or no denoiser layer is common.
    """
    common = sorted(set(content.layers) & set(style.layers))
    issues = [
        f"{shown(name)}: {list(content.layers[name].shape)} in CONTENT, "
        f"{list(style.layers[name].shape)} in STYLE"
        for name in common
        if content.layers[name].shape != style.layers[name].shape
    ]
    families = [family_name(adapter.family) for adapter in (content, style)]
    advice = (
        f"CONTENT {shown(content.path)} is for {families[0]}, STYLE {shown(style.path)} for "
        f"{families[1]}; take two LoRAs of one base model"
    )
    if issues:
        raise PairingError(f"{len(issues)} layers have two shapes. {advice}.", issues)
    components = {
        slot: {layer.component for layer in adapter.layers.values()}
        for slot, adapter in ((CONTENT, content), (STYLE, style))
    }
    if not any(not name.startswith("text_encoder") for name in common):
        raise PairingError(
            f"the LoRAs have no denoiser layer in common. {advice}.",
            [f"{slot} adapts {', '.join(sorted(names))}" for slot, names in components.items()],
        )


def layer_ks(content: Adapter, style: Adapter, top_k: int | None) -> dict[str, int]:
    """K of every layer that both adapt: the product of its ranks, at most its size (eq. 5)."""
    ks = {}
    for name in sorted(set(content.layers) & set(style.layers)):
        one, other = content.layers[name], style.layers[name]
        ks[name] = min(one.rank * other.rank if top_k is None else top_k, one.numel)
    return ks


def _shifted(on_layer: OnLayer | None, done: int, total: int) -> OnLayer | None:
    if on_layer is None:
        return None
    report: Callable[[str, int, int], None] = on_layer
    return lambda name, index, _: report(name, done + index, total)


def _numbers(
    adapters: Mapping[str, Adapter],
    statistics: Mapping[str, Mapping[str, Statistics]],
    ks: Mapping[str, int],
    ignore_alpha: bool,
) -> dict[str, LayerNumbers]:
    names = sorted(
        {**adapters[CONTENT].layers, **adapters[STYLE].layers}.values(),
        key=lambda layer: (layer.component, layer.module, layer.parameter),
    )
    numbers = {}
    for layer in names:
        k = ks.get(layer.name)
        sides: dict[str, Side | None] = {}
        for slot, adapter in adapters.items():
            own = adapter.layers.get(layer.name)
            measured = statistics[slot].get(layer.name)
            sides[slot] = None
            if own is not None and measured is not None:
                sides[slot] = _side(own, measured, k, ignore_alpha)
        weight = None
        if layer.parameter == "bias":
            weight = layer_name(layer.component, layer.module, "weight")
        numbers[layer.name] = LayerNumbers(layer.component, k, sides[CONTENT], sides[STYLE], weight)
    return numbers


def _side(layer: Layer, statistics: Statistics, k: int | None, ignore_alpha: bool) -> Side:
    scaling = 1.0 if ignore_alpha else layer.scaling
    return Side(
        rank=layer.rank,
        scaling=scaling,
        l1=abs(scaling) * statistics.l1,
        top_k=None if k is None else abs(scaling) * statistics.top_k[k],
    )


def _fusion(
    adapters: Mapping[str, Adapter],
    plan: Plan,
    numbers: Mapping[str, LayerNumbers],
    config: Config,
) -> Fusion:
    shapes = {**adapters[CONTENT].layers, **adapters[STYLE].layers}
    entries = []
    for name, layer_plan in plan.layers.items():
        factors: dict[str, Factors | Dense] = {}
        for slot, side in numbers[name].sides.items():
            if side is not None and layer_plan.timeline.uses(slot):
                layer = adapters[slot].layers[name]
                factors[slot] = _factors(layer.delta, side.scaling)
        entries.append(
            Entry(
                component=shapes[name].component,
                module=shapes[name].module,
                parameter=shapes[name].parameter,
                shape=shapes[name].shape,
                fate=layer_plan.fate,
                timeline=layer_plan.timeline,
                factors=factors,
                scores={RULE: layer_plan.scores},
            )
        )
    return Fusion(
        sources={slot: _source(adapter) for slot, adapter in adapters.items()},
        slots={slot: Slot(name=slot, role=slot, sources=(slot,)) for slot in adapters},
        rule=Rule(RULE, config.parameters(), {"gamma": dict(plan.gamma)}),
        family=_family(adapters, shapes),
        entries=tuple(entries),
        tool=f"klora {__version__}",
    )


def _factors(delta: Delta, scale: float) -> Factors | Dense:
    if isinstance(delta, LowRank):
        return Factors(scale, delta.down, delta.up)
    return Dense(scale, delta.values)


def _source(adapter: Adapter) -> Source:
    return Source(
        file=adapter.path.name.replace("\\", "_"),  # a path on some systems
        sha256=adapter.sha256,
        bytes=adapter.nbytes,
        layout=adapter.layout,
        ranks=adapter.ranks,
        trigger_words=adapter.trigger_words,
        license=adapter.license,
        notes=provenance(adapter),
    )


def _family(adapters: Mapping[str, Adapter], layers: Mapping[str, Layer]) -> str | None:
    """Of both LoRAs together; the layers that only one has may tell the other's."""
    weights = (layer for layer in layers.values() if layer.parameter == "weight")
    found = family_of({(v.component, v.module): v.shape for v in weights})
    stated = {adapter.family for adapter in adapters.values()} - {None}
    return stated.pop() if found is None and len(stated) == 1 else found
