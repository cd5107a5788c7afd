"""What is fused and when each LoRA acts, as values; nothing in here decides anything.

A schedule needs no torch, and suffices for reports. One whose numbers are in memory is a `fusion`,
which the modes apply; one whose numbers lie in a file is a `document`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import shown

#: Components whose layers have no step: their coefficients are constant.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")

#: Files that ``repr`` names at most, and characters of a name.
_NAMES, _NAME = 4, 40

#: Fates of layers of which nothing is stored.
SILENT_FATES = ("zero", "dropped")


@dataclass(frozen=True)
class Slot:
    """One adapter as the fusion knows it, given or derived."""

    role: str
    """``content`` or ``style``."""
    sources: tuple[str, ...]
    """Names in :attr:`Fusion.sources` that it comes from."""
    derived: str | None = None
    """How it was computed from its sources; None where it is a source as given."""


@dataclass(frozen=True)
class Source:
    """One input file, for provenance only."""

    file: str
    """File name without folders."""
    sha256: str
    """Of the whole file, 64 hexadecimal digits."""
    bytes: int
    layout: str
    """Key layout it was written in, such as ``peft`` or ``kohya``."""
    ranks: tuple[int, ...]
    """The distinct ranks, ascending."""
    trigger_words: tuple[str, ...] = ()
    license: str | None = None
    """As the file states it."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values of the writer by key, such as keys that were left out; carried as they
    are."""


@dataclass(frozen=True)
class Reference:
    """One slot of one entry that lies in a source file: delta = scale * up[rows] @ down."""

    scale: float
    """As of :class:`~klora_runtime.artifact.delta.Stored`."""
    source: str
    """Name in :attr:`Fusion.sources` of the file."""
    down: str
    """The file's key of (rank, in) or (rank, in, *kernel)."""
    up: str
    """The file's key of (more rows or as many, rank), or (…, rank, 1, ...)."""
    rows: tuple[tuple[int, int], ...] | None = None
    """Rows of up from the first to before the second, in this order; None for all."""


class Held(Protocol):
    """What is stored of one slot of one entry, wherever it lies."""

    def sizes(self) -> Mapping[Hashable, int]:
        """Key of each tensor -> its bytes; tensors of one key are one."""


H = TypeVar("H", bound=Held, covariant=True)


@dataclass(frozen=True)
class EntryOf(Generic[H]):
    """One adapted parameter, a *layer*: its slots and when each of them acts."""

    component: str
    """Pipeline component, such as ``unet`` or ``text_encoder``."""
    module: str
    """Dotted diffusers module path inside the component (for CLIP without ``text_model.``)."""
    parameter: str
    """``weight`` or ``bias``."""
    shape: tuple[int, ...]
    """Of the parameter: (out, in), (out, in, *kernel), or (n,)."""
    fate: str
    """What became of the layer, in a few lower-case words for reports; it decides nothing."""
    timeline: Timeline
    factors: Mapping[str, H]
    """Slot name -> its delta; every slot that the timeline uses, and maybe others."""
    scores: Mapping[str, Any]
    """Rule name -> what the rule measured here, for every slot, stored or not; JSON values."""
    references: Mapping[str, Reference] = field(default_factory=dict)
    """Slot name -> where its factors lie; of a thin fusion, whose ``factors`` lack them."""

    @property
    def layer(self) -> str:
        """Name of the layer: its component, a dot, its module path; the parameter if no weight."""
        return self.path.removesuffix(".weight")

    @property
    def path(self) -> str:
        """Name of the parameter: component, module path, parameter."""
        return ".".join(filter(None, (self.component, self.module, self.parameter)))

    @cached_property
    def acting(self) -> Mapping[str, H]:
        """Slot name -> delta of the slots that act at some time; others may be stored."""
        return {slot: held for slot, held in self.factors.items() if self.timeline.uses(slot)}

    @cached_property
    def acts(self) -> bool:
        """Whether this entry ever changes the model; slots may be stored for other schedules."""
        return any(self.timeline.uses(slot) for slot in (*self.factors, *self.references))


@dataclass(frozen=True)
class Rule:
    """Which rule made the timelines, and with what."""

    name: str
    parameters: Mapping[str, Any]
    """Every setting, resolved; JSON values. Enough to compile the same fusion again."""
    derived: Mapping[str, Any]
    """What the rule computed for the whole model, such as ``gamma`` per component."""


@dataclass(frozen=True, repr=False)
class ScheduleOf(Generic[H]):
    """Two (or more) LoRAs and when each of them acts."""

    sources: Mapping[str, Source]
    """Role -> the LoRA that was compiled: its name, digest and what it states of itself."""
    slots: Mapping[str, Slot]
    """Name -> slot."""
    rule: Rule
    """Name and parameters of the rule that made the schedule."""
    family: str | None
    """Key of the base model's record in ``families``; None where the layers do not tell it."""
    entries: tuple[EntryOf[H], ...]
    """Sorted by component, module and parameter."""
    tool: str
    """Name and version of the compiler."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and shapes of the adapted layers: equal means the same model fits."""
        return fingerprint((e.component, e.module, e.parameter, e.shape) for e in self.entries)

    @property
    def components(self) -> tuple[str, ...]:
        """Components with a layer that acts, sorted."""
        return tuple(sorted({entry.component for entry in self.entries if entry.acts}))

    @property
    def is_thin(self) -> bool:
        """Whether factors are missing that lie in the sources."""
        return any(entry.references for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, where they lie."""
        sizes: dict[Hashable, int] = {}
        for entry in self.entries:
            for held in entry.factors.values():
                sizes.update(held.sizes())
        return sum(sizes.values())

    def __repr__(self) -> str:
        """Three lines: see :func:`summary`."""
        return "\n".join(summary(self))

    def _repr_html_(self) -> str:
        """For notebooks: the three lines, and the map of the schedule."""
        from klora_runtime.artifact.schedule_html import schedule_html

        return schedule_html(self, repr(self))


#: One adapted parameter, wherever its numbers lie.
ScheduledEntry: TypeAlias = EntryOf[Held]
#: What is fused and when each LoRA acts, wherever the numbers lie.
Schedule: TypeAlias = ScheduleOf[Held]


def summary(fusion: Schedule) -> tuple[str, str, str]:
    """What a fusion is, how large, and what acts: a line each."""
    files = [shown(source.file, _NAME) for source in fusion.sources.values()]
    if len(files) > _NAMES:
        files[_NAMES:] = [f"{len(files) - _NAMES} more"]
    fits = "" if fusion.family is None else f", for {shown(fusion.family, _NAME)}"
    fates = Counter(entry.fate for entry in fusion.entries if entry.acts)
    held = "factors in its sources" if fusion.is_thin else f"{fusion.nbytes / 1e6:.2f} MB"
    return (
        f"Fusion of {' and '.join(files) or 'no files'} by rule {shown(fusion.rule.name)}{fits}",
        f"{fates.total()} layers in {', '.join(map(shown, fusion.components))}; {held}",
        f"acting: {', '.join(f'{count} {shown(fate)}' for fate, count in fates.items())}",
    )


def fingerprint(layers: Iterable[tuple[str, str, str, tuple[int, ...]]]) -> str:
    """See :attr:`Fusion.fingerprint`.

    Args:
        layers: component, module, parameter and shape of each.
    """
    lines = sorted(f"{'.'.join(names)} {'x'.join(map(str, shape))}" for *names, shape in layers)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
