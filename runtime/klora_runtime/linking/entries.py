"""From the numbers of two LoRAs, and of those that always act, to the layers of a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from klora_runtime.artifact.making import made
from klora_runtime.artifact.schedule import CONTENT, STEPLESS, STYLE
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.linking.crossings import NEVER
from klora_runtime.linking.duels import UNDEFINED, Duels, counts_of_sums, duels
from klora_runtime.linking.meeting import Meeting, meeting_of
from klora_runtime.linking.numbers import Numbers, Place
from klora_runtime.linking.sides import Side, side_of
from klora_runtime.linking.terms import Terms

#: Starts of segments, and for each the slots that act in it.
_Segments = tuple[tuple[float, ...], tuple[tuple[str, ...], ...]]

_START = (0.0,)
_NOTHING: _Segments = (_START, ((),))
_ALONE = {slot: ((slot,),) for slot in (CONTENT, STYLE)}
_TURNS = {CONTENT: ((CONTENT,), (STYLE,)), STYLE: ((STYLE,), (CONTENT,))}


@dataclass(frozen=True)
class LinkedLayer:
    """One layer of a schedule, without its factors."""

    place: Place
    fate: str
    timeline: Timeline
    present: tuple[str, ...]
    """Slots whose delta is not zero."""
    scales: Mapping[str, float]
    """Slot -> factor on its delta, for every slot that adapts the layer."""
    scores: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two LoRAs that meet, and those that always act beside them."""

    terms: Terms
    loras: Mapping[str, Numbers]
    """Slot -> numbers: content, style, and those that always act."""
    meeting: Meeting
    sides: tuple[Side, Side] | None
    """Content and style, if they duel."""
    fought: Duels | None
    """Their duels, P = 1; None for a sum."""

    @property
    def gamma(self) -> dict[str, float | None]:
        """Component -> gamma; empty for terms without it."""
        if self.fought is None or not self.terms.measures:
            return {}
        values = self.fought.gamma[0].tolist()
        return {
            name: None if value == UNDEFINED else value
            for name, value in zip(self.meeting.components, values, strict=True)
        }

    @property
    def digest(self) -> bytes:
        """A digest of all choices; equal for equal pairs, empty for a sum."""
        return b"" if self.fought is None else self.fought.digests()[0]


def link(terms: Terms, loras: Mapping[str, Numbers]) -> Pair:
    """Link two LoRAs: compute every choice between them.

    Args:
        terms: the rule and its settings.
        loras: slot -> numbers: content, style, and those that always act.
    """
    meeting = meeting_of({slot: each.table for slot, each in loras.items()})
    if terms.duel is None:
        return Pair(terms, loras, meeting, None, None)
    content, style = loras[CONTENT], loras[STYLE]
    sides = (
        side_of(terms, meeting, CONTENT, [content], style.ranks),
        side_of(terms, meeting, STYLE, [style], content.ranks),
    )
    return Pair(terms, loras, meeting, sides, duels(terms.duel, meeting, *sides))


def layers_of(pair: Pair) -> Iterator[LinkedLayer]:
    """Yield every layer of a linked pair, in the order of an artifact."""
    return iter(_Layers(pair))


@dataclass(eq=False)
class _Row:
    """The numbers of one LoRA as lists, over its own table."""

    rank: Sequence[int]
    scaling: list[float]
    frobenius: list[float]
    is_zero: list[bool]
    l1: list[float] | None
    shared_top_k: list[float] | None


@dataclass(eq=False)
class _Layers:
    """Builds the layers of one pair."""

    pair: Pair
    coefficients: dict[Any, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    constant: dict[Any, Timeline] = field(default_factory=dict)
    """Timelines of one segment, which many layers share."""

    def __post_init__(self) -> None:
        pair = self.pair
        self.terms, self.meeting = pair.terms, pair.meeting
        self.beside = tuple(slot for slot in pair.loras if slot not in (CONTENT, STYLE))
        self.rows = {slot: self._row(slot, each) for slot, each in pair.loras.items()}
        self.ratio: list[float] = []
        self.k: list[int] | None = None
        if pair.fought is not None and pair.sides is not None:
            assert pair.terms.duel is not None
            self.ratio = pair.fought.ratio[0].tolist()
            self.begins = pair.fought.begins[0].tolist()
            columns = pair.fought.switches[0].unbind(-1)  # torch lists a matrix row by row, slowly
            self.switches = [column.tolist() for column in columns]
            k = counts_of_sums(pair.terms.duel, pair.meeting, *pair.sides)
            self.k = None if k is None else k.tolist()

    def _row(self, slot: str, own: Numbers) -> _Row:
        ruled = slot not in self.beside
        scale = own.scale(ruled and self.terms.ignores_alpha)
        measures = ruled and self.terms.measures
        frobenius = scale.abs() * (own.frobenius if measures else own.norm)
        l1 = scale.abs() * own.l1 if measures else None
        zero = frobenius == 0.0
        if l1 is not None:
            zero = zero | (l1 == 0.0)
        top_k = None
        if measures and self.pair.sides is not None:
            top_k = self.pair.sides[(CONTENT, STYLE).index(slot)].size[0].tolist()
        return _Row(
            own.ranks.values,
            scale.tolist(),
            frobenius.tolist(),
            zero.tolist(),
            None if l1 is None else l1.tolist(),
            top_k,
        )

    def __iter__(self) -> Iterator[LinkedLayer]:
        places = zip(self.meeting.places, self.meeting.rows, strict=True)
        for number, (place, at) in enumerate(places):
            yield self._layer(number, place, at)

    def _layer(self, number: int, place: Place, at: Mapping[str, int | None]) -> LinkedLayer:
        weight = self.meeting.weight_of[number]
        ruled = self._ruled(at)
        if weight is None or self.terms.duel is None:
            fate, segments, ratio = self._choose(number, ruled)
        else:
            chosen = self._choose(weight, self._ruled(self.meeting.rows[weight]))
            fate, segments, ratio = self._follow(ruled, chosen)
        beside = self._acting(at, self.beside) if self.beside else ()
        if beside and not any(segments[1]):
            fate = "always"
        present = ruled + beside
        if fate == "dropped" and present:
            fate = "idle"
        shared = self.meeting.rank_of_shared.get(number)
        k = None if shared is None or self.k is None else self.k[shared]
        scores: dict[str, Any] = {"k": k, "ratio": ratio}
        scales = {}
        for slot, i in at.items():
            if i is None:
                scores[slot] = None
            else:
                scores[slot] = self._scores(self.rows[slot], i, shared)
                scales[slot] = self.rows[slot].scaling[i]
        timeline = self._timeline(place.component, segments, beside)
        return made(
            LinkedLayer,
            place=place,
            fate=fate,
            timeline=timeline,
            present=present,
            scales=scales,
            scores=scores,
        )

    def _ruled(self, at: Mapping[str, int | None]) -> tuple[str, ...]:
        """Return content and style, if their deltas of a layer are not zero."""
        return self._acting(at, (CONTENT, STYLE))

    def _acting(self, at: Mapping[str, int | None], slots: tuple[str, ...]) -> tuple[str, ...]:
        found = []
        for slot in slots:
            i = at[slot]
            if i is not None and not self.rows[slot].is_zero[i]:
                found.append(slot)
        return tuple(found)

    def _choose(self, number: int, present: tuple[str, ...]) -> tuple[str, _Segments, float | None]:
        """Choose for a layer by itself: its fate, segments and ratio."""
        if not present:
            return "zero", _NOTHING, None
        if self.meeting.places[number].component in STEPLESS:
            asked = self.terms.text_encoder
            acting = tuple(slot for slot in present if asked in ("both", slot))
            return "constant" if acting else "dropped", (_START, (acting,)), None
        shared = self.meeting.rank_of_shared.get(number)
        if shared is None and self.terms.unpaired == "drop" and self._is_owned(number):
            return "dropped", _NOTHING, None
        if self.terms.duel is None:
            return "summed", (_START, (present,)), None
        if len(present) == 1:
            return "one-sided", (_START, (present,)), None
        assert shared is not None
        first = CONTENT if self.begins[shared] else STYLE
        starts = [column[shared] for column in self.switches if column[shared] < NEVER]
        if not starts:
            return f"always {first}", (_START, _ALONE[first]), self.ratio[shared]
        turns = _TURNS[first]
        acting_in = tuple(turns[place % 2] for place in range(len(starts) + 1))
        return "switching", ((0.0, *starts), acting_in), self.ratio[shared]

    def _is_owned(self, number: int) -> bool:
        return any(self.meeting.own[slot][number] is not None for slot in (CONTENT, STYLE))

    def _follow(
        self, present: tuple[str, ...], chosen: tuple[str, _Segments, float | None]
    ) -> tuple[str, _Segments, float | None]:
        """Choose for a bias: what acts on its weight acts on it."""
        _, (starts, acting), ratio = chosen
        if not present:
            return "zero", _NOTHING, ratio
        kept = tuple(tuple(slot for slot in row if slot in present) for row in acting)
        return "with its weight" if any(kept) else "dropped", (starts, kept), ratio

    @staticmethod
    def _scores(row: _Row, at: int, shared: int | None) -> dict[str, Any]:
        scores: dict[str, Any] = {
            "rank": row.rank[at],
            "scaling": row.scaling[at],
            "frobenius": row.frobenius[at],
        }
        if row.l1 is not None:
            top_k = None if shared is None or row.shared_top_k is None else row.shared_top_k[shared]
            scores["l1"] = row.l1[at]
            scores["top_k"] = top_k
        return scores

    def _timeline(self, component: str, segments: _Segments, beside: tuple[str, ...]) -> Timeline:
        """Return the timeline of all slots with weights applied; equal neighbours join."""
        if len(segments[0]) > 1:
            return self._timeline_of(component, segments, beside)
        key = component, segments[1], beside
        if key not in self.constant:
            self.constant[key] = self._timeline_of(component, segments, beside)
        return self.constant[key]

    def _timeline_of(
        self, component: str, segments: _Segments, beside: tuple[str, ...]
    ) -> Timeline:
        starts: list[float] = []
        acting: list[tuple[str, ...]] = []
        for start, slots in zip(*segments, strict=True):
            row = (*slots, *beside)
            if not acting or acting[-1] != row:
                starts.append(start)
                acting.append(row)
        key = (component, *acting)
        found = self.coefficients.get(key)
        if found is None:
            weights = {slot: self.terms.weight(slot, component) for slot in self.pair.loras}
            found = self.coefficients[key] = {
                slot: tuple(weight if slot in row else 0.0 for row in acting)
                for slot, weight in weights.items()
            }
        return made(Timeline, starts=tuple(starts), coefficients=found)
