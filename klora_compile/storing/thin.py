"""Thin fusions: the schedule, and references to the factors in the source files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_compile.sources import Lora, other_sources, read_again
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.artifact.schedule import Reference
from klora_runtime.errors import ConfigError, FileFormatError, shown


def thin(fusion: Fusion, sources: Mapping[str, Lora]) -> Fusion:
    """Replace the factors of a fusion by references to the source files.

    Args:
        fusion: a compiled fusion that is not compressed.
        sources: slot (``content``, ``style``; ``content.1`` and so on for several) -> the LoRA
            that it was compiled from.

    Raises:
        ConfigError: a LoRA is not the one that the fusion was compiled from; or a slot is not a
            pair of tensors of its file, because its factors are computed, dense or compressed, or
            the file is not safetensors. ``issues`` names every layer and the reason.
        LoraError: a file cannot be read completely.
    """
    adapters = read_again(fusion, sources)
    others = list(other_sources(fusion, adapters))
    if others:
        raise ConfigError("these are not the LoRAs that the fusion was compiled from:", others)
    foreign = {
        name for name, adapter in adapters.items() if not _is_safetensors(adapter.survey.path)
    }
    entries, issues = [], []
    for entry in fusion.entries:
        references = {}
        for slot in entry.factors:
            found = _reference(fusion, entry, slot, adapters, foreign)
            if isinstance(found, Reference):
                references[slot] = found
            else:
                issues.append(f"{shown(entry.layer)}, {slot}: {found}")
        entries.append(replace(entry, factors={}, references=references))
    if issues:
        raise ConfigError(
            f"{len(issues)} slots cannot stay in their files, as a thin artifact needs. Only "
            "plain low-rank pairs in safetensors files can. Compile without --thin.",
            issues,
        )
    return replace(fusion, entries=tuple(entries))


def _reference(
    fusion: Fusion, entry: Entry, name: str, adapters: Mapping[str, Adapter], foreign: set[str]
) -> Reference | str:
    """Return the place of a slot's factors, or why they are in no file."""
    slot, stored = fusion.slots[name], entry.factors[name]
    if slot.derived is not None:
        return f"it is computed ({shown(slot.derived)})"
    source = next(each for each in slot.sources if entry.layer in adapters[each].layers)
    if source in foreign:
        return f"{shown(adapters[source].survey.path)} is not a safetensors file"
    if stored.quantised is not None:
        return "it is compressed"
    layer: Layer = adapters[source].layers[entry.layer]
    if layer.pair is None:
        return f"its form is {layer.form}, and its factors are computed"
    rows = layer.pair.rows
    ranges = None if rows is None else tuple((each.start, each.stop) for each in rows)
    return Reference(stored.scale, source, layer.pair.down, layer.pair.up, ranges)


def _is_safetensors(path: Path) -> bool:
    try:
        with SafetensorsFile(path, "LoRA file"):
            return True
    except FileFormatError:
        return False
