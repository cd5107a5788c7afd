"""The averaged delta of one parameter of a file: concatenated factors, or the numbers themselves.

All in float64; slots are never multiplied out where they are factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from klora_compile.export.averaging import Window, layer_gain, mean_coefficients
from klora_compile.export.targets import Target
from klora_compile.reading.deltas import Delta, LowRank
from klora_compile.reading.deltas import Dense as DenseDelta
from klora_runtime.artifact.delta import Dense, Factors

_CPU = torch.device("cpu")

#: Of :func:`truncated`: squared singular values below this share of all are rounding.
_NOISE = 1e-15


@dataclass(frozen=True)
class _Term:
    """One slot's part of a target: weight * its delta, in some rows."""

    weight: float
    stored: Factors | Dense
    rows: tuple[range, ...] | None


def averaged(target: Target, window: Window, gain: float) -> Delta | None:
    """The average of a target's delta over a window, times the gain.

    Returns:
        (rows, columns) in float64, or of one dimension; None where nothing acts.
    """
    terms = list(_terms(target, window, gain))
    if not terms:
        return None
    factors = [term for term in terms if isinstance(term.stored, Factors)]
    product = _joined(target.shape[0], factors)
    if len(factors) == len(terms):
        assert product is not None
        return product
    columns = (math.prod(target.shape[1:]),) if len(target.shape) > 1 else ()
    total = torch.zeros(target.shape[0], *columns, dtype=torch.float64)
    if product is not None:
        total += product.matrix()
    for term in (term for term in terms if isinstance(term.stored, Dense)):
        values = term.weight * term.stored.matrix(torch.float64, _CPU)
        total[_index(term.rows, len(total))] += values.reshape(-1, *columns)
    return DenseDelta(total)


def truncated(delta: Delta, rank: int) -> tuple[LowRank, float]:
    """The nearest delta of at most a rank (Eckart and Young).

    Of factors, the singular values are those of R_up R_down^T, rank x rank, where up = Q_up R_up
    and down^T = Q_down R_down; the delta itself is never made.

    Returns:
        Factors, the singular values shared evenly between them, and the squared norm of what is
        lost.
    """
    if isinstance(delta, LowRank):
        if delta.rank <= rank:
            return delta, 0.0
        up_basis, up_core = torch.linalg.qr(delta.up)
        down_basis, down_core = torch.linalg.qr(delta.down.T)
        left, values, right = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
        left, right = up_basis @ left, right @ down_basis.T
    else:
        left, values, right = torch.linalg.svd(delta.values, full_matrices=False)
    roots = values[:rank].sqrt()
    lost = float(values[rank:].square().sum())
    kept = LowRank(roots[:, None] * right[:rank], left[:, :rank] * roots)
    return kept, lost if lost > _NOISE * float(values.square().sum()) else 0.0


def balanced(delta: LowRank) -> LowRank:
    """The same delta, each column of up as large as its row of down, by powers of two.

    A power of two changes no bit of a mantissa, and evenly large factors are farthest from what
    float16 cannot hold.
    """
    down, up = delta.down, delta.up
    rows, columns = down.abs().amax(1), up.abs().amax(0)
    scaled = (rows > 0) & (columns > 0)
    ratios = torch.where(scaled, columns, 1.0) / torch.where(scaled, rows, 1.0)
    powers = torch.exp2((ratios.log2() / 2).round())
    return LowRank(down * powers[:, None], up / powers)


def _terms(target: Target, window: Window, gain: float) -> Iterator[_Term]:
    for piece in target.pieces:
        means = mean_coefficients(piece.entry.timeline, window)
        own = layer_gain(piece.entry, gain)
        for slot, stored in piece.entry.factors.items():
            weight = own * means[slot] * stored.scale
            if weight != 0.0:
                yield _Term(weight, stored, piece.rows)


def _joined(out: int, terms: Sequence[_Term]) -> LowRank | None:
    """The sum of low-rank terms; those that have one ``down`` share its rows."""
    offsets: dict[tuple[int, tuple[int, ...]], int] = {}
    downs: list[torch.Tensor] = []
    rank = 0
    for term in terms:
        assert isinstance(term.stored, Factors)
        name = _memory(term.stored.down)
        if name not in offsets:
            offsets[name] = rank
            downs.append(term.stored.down.double().flatten(1))
            rank += term.stored.rank
    if not terms:
        return None
    up = torch.zeros(out, rank, dtype=torch.float64)
    for term in terms:
        assert isinstance(term.stored, Factors)
        start = offsets[_memory(term.stored.down)]
        block = up[:, start : start + term.stored.rank]
        block[_index(term.rows, out)] += term.weight * term.stored.up.double().flatten(1)
    return LowRank(torch.cat(downs), up)


def _memory(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """What two names of one tensor have in common."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _index(rows: tuple[range, ...] | None, out: int) -> torch.Tensor:
    return torch.tensor([row for each in rows or (range(out),) for row in each])
