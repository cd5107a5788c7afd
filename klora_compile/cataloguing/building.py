"""From a store to a catalogue: the LoRAs, the verdict of each pair, and its linked choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from klora_compile.cataloguing.bulk import OnPairs, Wanted, link_all
from klora_compile.cataloguing.lora_numbers import Pools, numbers_of, partners_for
from klora_compile.cataloguing.selecting import StoredLora, names_of
from klora_compile.cataloguing.terms import terms_of
from klora_compile.cataloguing.verdicts import Verdicts
from klora_compile.engines import Engine
from klora_compile.planning.pairing import check_slots
from klora_compile.profiles.profiling import lacks
from klora_compile.profiles.store import Store
from klora_compile.settings.config import Config
from klora_runtime import __version__
from klora_runtime.artifact.schedule import CONTENT, STEPLESS, STYLE
from klora_runtime.catalogue.document import CataloguedLora, Document, Kind
from klora_runtime.catalogue.file import CatalogueFile, Pairs, save_catalogue
from klora_runtime.errors import ConfigError, shown
from klora_runtime.lazy_torch import torch
from klora_runtime.linking.duels import DIGEST_BYTES
from klora_runtime.linking.meeting import meeting_of
from klora_runtime.linking.numbers import Numbers
from klora_runtime.linking.terms import Terms

#: Why a pair whose gamma is undefined is refused.
_NO_GAMMA = "gamma is undefined: the deltas of one LoRA are zero in all weights that both change."

_Id = tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """The LoRAs of a catalogue by role."""

    contents: Sequence[StoredLora]
    styles: Sequence[StoredLora]
    always: Mapping[str, StoredLora]

    @property
    def every(self) -> list[StoredLora]:
        """Each LoRA once, sorted by name, then by its files' digests."""
        own = {lora.id: lora for lora in (*self.contents, *self.styles, *self.always.values())}
        return sorted(own.values(), key=lambda lora: (lora.stem, lora.id))


@dataclass
class Draft:
    """A catalogue whose pairs have verdicts and are not linked yet."""

    terms: Terms
    loras: tuple[CataloguedLora, ...]
    numbers: tuple[Numbers, ...]
    contents: tuple[int, ...]
    styles: tuple[int, ...]
    always: Mapping[str, int]
    kinds: list[Kind]
    kind_of: dict[tuple[int, int], int]
    """Numbers of content and style -> number of their kind."""
    components: tuple[str, ...]
    known: dict[tuple[int, int], tuple[list[float], bytes, str | None]] = field(
        default_factory=dict
    )
    """Pairs that an earlier catalogue holds -> gamma, digest, and why they are refused."""

    @property
    def wanted(self) -> list[Wanted]:
        """The pairs to link."""
        found = []
        for content in self.contents:
            styles = tuple(
                style
                for style in self.styles
                if (content, style) not in self.known
                and self.kinds[self.kind_of[content, style]].refused is None
            )
            if styles:
                found.append(Wanted(content, styles))
        return found

    @property
    def refusals(self) -> Counter[str]:
        """Reason -> number of pairs."""
        reasons = (self.kinds[kind].refused for kind in self.kind_of.values())
        return Counter(reason for reason in reasons if reason is not None)


@dataclass(frozen=True)
class Built:
    """A catalogue that was written."""

    path: Path
    nbytes: int
    linked: int
    kept: int
    refused: Counter[str]


def partners_of(terms: Terms, selection: Selection) -> dict[_Id, tuple[int, ...]]:
    """Return id of each LoRA -> the keys of the sums that its partners need."""
    ranks = {
        role: {rank for lora in loras for rank in lora.ranks}
        for role, loras in ((CONTENT, selection.contents), (STYLE, selection.styles))
    }
    asked: dict[_Id, set[int]] = {lora.id: set() for lora in selection.every}
    for lora in selection.contents:
        asked[lora.id] |= ranks[STYLE]
    for lora in selection.styles:
        asked[lora.id] |= ranks[CONTENT]
    return {id_: partners_for(terms, ranks_) if ranks_ else () for id_, ranks_ in asked.items()}


def lacking(store: Store, selection: Selection, terms: Terms) -> dict[_Id, StoredLora]:
    """Return the LoRAs whose statistics are damaged, or lack sums that their partners need."""
    partners, found = partners_of(terms, selection), {}
    fixed = terms.duel is not None and terms.duel.top_k is not None
    for lora in selection.every:
        asked = partners[lora.id]
        for profile in lora.profiles.values():
            own = store.statistics(profile.statistics)
            if own is None or lacks(profile, own, () if fixed else asked, asked if fixed else ()):
                found[lora.id] = lora
    return found


def draft(
    store: Store, selection: Selection, config: Config, before: CatalogueFile | None = None
) -> Draft:
    """Return the draft of a catalogue.

    Args:
        store: the store, whose profiles lack nothing.
        selection: the LoRAs.
        config: the rule and the shared settings.
        before: an earlier catalogue, whose pairs are not linked again.

    Raises:
        ConfigError: the rule cannot be linked, or does not take such LoRAs; or the earlier
            catalogue has other terms.
        KloraError: the store lacks statistics.
    """
    slots = (CONTENT, STYLE, *selection.always)
    check_slots(slots, config.rule, config.settings)
    terms = terms_of(config, slots)
    names, partners, pools = names_of(selection.every), partners_of(terms, selection), Pools()
    made = [
        numbers_of(store, lora, names[lora.id], terms, partners[lora.id], pools)
        for lora in selection.every
    ]
    place = {lora.id: number for number, lora in enumerate(selection.every)}
    contents = tuple(sorted(place[lora.id] for lora in selection.contents))
    styles = tuple(sorted(place[lora.id] for lora in selection.styles))
    found = Draft(
        terms,
        tuple(lora for lora, _ in made),
        tuple(numbers for _, numbers in made),
        contents,
        styles,
        {slot: place[lora.id] for slot, lora in selection.always.items()},
        [],
        {},
        _components(numbers for _, numbers in made),
    )
    if before is not None:
        _take_over(found, before)
    _judge(found, selection, Verdicts(config, selection.always))
    return found


def _components(loras: Iterable[Numbers]) -> tuple[str, ...]:
    """Return the sorted components with steps that LoRAs change."""
    found = {place.component for each in loras for place in each.table.places}
    return tuple(sorted(found - set(STEPLESS)))


def _judge(found: Draft, selection: Selection, verdicts: Verdicts) -> None:
    """Fill in the kind of each pair."""
    numbers: dict[Kind, int] = {}
    every = selection.every
    group = [verdicts.group(lora) for lora in every]
    known: dict[tuple[int, int, bool], Kind] = {}
    for content in found.contents:
        for style in found.styles:
            key = group[content], group[style], content == style
            own = known.get(key)
            if own is None:
                tables = found.loras[content].table, found.loras[style].table
                meeting = meeting_of(dict(zip((CONTENT, STYLE), tables, strict=True)))
                own = known[key] = verdicts.of(every[content], every[style], meeting)
            old = found.known.get((content, style))
            if old is not None and old[2] is not None:
                own = Kind(old[2])
            found.kind_of[content, style] = numbers.setdefault(own, len(numbers))
    found.kinds = list(numbers)


def _take_over(found: Draft, before: CatalogueFile) -> None:
    """Take over the linked pairs of an earlier catalogue."""
    old = before.document
    ids = [lora.sha256 for lora in old.loras]
    now = {lora.sha256: number for number, lora in enumerate(found.loras)}
    always = {slot: ids[number] for slot, number in old.always.items()}
    here = {slot: found.loras[number].sha256 for slot, number in found.always.items()}
    if old.terms != found.terms or always != here:
        raise ConfigError(
            f"the catalogue was linked by rule {shown(old.terms.rule)} with other settings. Name "
            "the same ones, or write another file."
        )
    columns = [
        found.components.index(name) if name in found.components else None
        for name in old.components
    ]
    held = before.pairs
    rows = zip(held.pairs.tolist(), held.gamma.tolist(), held.choices.tolist(), strict=True)
    for (content, style, kind), gamma, choices in rows:
        place = now.get(ids[content]), now.get(ids[style])
        if place[0] is None or place[1] is None:
            continue
        row = [-1.0] * len(found.components)
        for column, value in zip(columns, gamma, strict=True):
            if column is not None:
                row[column] = value
        refused = old.kinds[kind].refused
        found.known[place[0], place[1]] = row, bytes(choices), refused


def build(
    found: Draft,
    path: Path,
    *,
    overwrite: bool = False,
    engine: Engine | None = None,
    on_pairs: OnPairs | None = None,
) -> Built:
    """Link the pairs of a draft, and write the catalogue.

    Args:
        found: the draft.
        path: the file.
        overwrite: replace an existing file.
        engine: where to link; None for this process.
        on_pairs: called after each content.

    Raises:
        ArtifactError: the file cannot be written.
    """
    wanted = found.wanted
    rows = {pair: (gamma, choices) for pair, (gamma, choices, _) in found.known.items()}
    no_gamma: int | None = None
    linked_now = 0
    for linked in link_all(
        found.terms, wanted, found.numbers, found.components, engine=engine, on_pairs=on_pairs
    ):
        own = zip(linked.styles, linked.gamma, linked.choices, linked.undefined, strict=True)
        for style, gamma, choices, is_undefined in own:
            rows[linked.content, style] = gamma, choices
            if is_undefined:
                if no_gamma is None:
                    no_gamma = len(found.kinds)
                    found.kinds.append(Kind(_NO_GAMMA))
                found.kind_of[linked.content, style] = no_gamma
            else:
                linked_now += 1
    document = Document(
        tool=f"klora {__version__}",
        terms=found.terms,
        loras=found.loras,
        contents=found.contents,
        styles=found.styles,
        always=found.always,
        kinds=tuple(found.kinds),
        components=found.components,
        digests={},
    )
    nbytes = save_catalogue(document, found.numbers, _pairs(found, rows), path, overwrite=overwrite)
    kept = sum(refused is None for _, _, refused in found.known.values())
    return Built(path, nbytes, linked_now, kept, found.refusals)


def _pairs(found: Draft, rows: Mapping[tuple[int, int], tuple[list[float], bytes]]) -> Pairs:
    """Return the arrays of all pairs, sorted by content, then by style."""
    order = sorted(found.kind_of)
    nothing = ([0.0] * len(found.components), bytes(DIGEST_BYTES))
    refused = {number for number, kind in enumerate(found.kinds) if kind.refused is not None}
    values = [nothing if found.kind_of[pair] in refused else rows[pair] for pair in order]
    pairs = torch.tensor(
        [(*pair, found.kind_of[pair]) for pair in order], dtype=torch.int32
    ).reshape(len(order), 3)
    gamma = torch.tensor([gamma for gamma, _ in values], dtype=torch.float64)
    choices = torch.frombuffer(
        bytearray(b"".join(choices for _, choices in values) or bytes(1)), dtype=torch.uint8
    )[: DIGEST_BYTES * len(order)]
    return Pairs(
        pairs,
        gamma.reshape(len(order), len(found.components)),
        choices.reshape(len(order), DIGEST_BYTES),
    )
