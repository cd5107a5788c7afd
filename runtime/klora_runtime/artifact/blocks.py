"""A fusion's layers by block, in the order data flows through the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from klora_runtime.artifact.palette import parts_of
from klora_runtime.artifact.schedule import ALWAYS, STEPLESS, Schedule, ScheduledEntry
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.families.catalogue import FAMILIES

#: Lists of blocks in the order data flows, for unknown models: those of all known families.
_ANY_BLOCKS = tuple(dict.fromkeys(name for each in FAMILIES.values() for name in each.blocks))
_INNER_LISTS = ("attentions", "resnets", "downsamplers", "upsamplers")


@dataclass(frozen=True)
class Block:
    """Layers of a model that belong together, in the order data flows."""

    name: str
    entries: tuple[ScheduledEntry, ...]

    def acting(self) -> Block:
        """Return the block without the layers that never act."""
        return Block(self.name, tuple(entry for entry in self.entries if entry.acts))

    def parts(self, progress: float) -> dict[str, float]:
        """Return slot -> its mean share in the layers that act then; empty if none acts."""
        rows = (entry.timeline.at(progress) for entry in self.entries if entry.acts)
        acting = [parts for row in rows if (parts := parts_of(row))]
        slots = {slot for parts in acting for slot in parts}
        return {slot: sum(parts.get(slot, 0.0) for parts in acting) / len(acting) for slot in slots}


def blocks(fusion: Schedule) -> list[Block]:
    """Return the denoiser's layers by block, in the order data flows, as maps draw them.

    A slot of role ``always`` is left out of a layer where another slot acts: it would only pale the
    choice.
    """
    beside = [name for name, slot in fusion.slots.items() if slot.role == ALWAYS]
    groups: dict[str, list[ScheduledEntry]] = {}
    family = FAMILIES.get(fusion.family or "")
    flow = _ANY_BLOCKS if family is None else tuple(family.blocks)
    for entry in sorted(_with_steps(fusion.entries), key=lambda entry: _flow_key(entry, flow)):
        name = f"{entry.component}.{_block_name(entry.module)}"
        groups.setdefault(name, []).append(_drawn(entry, beside))
    return [Block(name, tuple(entries)) for name, entries in groups.items()]


def _drawn(entry: ScheduledEntry, beside: Sequence[str]) -> ScheduledEntry:
    """Return an entry without the slots of ``beside``, unless they alone act."""
    timeline = entry.timeline
    chosen = {slot: v for slot, v in timeline.coefficients.items() if slot not in beside}
    if len(chosen) == len(timeline.coefficients) or not any(map(any, chosen.values())):
        return entry
    return replace(entry, timeline=Timeline(timeline.starts, chosen))


def _with_steps(entries: Iterable[ScheduledEntry]) -> list[ScheduledEntry]:
    return [entry for entry in entries if entry.component not in STEPLESS]


def _block_name(module: str) -> str:
    parts = module.split(".")
    for position, part in enumerate(parts):
        following = parts[position + 1 : position + 2]
        if part.isdigit() and following and following[0] not in _INNER_LISTS:
            return ".".join(parts[: position + 1])
    return parts[0]


def _flow_key(entry: ScheduledEntry, flow: Sequence[str]) -> tuple[object, ...]:
    """Sort blocks in the order of ``flow``, then the other layers by name."""
    path = f"{entry.module}."
    place = next((i for i, name in enumerate(flow) if path.startswith(f"{name}.")), len(flow))
    return entry.component, place, tuple(map(_natural, entry.module.split(".")))


def _natural(name: str) -> tuple[int, str]:
    """Sort numbers by value, whatever their number of digits, and after names."""
    digits = name.lstrip("0")
    return (len(digits), digits) if name.isdigit() else (-1, name)
