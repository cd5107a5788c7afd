"""The LoRAs of a fusion by slot: read together for compiling, or again for comparison."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from klora_compile.halves import Halves, refuse_separated
from klora_compile.planning.pairing import check_loras, check_slots
from klora_compile.reading.adapter import Adapter, OnModule, open_adapter
from klora_compile.reading.layers import Layer
from klora_compile.reading.survey import base_of
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_compile.slots import (
    HIGH,
    LOW,
    SECOND_DENOISER,
    in_order,
    slot_names,
    slot_of,
    slots_of,
)
from klora_runtime.artifact.checks import refuse_always_name
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, shown
from klora_runtime.hub.choosing import LORA
from klora_runtime.hub.fetching import located

#: A LoRA in one file as a user gives it: a file, a folder, or an adapter.
One = str | os.PathLike[str] | Adapter
#: A LoRA as a user gives it, in one file or two.
Lora = One | Halves[Any]


def by_source(
    content: Lora | Sequence[Lora],
    style: Lora | Sequence[Lora] = (),
    always: Mapping[str, Lora] | None = None,
) -> dict[str, One]:
    """Return source -> LoRA: contents first, each role in the given order.

    Args:
        content: LoRAs of subjects.
        style: LoRAs of styles.
        always: slot -> LoRA, for those that always act.

    Raises:
        ConfigError: one of these has no name for it, such as that of a content or a style.
    """
    contents, styles = (
        [given] if isinstance(given, str | os.PathLike | Adapter | Halves) else list(given)
        for given in (content, style)
    )
    if always is not None and not isinstance(always, Mapping):
        raise ConfigError(f"always={always!r}: expected names with a LoRA each.")
    for name in always or {}:
        refuse_always_name(name)
    slots = slot_names(len(contents), len(styles))
    named = {**dict(zip(slots, [*contents, *styles], strict=True)), **(always or {})}
    return dict(part for slot, lora in named.items() for part in sources_of(slot, lora))


def sources_of(slot: str, lora: Lora) -> Iterator[tuple[str, One]]:
    """Yield the sources of a slot, by name."""
    if isinstance(lora, Halves):
        yield f"{slot}.{HIGH}", lora.high
        yield f"{slot}.{LOW}", lora.low
    else:
        yield slot, lora


def read_sources(
    loras: Mapping[str, One],
    config: Config,
    options: ReadOptions | None = None,
    *,
    on_module: OnModule | None = None,
    weight_names: Mapping[str, str] | None = None,
) -> dict[str, Adapter]:
    """Read LoRAs after checking that each is readable and that they match each other.

    All headers are checked before any values are read.

    Args:
        loras: source -> LoRA, see :func:`by_source`.
        config: the rule and the shared settings.
        options: how to read files.
        on_module: called after each module.
        weight_names: slot or source -> the file in a repository of the Hub that has several.

    Returns:
        Source -> adapter.

    Raises:
        ConfigError: see :func:`~klora_compile.planning.pairing.check_slots`; or a denoiser is named
            and every LoRA is in two files; or two LoRAs look like the two files of one; or a name
            on the Hub means no file, or several.
        KloraError: the Hub does not give a file.
        LoraError: a file cannot be read completely.
        PairingError: see :func:`~klora_compile.planning.pairing.check_loras`.
    """
    check_slots(slots_of(loras), config.rule, config.settings)
    _refuse_idle_denoiser(loras, options)
    loras = located_loras(loras, weight_names)
    refuse_separated(
        Path(lora)
        for source, lora in loras.items()
        if source == slot_of(source) and not isinstance(lora, Adapter)
    )
    with ExitStack() as stack:
        base = stack.enter_context(base_of(options or ReadOptions()))
        opened = {
            source: lora
            if isinstance(lora, Adapter)
            else stack.enter_context(open_adapter(lora, _options_of(source, options), base))
            for source, lora in loras.items()
        }
        check_loras({source: each.survey for source, each in opened.items()}, config.rule)
        return {
            source: each if isinstance(each, Adapter) else each.read(on_module)
            for source, each in opened.items()
        }


def located_loras(
    loras: Mapping[str, One], weight_names: Mapping[str, str] | None = None
) -> dict[str, One]:
    """Return source -> LoRA, with the path of each that is named on the Hub; see `read_sources`."""
    names = {} if weight_names is None else weight_names
    known = dict.fromkeys([*slots_of(loras), *loras])
    strange = [name for name in names if name not in known]
    if strange:
        raise ConfigError(
            f"weight_names: there is no LoRA {shown(strange[0])}; expected {', '.join(known)}."
        )
    return {
        source: lora
        if isinstance(lora, Adapter)
        else located(lora, LORA, names.get(source, names.get(slot_of(source))))
        for source, lora in loras.items()
    }


def _refuse_idle_denoiser(loras: Iterable[str], options: ReadOptions | None) -> None:
    """Refuse a denoiser for LoRAs in one file if there is none."""
    if options is None or options.denoiser is None:
        return
    if all(source != slot_of(source) for source in loras):
        raise ConfigError(
            "denoiser: every LoRA is for both denoisers, half by half; leave --denoiser out."
        )


def _options_of(source: str, options: ReadOptions | None) -> ReadOptions | None:
    """Return the options of a source: the low half changes the second denoiser."""
    if source == slot_of(source):
        return options
    options = options or ReadOptions()
    low = source.endswith(f".{LOW}")
    return replace(options, denoiser=SECOND_DENOISER if low else None)


def read_again(
    fusion: Fusion, loras: Mapping[str, Lora], base: str | os.PathLike[str] | None = None
) -> dict[str, Adapter]:
    """Read the LoRAs of a fusion with the options that it was compiled with.

    Args:
        fusion: a fusion, whose sources state the options.
        loras: slot -> LoRA, or source -> LoRA for one of two files.
        base: the base model, for LoRAs that need its weights.

    Returns:
        Source -> adapter, in the order of the compilation.

    Raises:
        ConfigError: the fusion states reading options that are out of range.
        LoraError: a file cannot be read completely.
    """
    adapters = {}
    given = dict(part for slot, lora in loras.items() for part in sources_of(slot, lora))
    with base_of(ReadOptions(base=base)) as shared:
        for name in in_order(given):
            lora, source = given[name], fusion.sources.get(name)
            if not isinstance(lora, Adapter):
                notes = {} if source is None else source.notes
                with open_adapter(lora, ReadOptions.from_notes(notes, base), shared) as opened:
                    lora = opened.read()
            adapters[name] = lora
    return adapters


def layers_by_slot(adapters: Mapping[str, Adapter]) -> dict[str, Mapping[str, Layer]]:
    """Return slot -> layer name -> layer; the layers of a LoRA in two files are together."""
    found: dict[str, Mapping[str, Layer]] = {}
    for source, adapter in adapters.items():
        slot = slot_of(source)
        found[slot] = {**found.get(slot, {}), **adapter.layers}
    return found


def other_sources(fusion: Fusion, adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """Yield one sentence for each LoRA that differs from the fusion's source."""
    for name in sorted(fusion.sources.keys() - adapters.keys()):
        yield f"sources.{name}: no LoRA was given for it"
    for name, adapter in adapters.items():
        source = fusion.sources.get(name)
        if source is None:
            yield f"sources: the artifact has no source {name}"
        elif source.sha256 != adapter.sha256:
            yield (
                f"sources.{name}: it was compiled from {shown(source.file)} with sha256 "
                f"{source.sha256}, {shown(adapter.survey.path)} has {adapter.sha256}"
            )
