"""LoRAs beside a fusion: fusions of one LoRA become slots of role ``always`` of another fusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from klora_runtime.artifact.checks import MAX_SLOTS, refuse_always_name
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import ALWAYS, Slot, Source
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import ConfigError, IncompatibleModelError, shown


def beside(fusion: Fusion, always: Mapping[str, Fusion]) -> Fusion:
    """Return a fusion with further LoRAs that act in all their layers at every step.

    Args:
        fusion: the fusion, whose schedule stays.
        always: name of the new slot -> a fusion of one LoRA at constant weight, as compiling one
            LoRA gives.

    Raises:
        ConfigError: a name is taken or not valid, or a fusion has several LoRAs, switches, or is
            thin.
        IncompatibleModelError: the fusions are for different base models.
    """
    for name, other in always.items():
        _check(fusion, name, other)
        fusion = _with(fusion, name, other)
    return fusion


def _check(fusion: Fusion, name: str, other: Fusion) -> None:
    refuse_always_name(name)
    if name in fusion.slots:
        raise ConfigError(
            f"always: the fusion has a slot {name} already; take another name, or set its weight."
        )
    if len(fusion.slots) == MAX_SLOTS:
        raise ConfigError(f"always: a fusion has at most {MAX_SLOTS} slots; leave {name} out.")
    if other.is_thin:
        raise ConfigError(
            f"always: {name} is thin, so its factors are in the files of its LoRA. Compile it "
            "without --thin, or load it with load_fusion(FILE, sources=...)."
        )
    if len(other.slots) != 1:
        raise ConfigError(
            f"always: {name} is a fusion of {' and '.join(map(shown, other.slots))}, expected one "
            "LoRA. Compile the LoRA alone: klora compile LORA -o OUT.klora.safetensors."
        )
    if any(entry.timeline.switches for entry in other.entries):
        raise ConfigError(
            f"always: the weight of {name} changes over the steps. Compile the LoRA alone: "
            "klora compile LORA -o OUT.klora.safetensors."
        )
    known, others = set(fusion.candidates), set(other.candidates)
    if known and others and not known & others:
        raise IncompatibleModelError(
            f"always: {name} is for {' or '.join(map(shown, sorted(others)))}, and the fusion for "
            f"{' or '.join(map(shown, sorted(known)))}. Take a LoRA of the same base model."
        )


def _with(fusion: Fusion, name: str, other: Fusion) -> Fusion:
    (slot,) = other.slots
    sources = dict(_renamed(name, other))
    entries = {entry.path: entry for entry in fusion.entries}
    for entry in other.entries:
        own = entries.get(entry.path)
        if own is not None and own.shape != entry.shape:
            raise IncompatibleModelError(
                f"always: {name} changes {shown(entry.path)} of shape {list(entry.shape)}, and the "
                f"fusion one of {list(own.shape)}. Take a LoRA of the same base model."
            )
        entries[entry.path] = _joined(own, entry, name, slot)
    slots = {**fusion.slots, name: Slot(ALWAYS, tuple(sources), other.slots[slot].derived)}
    complete = (_with_every(entry, slots) for entry in entries.values())
    return replace(
        fusion,
        sources={**fusion.sources, **sources},
        slots=slots,
        entries=tuple(sorted(complete, key=lambda e: (e.component, e.module, e.parameter))),
    )


def _renamed(name: str, other: Fusion) -> Iterator[tuple[str, Source]]:
    """Yield the sources of a fusion under the name of its new slot."""
    (slot,) = other.slots
    for source in other.slots[slot].sources:
        own = source == slot or source.startswith(f"{slot}.")
        renamed = f"{name}{source.removeprefix(slot)}" if own else f"{name}.{source}"
        yield renamed, other.sources[source]


def _joined(own: Entry | None, entry: Entry, name: str, slot: str) -> Entry:
    """Return a layer of the fusion, or none, together with the one of the further LoRA."""
    (coefficient,) = entry.timeline.coefficients[slot]
    factors = {name: entry.factors[slot]} if slot in entry.factors else {}
    if own is None:
        timeline = Timeline.constant({name: coefficient})
        return replace(entry, fate=ALWAYS, timeline=timeline, factors=factors, scores={})
    starts = own.timeline.starts
    coefficients = {**own.timeline.coefficients, name: (coefficient,) * len(starts)}
    joined = replace(
        own, timeline=Timeline(starts, coefficients), factors={**own.factors, **factors}
    )
    return replace(joined, fate=ALWAYS) if joined.acts and not own.acts else joined


def _with_every(entry: Entry, slots: Mapping[str, Slot]) -> Entry:
    """Return an entry whose timeline has a coefficient of every slot."""
    starts, known = entry.timeline.starts, entry.timeline.coefficients
    if len(known) == len(slots):
        return entry
    silent = (0.0,) * len(starts)
    return replace(
        entry, timeline=Timeline(starts, {slot: known.get(slot, silent) for slot in slots})
    )
