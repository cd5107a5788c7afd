"""The averaged delta of one parameter of a file: concatenated factors, or a dense delta.

Everything is float64; factors are never multiplied out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from klora_compile.export.averaging import Window, layer_gain, mean_coefficients
from klora_compile.export.targets import Target
from klora_runtime.artifact.delta import Delta, Dense, LowRank
from klora_runtime.devices.names import HOST

#: In :func:`truncated`, squared singular values below this share of their sum are rounding.
_NOISE = 1e-15


@dataclass(frozen=True)
class _Term:
    """One slot's share of a target: weight * delta, in some rows."""

    weight: float
    delta: Delta
    rows: tuple[range, ...] | None


def averaged(target: Target, window: Window, gain: float) -> Delta | None:
    """Return the average of a target's delta over a window, times the gain.

    Returns:
        The delta in float64, (rows, columns) or with one dimension; None if nothing acts.
    """
    terms = list(_terms(target, window, gain))
    if not terms:
        return None
    factors = [(term, term.delta) for term in terms if isinstance(term.delta, LowRank)]
    product = _joined(target.shape[0], factors)
    if len(factors) == len(terms) and target.has_factors:
        return product
    columns = (math.prod(target.shape[1:]),) if len(target.shape) > 1 else ()
    total = torch.zeros(target.shape[0], *columns, dtype=torch.float64)
    if product is not None:
        total += product.matrix()
    for term in (term for term in terms if isinstance(term.delta, Dense)):
        values = term.weight * term.delta.matrix()
        total[_index(term.rows, len(total))] += values.reshape(-1, *columns)
    return Dense(total)


def truncated(delta: Delta, rank: int) -> tuple[LowRank, float]:
    """Return the nearest delta of at most this rank (Eckart and Young).

    Returns:
        The factors, with the singular values shared evenly between them, and the squared norm of
        the loss.
    """
    if isinstance(delta, LowRank) and delta.rank <= rank:
        return delta, 0.0
    parts = delta.singular()
    roots = parts.values[:rank].sqrt()
    lost = float(parts.values[rank:].square().sum())
    kept = LowRank(roots[:, None] * parts.right[:rank], parts.left[:, :rank] * roots)
    return kept, lost if lost > _NOISE * float(parts.values.square().sum()) else 0.0


def _terms(target: Target, window: Window, gain: float) -> Iterator[_Term]:
    for piece in target.pieces:
        means = mean_coefficients(piece.entry.timeline, window)
        own = layer_gain(piece.entry, gain)
        for slot, stored in piece.entry.acting.items():
            weight = own * means[slot] * stored.scale
            if weight != 0.0:
                yield _Term(weight, stored.delta.to(HOST), piece.rows)


def _joined(out: int, terms: Sequence[tuple[_Term, LowRank]]) -> LowRank | None:
    """Return the sum of low-rank terms; terms with the same ``down`` share its rows."""
    offsets: dict[tuple[int, tuple[int, ...]], int] = {}
    downs: list[torch.Tensor] = []
    rank = 0
    for _, delta in terms:
        name = _memory(delta.down)
        if name not in offsets:
            offsets[name] = rank
            downs.append(delta.down.double().flatten(1))
            rank += delta.rank
    if not terms:
        return None
    up = torch.zeros(out, rank, dtype=torch.float64)
    for term, delta in terms:
        start = offsets[_memory(delta.down)]
        block = up[:, start : start + delta.rank]
        block[_index(term.rows, out)] += term.weight * delta.up.double().flatten(1)
    return LowRank(torch.cat(downs), up)


def _memory(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Return a key that is equal for two views of the same memory."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _index(rows: tuple[range, ...] | None, out: int) -> torch.Tensor:
    return torch.tensor([row for each in rows or (range(out),) for row in each])
