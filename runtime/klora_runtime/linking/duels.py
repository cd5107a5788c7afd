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
        found, pairs = [], len(self.gamma)
        parts = [each.contiguous() for each in (self.gamma, self.begins, self.switches)]
        views = [(memory_of(part), part.nbytes // pairs) for part in parts]
        for pair in range(pairs):
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            for view, size in views:
                digest.update(view[pair * size : (pair + 1) * size])
            found.append(digest.digest())
        return found


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
    spread = gamma[:, where.clamp(min=0)] if meeting.components else torch.ones(1, len(where))
    all_fought = bool(fought.all())

    def only_fought(values: torch.Tensor) -> torch.Tensor:
        return values if all_fought else torch.where(fought, values, 1.0)

    s_c, s_s, balance = map(only_fought, (content.size, styles.size, spread))
    found = choices(duel.inequality, s_c, s_s, balance)
    ratio = s_c / (balance * s_s)
    if all_fought:
        return Duels(gamma, fought, ratio, found.begins, found.switches)
    return Duels(
        gamma,
        fought,
        torch.where(fought, ratio, 0.0),
        found.begins & fought,
        torch.where(fought.unsqueeze(-1), found.switches, NEVER),
    )


def counts_of_sums(duel: Duel, meeting: Meeting, content: Side, style: Side) -> torch.Tensor | None:
    """Return K of each shared layer (eq. 5), (S,) int64; None if norms are compared."""
    if not duel.measures:
        return None
    product = content.ranks * style.ranks
    wanted = product if duel.top_k is None else torch.full_like(product, duel.top_k)
    return torch.minimum(wanted, meeting.tables[CONTENT].sizes[meeting.shared_in[CONTENT]])


def _gammas(duel: Duel, meeting: Meeting, content: Side, styles: Side) -> torch.Tensor:
    """Return gamma of each pair and component."""
    rows = []
    for pair, totals in enumerate(styles.totals):
        row = []
        for component, at in meeting.weighed.items():
            found: float | None
            if not isinstance(duel.gamma, str):
                found = duel.gamma
            elif duel.gamma == "paper":
                total = totals[component]
                found = content.totals[0][component] / total if total > 0.0 else None
            else:
                found = gamma_of_ratios(content.l1[0][at].tolist(), styles.l1[pair][at].tolist())
            row.append(UNDEFINED if found is None else found * duel.favour)
        rows.append(row)
    shape = len(styles.totals), len(meeting.components)
    return torch.tensor(rows, dtype=torch.float64).reshape(shape)
