"""The duels of one content with many styles: gamma, ratios and choices, as arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from klora_runtime.artifact.schedule import CONTENT
from klora_runtime.artifact.tensor_file import memory_of
from klora_runtime.lazy_torch import torch
from klora_runtime.linking.crossings import NEVER, choices
from klora_runtime.linking.gamma import gamma_of_ratios
from klora_runtime.linking.meeting import Meeting
from klora_runtime.linking.sides import Side
from klora_runtime.linking.terms import Duel

#: Stands for a gamma that is undefined; a gamma is 0 or more.
UNDEFINED = -1.0

#: Bytes of a digest.
DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class Duels:
    """The duels of one content with P styles in the S layers that they share."""

    gamma: torch.Tensor
    """(P, components) float64; :data:`UNDEFINED` where no layer is shared or all are zero."""
    fought: torch.Tensor
    """(P, S) bool: whether the layer has steps and neither delta is zero."""
    ratio: torch.Tensor
    """(P, S) float64: S_c / (gamma S_s), 0 where no duel is fought."""
    begins: torch.Tensor
    """(P, S) bool: whether the content acts first; false where no duel is fought."""
    switches: torch.Tensor
    """(P, S, switches) float64: see :class:`~klora_runtime.linking.crossings.Choices`."""

    def digests(self) -> list[bytes]:
        """Return a digest of each pair's gamma and choices."""
        parts = (self.gamma, self.begins, self.switches)
        bytes_of = [part.contiguous().flatten(1).view(torch.uint8) for part in parts]
        rows = torch.cat(bytes_of, 1)
        data, size = memory_of(rows), rows.shape[1]
        pieces = (data[size * pair : size * (pair + 1)] for pair in range(len(rows)))
        return [hashlib.blake2b(piece, digest_size=DIGEST_BYTES).digest() for piece in pieces]


def duels(duel: Duel, meeting: Meeting, content: Side, styles: Side) -> Duels:
    """Return the duels of a content with styles.

    Args:
        duel: the terms.
        meeting: where they meet.
        content: the side of one content.
        styles: the side of P styles.
    """
    where = meeting.component_of_shared
    gamma = _gammas(duel, meeting, content, styles)
    fought = ~(content.is_zero | styles.is_zero | (where < 0))
    spread = _spread(gamma, meeting)
    all_fought = bool(fought.all())

    def only_fought(values: torch.Tensor) -> torch.Tensor:
        return values if all_fought else torch.where(fought, values, 1.0)

    s_c, s_s, balance = map(only_fought, (content.size, styles.size, spread))
    found = choices(duel.inequality, s_c, s_s, balance)
    if all_fought:
        return Duels(gamma, fought, found.ratio, found.begins, found.switches)
    return Duels(
        gamma,
        fought,
        torch.where(fought, found.ratio, 0.0),
        found.begins & fought,
        torch.where(fought.unsqueeze(-1), found.switches, NEVER),
    )


def _spread(gamma: torch.Tensor, meeting: Meeting) -> torch.Tensor:
    """Return gamma of each shared layer, (P, S) or broadcast to it."""
    if not meeting.components:
        return torch.ones(1, 1, dtype=torch.float64)
    if len(meeting.components) == 1:
        return gamma
    return gamma[:, meeting.component_of_shared.clamp(min=0)]


def counts_of_sums(duel: Duel, meeting: Meeting, content: Side, style: Side) -> torch.Tensor | None:
    """Return K of each shared layer (eq. 5), (S,) int64; None if norms are compared."""
    if not duel.measures:
        return None
    product = content.ranks * style.ranks
    wanted = product if duel.top_k is None else torch.full_like(product, duel.top_k)
    return torch.minimum(wanted, meeting.tables[CONTENT].sizes[meeting.shared_in[CONTENT]])


def _gammas(duel: Duel, meeting: Meeting, content: Side, styles: Side) -> torch.Tensor:
    """Return gamma of each pair and component."""
    if not isinstance(duel.gamma, str):
        return torch.full_like(styles.totals, duel.gamma * duel.favour)
    if duel.gamma == "paper":
        found = content.totals / styles.totals * duel.favour
        return torch.where(styles.totals > 0.0, found, UNDEFINED)
    rows = []
    for l1 in styles.l1:
        both = ((content.l1[0][at], l1[at]) for at in meeting.weighed.values())
        means = [gamma_of_ratios(c.tolist(), s.tolist()) for c, s in both]
        rows.append([UNDEFINED if mean is None else mean * duel.favour for mean in means])
    return torch.tensor(rows, dtype=torch.float64).reshape(styles.totals.shape)
