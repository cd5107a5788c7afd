"""Compression: the fewest bits per number whose delta stays within a tolerance.

Each pair of factors is turned into its singular value decomposition, sqrt(sigma) on either side.
Then the error of the delta is, to first order, the sum of the errors of its components, and the
bits go where they save most: components that matter less get fewer, or none (a smaller rank).
The error that is stated is not that estimate. It is measured, in float64, against the source.

All of it is computed on one thread: decompositions differ in bits with the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from klora_compile.single_thread import single_thread
from klora_runtime.errors import ConfigError
from klora_runtime.fusion import Dense, Factors, Fusion
from klora_runtime.quantised import BLOCK, MAX_WIDTH, Quantised, Vectors, pack
from klora_runtime.stored_factors import from_quantised, vectors_of

#: What may be lost of a delta: relative Frobenius error.
LOWEST, HIGHEST = 1e-5, 0.5

#: Where the range of a block's scale may end, as parts of the block's largest number: with few
#: bits it pays to cut it off.
_ENDS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_FEW_BITS = 4

_ATTEMPTS = 8
_BISECTIONS = 48

#: Called after each layer with its name, how many are done and how many there are.
OnLayer = Callable[[str, int, int], None]


def compress(fusion: Fusion, tolerance: float, *, on_layer: OnLayer | None = None) -> Fusion:
    """Store a fusion in fewer bytes.

    Args:
        fusion: as compiled; its schedule and scores stay what they are.
        tolerance: relative Frobenius error that the delta of each slot of each layer may have,
            1e-5 to 0.5. What cannot be made smaller within it stays as it is.
        on_layer: called after each layer.

    Returns:
        The fusion as it will be read again: its factors are what their few bits stand for.

    Raises:
        ConfigError: the tolerance is out of range, or the fusion is compressed or thin already.
    """
    if not LOWEST <= tolerance <= HIGHEST:
        raise ConfigError(
            f"tolerance: expected a number from {LOWEST:g} to {HIGHEST:g}, found {tolerance!r}."
        )
    stored = [factors for entry in fusion.entries for factors in entry.factors.values()]
    if fusion.is_thin or any(factors.quantised is not None for factors in stored):
        raise ConfigError(
            "only a fusion whose factors are those of its sources can be compressed; this one is "
            "compressed or thin already. Compile its sources again."
        )
    entries = []
    with single_thread():
        for done, entry in enumerate(fusion.entries, start=1):
            small = {
                slot: _smallest(factors, entry.shape, tolerance)
                for slot, factors in entry.factors.items()
            }
            entries.append(replace(entry, factors=small))
            if on_layer is not None:
                on_layer(entry.layer, done, len(fusion.entries))
    return replace(fusion, entries=tuple(entries))


def relative_error(exact: Factors | Dense, found: Factors | Dense) -> float:
    """||found - exact|| / ||exact|| of two deltas without their scales, in float64; 0 where both
    are zero."""
    if isinstance(exact, Factors) and isinstance(found, Factors):
        up = torch.cat([-_matrix(exact.up), _matrix(found.up)], 1)
        down = torch.cat([_matrix(exact.down), _matrix(found.down)])
        lost, whole = _energy(up, down), _energy(_matrix(exact.up), _matrix(exact.down))
    else:
        one, other = (f.matrix(torch.float64, torch.device("cpu")) for f in (exact, found))
        lost, whole = float((other - one).square().sum()), float(one.square().sum())
    if whole == 0.0:
        return 0.0 if lost == 0.0 else math.inf
    return math.sqrt(max(0.0, lost) / whole)


@dataclass(frozen=True)
class _Components:
    """Vectors whose errors add up to the error of the delta."""

    values: torch.Tensor
    """(components, numbers), float32."""
    energies: torch.Tensor
    """(components,), float64: squared norm of the delta of each."""
    weights: torch.Tensor
    """(components,), float64: what a squared error of its numbers costs in the delta."""


def _smallest(
    factors: Factors | Dense, shape: tuple[int, ...], tolerance: float
) -> Factors | Dense:
    """The factors in the fewest bytes; as they are where that is fewest."""
    dense = isinstance(factors, Dense)
    vectors = vectors_of(shape, dense=dense)
    components = _of_dense(factors) if isinstance(factors, Dense) else _of_pair(factors)
    total = float(components.energies.sum())
    if total == 0.0:
        return factors
    grid = _Grid(components.values, vectors)
    errors = torch.stack(
        [components.energies]
        + [grid.quantised(w).errors * components.weights for w in range(1, MAX_WIDTH + 1)]
    )
    budget = tolerance**2 * total
    for _ in range(_ATTEMPTS):
        widths = _widths(errors, vectors, budget)
        if widths is None or vectors.nbytes(_kept(widths)) >= factors.nbytes:
            return factors
        found = from_quantised(factors.scale, grid.packed(widths), shape, dense=dense)
        error = relative_error(factors, found)
        if error <= tolerance:
            assert found.quantised is not None
            return replace(found, quantised=replace(found.quantised, error=error))
        budget *= 0.999 * (tolerance / error) ** 2
    return factors


def _of_pair(factors: Factors) -> _Components:
    up, down = _matrix(factors.up), _matrix(factors.down)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    u, sigma, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = sigma.sqrt()
    values = torch.cat([(right @ v.T * root).T, (left @ u * root).T], 1)
    return _Components(values.float(), sigma.square(), sigma)


def _of_dense(factors: Dense) -> _Components:
    values = factors.delta.double().reshape(1, -1)
    return _Components(values.float(), values.square().sum(1), values.new_ones(1))


@dataclass(frozen=True)
class _Numbers:
    """Vectors of one width, in blocks."""

    odds: torch.Tensor
    """(vectors, blocks, BLOCK), float32: odd whole numbers."""
    scales: torch.Tensor
    """(vectors, blocks), bfloat16."""
    errors: torch.Tensor
    """(vectors,), float64: squared errors of all numbers."""


class _Grid:
    """Vectors laid out in blocks, the last of each part padded."""

    def __init__(self, values: torch.Tensor, vectors: Vectors) -> None:
        self._vectors = vectors
        block = vectors.block_of()
        within = torch.cat([torch.arange(part) % BLOCK for part in vectors.parts])
        self._places = block * BLOCK + within
        size = vectors.blocks * BLOCK
        self._blocks = self._laid_out(values, size)
        self._real = self._laid_out(torch.ones(1, vectors.length), size)
        self._largest = self._blocks.abs().amax(2)
        self._known: dict[int, _Numbers] = {}

    def quantised(self, width: int) -> _Numbers:
        """All vectors in numbers of ``width`` bits."""
        if width not in self._known:
            ends = _ENDS if width <= _FEW_BITS else _ENDS[:1]
            self._known[width] = self._best([self._up_to(end, width) for end in ends])
        return self._known[width]

    def packed(self, widths: list[int]) -> Quantised:
        """Each vector in its width, the widest first; those of width 0 left out. Its error is not
        known yet."""
        order = sorted((j for j, w in enumerate(widths) if w), key=lambda j: -widths[j])
        chosen = [self.quantised(widths[j]) for j in order]
        odds = torch.stack([n.odds[j] for n, j in zip(chosen, order, strict=True)])
        scales = torch.stack([n.scales[j] for n, j in zip(chosen, order, strict=True)])
        kept = [widths[j] for j in order]
        numbers = odds.flatten(1)[:, self._places].to(torch.int32)
        return Quantised(tuple(kept), pack(numbers, scales, kept, self._vectors), 0.0)

    def _laid_out(self, values: torch.Tensor, size: int) -> torch.Tensor:
        found = values.new_zeros(len(values), size)
        found[:, self._places] = values
        return found.reshape(len(values), -1, BLOCK)

    def _up_to(self, end: float, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Odd numbers, scales, and each block's squared error, with a range up to ``end``."""
        top = 2**width - 1
        scales = (self._largest * (end / top)).bfloat16()
        step = scales.float().unsqueeze(2)
        odds = (self._blocks / (2 * step)).floor_().mul_(2).add_(1).nan_to_num_(1.0)
        odds.clamp_(-top, top)
        lost = (odds * step).sub_(self._blocks).mul_(self._real).square_().sum(2)
        return odds, scales, lost

    def _best(self, candidates: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> _Numbers:
        odds, scales, lost = candidates[0]
        for other, others, less in candidates[1:]:
            better = less < lost
            odds = torch.where(better.unsqueeze(2), other, odds)
            scales = torch.where(better, others, scales)
            lost = torch.where(better, less, lost)
        return _Numbers(odds, scales, lost.double().sum(1))


def _widths(errors: torch.Tensor, vectors: Vectors, budget: float) -> list[int] | None:
    """The width of each component, 0 to leave it out; None where no widths stay within ``budget``.

    Args:
        errors: (1 + MAX_WIDTH, components): squared error of each at each width.
    """
    if float(errors.min(0).values.sum()) > budget:
        return None
    sizes = torch.tensor([0.0] + [vectors.nbytes([w]) for w in range(1, MAX_WIDTH + 1)])
    costs = sizes.double().unsqueeze(1)
    low, high = -80.0, 80.0  # exponents of the price of a byte, relative to the budget
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = (errors + 2.0**middle * budget * costs).argmin(0)
        if float(errors.gather(0, chosen.unsqueeze(0)).sum()) > budget:
            high = middle
        else:
            low = middle
    found: list[int] = (errors + 2.0**low * budget * costs).argmin(0).tolist()
    return found


def _kept(widths: list[int]) -> list[int]:
    return sorted((width for width in widths if width), reverse=True)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().flatten(1)


def _energy(up: torch.Tensor, down: torch.Tensor) -> float:
    """Squared Frobenius norm of up @ down."""
    return float(((up.T @ up) * (down @ down.T)).sum())
