"""Mixed precision as in LoRAQuant (arXiv 2510.26690), to compare with ``--compress``.

Each delta is split by its singular values, with their roots on either side. The leading components
keep 2 or 3 bits a number, rounded to the nearest of equal steps from the least to the greatest
number of a group; of the rest only the sign is kept, times the mean size in a group. Groups are 128
numbers of a component. How many components lead, the share of the energy tells that they hold
(*coverage*), which is the same for all deltas. The paper refines the result by gradients
afterwards; that is left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from klora_runtime.artifact.delta import LowRank, Stored
from klora_runtime.artifact.fusion import Fusion

_GROUP = 128

#: Bits of a scale or an offset of a group: float16.
_SCALE_BITS = 16


@dataclass(frozen=True)
class Mixed:
    """A fusion in mixed precision."""

    fusion: Fusion
    """With the values that would be read."""
    nbytes: float
    """Bytes of numbers, scales and offsets alone; nothing for names and shapes."""
    numbers: int
    """Numbers of the factors."""
    errors: tuple[float, ...]
    """Relative Frobenius error of each delta."""
    lost: float
    """The same of all deltas together, each with its scale."""


def mixed_of_size(fusion: Fusion, bits: int, nbytes: float) -> Mixed:
    """Return the fusion with the greatest coverage that takes at most so many bytes.

    Args:
        fusion: a compiled fusion of low-rank deltas.
        bits: bits of a leading number.
        nbytes: see :attr:`Mixed.nbytes`. If even signs alone take more, these are returned.
    """
    spectra = _spectra(fusion)
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if _nbytes(spectra, bits, middle) <= nbytes:
            low = middle
        else:
            high = middle
    return mixed(fusion, bits, low)


def mixed(fusion: Fusion, bits: int, coverage: float) -> Mixed:
    """Return a fusion in mixed precision.

    Args:
        coverage: share of the energy of a delta that its leading components hold at least, 0 to 1.
    """
    entries, errors, lost, whole = [], [], 0.0, 0.0
    for entry in fusion.entries:
        factors = {}
        for slot, stored in entry.factors.items():
            delta = _low_rank(stored)
            factors[slot] = replace(stored, delta=_rounded(delta, bits, coverage))
            exact = stored.scale * delta.matrix(torch.float64)
            error = exact - stored.scale * _low_rank(factors[slot]).matrix(torch.float64)
            squares = float(error.square().sum()), float(exact.square().sum())
            errors.append((squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0)
            lost, whole = lost + squares[0], whole + squares[1]
        entries.append(replace(entry, factors=factors))
    return Mixed(
        fusion=replace(fusion, entries=tuple(entries)),
        nbytes=_nbytes(_spectra(fusion), bits, coverage),
        numbers=sum(sum(sizes) * len(values) for values, sizes in _spectra(fusion)),
        errors=tuple(errors),
        lost=(lost / whole) ** 0.5,
    )


def _low_rank(stored: Stored) -> LowRank:
    assert isinstance(stored.delta, LowRank)
    return stored.delta


#: For each delta its singular values, and the numbers of one component on either side.
_Spectra = Sequence[tuple[torch.Tensor, tuple[int, int]]]


def _spectra(fusion: Fusion) -> _Spectra:
    stored = [one for entry in fusion.entries for one in entry.factors.values()]
    deltas = [_low_rank(one).flattened() for one in stored]
    return [(delta.singular().values, (delta.shape[0], delta.shape[1])) for delta in deltas]


def _leading(values: torch.Tensor, coverage: float) -> int:
    """Return how many components lead."""
    shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
    return int((shares < coverage).sum()) + (coverage > 0)


def _nbytes(spectra: _Spectra, bits: int, coverage: float) -> float:
    """Return :attr:`Mixed.nbytes`."""
    total = 0
    for values, sizes in spectra:
        leading = _leading(values, coverage)
        for size in sizes:
            groups = -(-size // _GROUP)
            total += leading * (bits * size + 2 * _SCALE_BITS * groups)
            total += (len(values) - leading) * (size + _SCALE_BITS * groups)
    return total / 8


def _rounded(delta: LowRank, bits: int, coverage: float) -> LowRank:
    found = delta.singular()
    roots, leading = found.values.sqrt()[:, None], _leading(found.values, coverage)
    sides = []
    for side in (roots * found.right, roots * found.left.T):
        parts = [_nearest(side[:leading], bits), _signs(side[leading:])]
        sides.append(torch.cat(parts).float())
    return LowRank(
        sides[0].reshape(delta.down.shape), sides[1].T.contiguous().reshape(delta.up.shape)
    )


def _nearest(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Return rows, rounded to 2^bits equal steps from the least to the greatest of a group."""

    def rounded(group: torch.Tensor) -> torch.Tensor:
        least, most = group.aminmax(dim=1, keepdim=True)
        step = ((most - least) / (2**bits - 1)).clamp_min(1e-30)
        return ((group - least) / step).round() * step + least

    return torch.cat([rounded(group) for group in rows.split(_GROUP, dim=1)], 1)


def _signs(rows: torch.Tensor) -> torch.Tensor:
    """Return the signs of rows, times the mean size in a group."""
    groups = rows.split(_GROUP, dim=1)
    return torch.cat([group.sign() * group.abs().mean(1, keepdim=True) for group in groups], 1)
