"""Linking of many pairs at once: gamma, and a digest of all choices, for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from klora_compile.engines import Engine, results
from klora_runtime.artifact.schedule import CONTENT, STYLE
from klora_runtime.lazy_torch import torch
from klora_runtime.linking.duels import DIGEST_BYTES, UNDEFINED, duels
from klora_runtime.linking.meeting import meeting_of
from klora_runtime.linking.numbers import Numbers
from klora_runtime.linking.sides import Side, side_of
from klora_runtime.linking.terms import Terms

#: Styles that duel with one content at once: more do not fit into a core's cache.
_TOGETHER = 32

#: Contents in one piece of work.
_PIECE = 64

#: Called after each content with the number of linked pairs, and the total.
OnPairs = Callable[[object, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """Pairs to link: numbers of a content and of its styles."""

    content: int
    styles: tuple[int, ...]


@dataclass(frozen=True)
class Linked:
    """The linked pairs of one content, in the order of its styles."""

    content: int
    styles: tuple[int, ...]
    gamma: list[list[float]]
    """A row for each pair, a column for each component of the catalogue."""
    choices: list[bytes]
    undefined: list[bool]
    """Whether a layer has a duel and gamma is undefined, so that the pair cannot be linked."""


@dataclass(frozen=True)
class _Piece:
    """A piece of work that can be sent to another process."""

    terms: Terms
    wanted: tuple[Wanted, ...]
    numbers: dict[int, Numbers]
    components: tuple[str, ...]


def link_all(
    terms: Terms,
    wanted: Sequence[Wanted],
    numbers: Sequence[Numbers],
    components: tuple[str, ...],
    *,
    engine: Engine | None = None,
    on_pairs: OnPairs | None = None,
) -> Iterator[Linked]:
    """Link pairs, in any order.

    Args:
        terms: the terms of linking.
        wanted: the pairs.
        numbers: the numbers of all LoRAs.
        components: columns of gamma.
        engine: where to work; None for this process.
        on_pairs: see :data:`OnPairs`.
    """
    pieces = []
    size = len(wanted) if engine is None else _PIECE
    for start in range(0, len(wanted), max(1, size)):
        part = tuple(wanted[start : start + size])
        used = {i for each in part for i in (each.content, *each.styles)}
        pieces.append(_Piece(terms, part, {i: numbers[i] for i in sorted(used)}, components))
    total, done = sum(len(each.styles) for each in wanted), 0
    found = map(iter, results(engine, _linked_piece, pieces)) if engine else map(_linked, pieces)
    for part_of_pairs in found:
        for linked in part_of_pairs:
            done += len(linked.styles)
            if on_pairs is not None:
                on_pairs(linked, done, total)
            yield linked


def _linked_piece(piece: _Piece) -> list[Linked]:
    return list(_linked(piece))


def _linked(piece: _Piece) -> Iterator[Linked]:
    """Link the pairs of a piece; sides of styles are kept while contents have the same layers."""
    numbers = piece.numbers

    def layers(number: int) -> tuple[int, int]:
        return id(numbers[number].table), id(numbers[number].ranks)

    batches: dict[tuple[int, ...], list[_Batch]] = {}
    before: tuple[int, int] | None = None
    for each in sorted(piece.wanted, key=lambda each: layers(each.content)):
        if layers(each.content) != before:
            before = layers(each.content)
            batches.clear()
        if each.styles not in batches:
            batches[each.styles] = list(_batches(each.styles, layers))
        yield _of_content(piece, each, batches[each.styles])


@dataclass
class _Batch:
    """Styles of one table and one set of ranks, which duel together."""

    styles: tuple[int, ...]
    side: Side | None = None
    """Their side against contents of the present table and ranks."""


def _batches(styles: tuple[int, ...], layers: Callable[[int], tuple[int, int]]) -> Iterator[_Batch]:
    for _, alike in groupby(sorted(styles, key=lambda i: (layers(i), i)), key=layers):
        same = tuple(alike)
        for start in range(0, len(same), _TOGETHER):
            yield _Batch(same[start : start + _TOGETHER])


def _of_content(piece: _Piece, wanted: Wanted, batches: Sequence[_Batch]) -> Linked:
    terms, numbers = piece.terms, piece.numbers
    rows: dict[int, tuple[list[float], bytes, bool]] = {}
    content = numbers[wanted.content]
    sides: dict[object, Side] = {}
    for batch in batches:
        styles = [numbers[style] for style in batch.styles]
        if terms.duel is None:
            nothing = [UNDEFINED] * len(piece.components)
            rows |= {style: (nothing, bytes(DIGEST_BYTES), False) for style in batch.styles}
            continue
        partner = styles[0]
        meeting = meeting_of({CONTENT: content.table, STYLE: partner.table})
        if batch.side is None:
            batch.side = side_of(terms, meeting, STYLE, styles, content.ranks)
        key = partner.table, partner.ranks
        if key not in sides:
            sides[key] = side_of(terms, meeting, CONTENT, [content], partner.ranks)
        found = duels(terms.duel, meeting, sides[key], batch.side)
        wrong = _undefined(found.gamma, found.fought, meeting.component_of_shared)
        columns = [piece.components.index(name) for name in meeting.components]
        parts = zip(batch.styles, found.gamma.tolist(), found.digests(), wrong, strict=True)
        for style, gamma, digest, is_wrong in parts:
            row = [UNDEFINED] * len(piece.components)
            for column, value in zip(columns, gamma, strict=True):
                row[column] = value
            rows[style] = row, digest, is_wrong
    ordered = [rows[style] for style in wanted.styles]
    return Linked(
        wanted.content,
        wanted.styles,
        [gamma for gamma, _, _ in ordered],
        [digest for _, digest, _ in ordered],
        [is_wrong for _, _, is_wrong in ordered],
    )


def _undefined(gamma: torch.Tensor, fought: torch.Tensor, where: torch.Tensor) -> list[bool]:
    """Return for each pair whether a layer is fought for without a usable gamma."""
    usable = (gamma > 0.0) & gamma.isfinite()
    if bool(usable.all()) or not gamma.shape[1]:
        return [False] * len(gamma)
    found: list[bool] = (fought & ~usable[:, where.clamp(min=0)]).any(1).tolist()
    return found
