"""What one of two LoRAs brings to their duels: its sizes in the layers that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from klora_runtime.lazy_torch import torch
from klora_runtime.linking.meeting import Meeting
from klora_runtime.linking.numbers import Numbers, Ranks
from klora_runtime.linking.terms import Terms


@dataclass(frozen=True, eq=False)
class Side:
    """The sizes of P LoRAs in the S layers that they share with one partner."""

    size: torch.Tensor
    """(P, S) float64: what is compared, of the scaled deltas."""
    is_zero: torch.Tensor
    """(P, S) bool."""
    ranks: torch.Tensor
    """(S,) int64."""
    l1: torch.Tensor
    """(P, S) float64: L1 norms of the scaled deltas; norms where no sums are compared."""
    totals: torch.Tensor
    """(P, components) float64: sums of the L1 norms of shared weights, rounded once."""


def side_of(
    terms: Terms, meeting: Meeting, slot: str, loras: Sequence[Numbers], partner: Ranks | None
) -> Side:
    """Return a side.

    Args:
        terms: the rule, which lets two LoRAs duel.
        meeting: where the LoRAs meet.
        slot: content or style.
        loras: LoRAs that share their table and their ranks.
        partner: the partner's ranks, over its whole table; None if no Top-K sums are compared.
    """
    at = meeting.shared_in[slot]
    ranks = loras[0].ranks.tensor[at]
    scale = torch.stack([each.scale(terms.ignores_alpha)[at].abs() for each in loras])

    def scaled(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return scale * torch.stack([each[at] for each in values])

    if not terms.measures:
        norm = scaled([each.norm for each in loras])
        return Side(norm * norm, norm == 0.0, ranks, norm, _totals(meeting, norm))
    assert partner is not None
    (other,) = (each for each in meeting.shared_in if each != slot)
    asked = partner.tensor[meeting.shared_in[other]]
    l1 = scaled([each.l1 for each in loras])
    is_zero = (l1 == 0.0) | (scaled([each.frobenius for each in loras]) == 0.0)
    size = scaled([_sums(terms, each, asked, partner, at) for each in loras])
    return Side(size, is_zero, ranks, l1, _totals(meeting, l1))


def _sums(
    terms: Terms, own: Numbers, asked: torch.Tensor, partner: Ranks, at: torch.Tensor
) -> torch.Tensor:
    """Return Top-K sums over the own table; only those of shared layers are filled in."""
    assert terms.duel is not None
    if terms.duel.top_k is not None:
        return own.sums[terms.duel.top_k]
    if len(partner.distinct) == 1:
        return own.sums[partner.distinct[0]]
    found = torch.zeros_like(own.l1)
    for rank in partner.distinct:
        where = at[asked == rank]
        found[where] = own.sums[rank][where]
    return found


def _totals(meeting: Meeting, l1: torch.Tensor) -> torch.Tensor:
    rows = [[math.fsum(row[at].tolist()) for at in meeting.weighed.values()] for row in l1]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(l1), len(meeting.components))
