"""Schedules: which LoRAs are fused and when each of them acts. Nothing here decides anything.

A schedule needs no torch and suffices for reports. With its numbers in memory it is a `fusion`,
which the modes apply; with its numbers in a file it is a `document`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from klora_runtime.artifact.timeline import ClockName, Timeline
from klora_runtime.errors import shown

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")

#: Components that run once, before the first step, so that their coefficients are constant: text
#: encoders, and what some models pass the encoded prompt through.
STEPLESS = (*TEXT_ENCODERS, "connectors", "text_conditioner")

#: Roles of slots. A rule schedules contents, styles and what it merged them to; what is ``always``
#: acts beside them.
CONTENT, STYLE, MERGED, ALWAYS = "content", "style", "merged", "always"
ROLES = (CONTENT, STYLE, MERGED, ALWAYS)

#: Limits of ``repr``: names of files, and characters of a name.
_NAMES, _NAME = 4, 40

#: Fates of layers without a stored delta.
SILENT_FATES = ("zero", "dropped")


@dataclass(frozen=True)
class Slot:
    """One adapter of a fusion, given or derived."""

    role: str
    """``content`` or ``style``: the rule schedules it. ``merged``: a rule computed it from several
        of these, to act instead of them. ``always``: it acts at constant weight at every step,
        beside what the rule chooses, and no rule sees it."""
    sources: tuple[str, ...]
    """Its origins, as names in :attr:`Fusion.sources`."""
    derived: str | None = None
    """How it was computed from its sources; None if it is a source as given."""


@dataclass(frozen=True)
class Source:
    """One input file, for provenance only."""

    file: str
    """File name without folders."""
    sha256: str
    """Digest of the whole file, 64 hexadecimal digits."""
    bytes: int
    layout: str
    """Key layout of the file, such as ``peft`` or ``kohya``."""
    ranks: tuple[int, ...]
    """The distinct ranks, ascending."""
    trigger_words: tuple[str, ...] = ()
    license: str | None = None
    """Licence as the file states it."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values of the writer by key, such as keys that were left out."""


@dataclass(frozen=True)
class Reference:
    """The factors of one slot of one entry in a source file: delta = scale * up[rows] @ down."""

    scale: float
    """See :class:`~klora_runtime.artifact.delta.Stored`."""
    source: str
    """The file's name in :attr:`Fusion.sources`."""
    down: str
    """Key in the file of down, (rank, in) or (rank, in, *kernel)."""
    up: str
    """Key in the file of up, (n, rank) or (n, rank, 1, ...) with n >= the rows of the delta."""
    rows: tuple[tuple[int, int], ...] | None = None
    """Ranges (first, end) of rows of up, end excluded, in this order; None for all rows."""


class Held(Protocol):
    """The stored delta of one slot of one entry, in memory or in a file."""

    def sizes(self) -> Mapping[Hashable, int]:
        """Return key of each tensor -> its bytes; equal keys mean the same tensor."""


H = TypeVar("H", bound=Held, covariant=True)


@dataclass(frozen=True)
class EntryOf(Generic[H]):
    """One adapted parameter, a *layer*: its slots and when each of them acts."""

    component: str
    """Pipeline component, such as ``unet`` or ``text_encoder``."""
    module: str
    """Dotted diffusers module path inside the component (CLIP's without ``text_model.``)."""
    parameter: str
    """``weight`` or ``bias``."""
    shape: tuple[int, ...]
    """Shape of the parameter: (out, in), (out, in, *kernel), or (n,)."""
    fate: str
    """The outcome for the layer, in a few lower-case words; used by reports only."""
    timeline: Timeline
    factors: Mapping[str, H]
    """Slot name -> its delta, for every slot that the timeline uses and possibly others."""
    scores: Mapping[str, Any]
    """Rule name -> the rule's numbers for this layer, for all slots, stored or not; JSON values."""
    references: Mapping[str, Reference] = field(default_factory=dict)
    """Slot name -> the place of its factors, in a thin fusion, whose ``factors`` lack them."""

    @property
    def layer(self) -> str:
        """Name of the layer: component, module path, and the parameter unless it is a weight."""
        return self.path.removesuffix(".weight")

    @property
    def path(self) -> str:
        """Full name of the parameter: component, module path, parameter."""
        return ".".join(filter(None, (self.component, self.module, self.parameter)))

    @cached_property
    def acting(self) -> Mapping[str, H]:
        """Slot name -> delta, for the slots that act at some progress."""
        return {slot: held for slot, held in self.factors.items() if self.timeline.uses(slot)}

    @cached_property
    def acts(self) -> bool:
        """Whether this entry ever changes the model; it may store slots for other schedules."""
        return any(self.timeline.uses(slot) for slot in (*self.factors, *self.references))


@dataclass(frozen=True)
class Rule:
    """The rule that made the timelines, and its settings."""

    name: str
    parameters: Mapping[str, Any]
    """Every setting, resolved, as JSON values: enough to compile the same fusion again."""
    derived: Mapping[str, Any]
    """Numbers that the rule computed for the whole model, such as ``gamma`` per component."""


@dataclass(frozen=True, repr=False)
class ScheduleOf(Generic[H]):
    """One or more LoRAs and when each of them acts."""

    sources: Mapping[str, Source]
    """Name -> LoRA file that was compiled: its digest and what it states about itself."""
    slots: Mapping[str, Slot]
    """Name -> slot."""
    rule: Rule
    """Name and parameters of the rule that made the schedule."""
    family: str | None
    """Key of the base model's record in ``families``; None if the layers do not identify it."""
    entries: tuple[EntryOf[H], ...]
    """Sorted by component, module and parameter."""
    tool: str
    """Name and version of the compiler."""
    families: tuple[str, ...] = ()
    """Sorted keys of all base models that have the layers, if there are several; ``family`` is None
        then."""
    clock: ClockName = "step"
    """What the progress of the timelines follows: the steps, or the noise."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Keys of the base models that it may be for; empty if the layers say nothing."""
        return self.families if self.family is None else (self.family,)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and shapes of the adapted layers; equal ones fit the same models."""
        return fingerprint((e.component, e.module, e.parameter, e.shape) for e in self.entries)

    @property
    def components(self) -> tuple[str, ...]:
        """Sorted names of the components with a layer that acts."""
        return tuple(sorted({entry.component for entry in self.entries if entry.acts}))

    @property
    def is_thin(self) -> bool:
        """Whether some factors are in the source files only."""
        return any(entry.references for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        sizes: dict[Hashable, int] = {}
        for entry in self.entries:
            for held in entry.factors.values():
                sizes.update(held.sizes())
        return sum(sizes.values())

    def __repr__(self) -> str:
        """Three lines: see :func:`summary`."""
        return "\n".join(summary(self))

    def _repr_html_(self) -> str:
        """Return the three lines and a map of the schedule, for notebooks."""
        from klora_runtime.artifact.schedule_html import schedule_html

        return schedule_html(self, repr(self))


#: An adapted parameter with its numbers in memory or in a file.
ScheduledEntry: TypeAlias = EntryOf[Held]
#: A schedule with its numbers in memory or in a file.
Schedule: TypeAlias = ScheduleOf[Held]


def summary(fusion: Schedule) -> tuple[str, str, str]:
    """Return three lines: what the fusion is, its size, and its layers by fate."""
    files = [shown(source.file, _NAME) for source in fusion.sources.values()]
    if len(files) > _NAMES:
        files[_NAMES:] = [f"{len(files) - _NAMES} more"]
    names = [shown(key, _NAME) for key in fusion.candidates[:_NAMES]]
    more = ["others"] * (len(fusion.candidates) > _NAMES)
    fits = f", for {' or '.join([*names, *more])}" if names else ""
    fates = Counter(entry.fate for entry in fusion.entries if entry.acts)
    by = f"rule {shown(fusion.rule.name)}" + (", clock noise" if fusion.clock == "noise" else "")
    held = "factors in its sources" if fusion.is_thin else f"{fusion.nbytes / 1e6:.2f} MB"
    return (
        f"Fusion of {' and '.join(files) or 'no files'} by {by}{fits}",
        f"{fates.total()} layers in {', '.join(map(shown, fusion.components))}; {held}",
        f"acting: {', '.join(f'{count} {shown(fate)}' for fate, count in fates.items())}",
    )


def fingerprint(layers: Iterable[tuple[str, str, str, tuple[int, ...]]]) -> str:
    """Compute :attr:`Fusion.fingerprint`.

    Args:
        layers: component, module, parameter and shape of each layer.
    """
    lines = sorted(f"{'.'.join(names)} {'x'.join(map(str, shape))}" for *names, shape in layers)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
