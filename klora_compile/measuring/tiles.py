"""Measurement of one layer on one CPU thread, tile by tile; a delta is never held as a whole.

Tiles of rows are multiplied in float32, their rows are summed in float64, and ``math.fsum`` adds
the row sums exactly. The K largest values are found with a threshold from a sample of the delta,
which is carried from tile to tile, and are summed exactly. numpy compares and picks values, several
times as fast as torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from klora_compile.measuring.magnitudes import Flags, Largest, sums_of_largest
from klora_compile.measuring.statistics import Statistics
from klora_runtime.artifact.delta import Delta, Dense, LowRank

#: Float32 values in a tile: 1 MiB, which stays in the cache.
TILE_ELEMENTS = 2**18

#: Greatest number of rows and of columns in the sample that gives the threshold.
_SAMPLE_SIDE = 128
#: After too high a guess, this many times as many values exceed the next one.
_NEXT_GUESS = 8


class Scratch:
    """Memory for one tile, reused for all layers: allocation would cost as much as the sums."""

    def __init__(self) -> None:
        self._size = 0

    def tile(self, rows: int, columns: int) -> torch.Tensor:
        """Return uninitialised float32 values."""
        if rows * columns > self._size:
            self._size = rows * columns
            self._single = torch.empty(self._size)
            self._double = torch.empty(self._size, dtype=torch.float64)
            self._flags = np.empty(self._size, np.bool_)
        return self._single[: rows * columns].view(rows, columns)

    def row_sums(self, tile: torch.Tensor) -> torch.Tensor:
        """Return the row sums of a tile in float64."""
        return self._double[: tile.numel()].view(tile.shape).copy_(tile).sum(dim=1)

    def flags(self, tile: torch.Tensor) -> Flags:
        """Return a mask of the size of a tile."""
        return self._flags[: tile.numel()]


def measure_layer(delta: Delta, ks: Sequence[int], scratch: Scratch) -> Statistics:
    """Measure one layer.

    Args:
        delta: the layer's delta, on the CPU.
        ks: every K to sum for, each in 1..numel.
        scratch: this thread's memory.

    Returns:
        The statistics; if a product overflows float32, just an L1 norm that is not finite.
    """
    magnitudes = _Product(delta) if isinstance(delta, LowRank) else _Matrix(delta)
    row_sums: list[float] = []
    guesses = _guesses(magnitudes, max(ks, default=0))
    largest = Largest(max(ks, default=0), next(guesses))
    for tile in magnitudes.tiles(scratch):
        row_sums.extend(scratch.row_sums(tile).tolist())
        largest.add(tile.reshape(-1).numpy(), scratch.flags(tile))
    l1 = math.fsum(row_sums)
    if not math.isfinite(l1):
        return Statistics(l1, {}, math.inf)
    while not largest.complete:
        largest = Largest(max(ks), next(guesses))
        for tile in magnitudes.tiles(scratch):
            largest.add(tile.reshape(-1).numpy(), scratch.flags(tile))
    return Statistics(l1, sums_of_largest(largest.values(), ks), delta.norm())


class _Magnitudes(Protocol):
    """The absolute values of a delta as a matrix."""

    shape: tuple[int, int]

    def sample(self, every_row: int, every_column: int) -> torch.Tensor:
        """Return every n-th value of every n-th row."""
        ...

    def tiles(self, scratch: Scratch) -> Iterator[torch.Tensor]:
        """Yield all values in blocks of rows, each in the memory of the previous one."""
        ...


class _Product:
    """The magnitudes of a low-rank delta."""

    def __init__(self, delta: LowRank) -> None:
        self._up = delta.up.to(torch.float32, copy=True).flatten(1)
        self._down = delta.down.to(torch.float32, copy=True).flatten(1)
        self.shape = (self._up.shape[0], self._down.shape[1])

    def sample(self, every_row: int, every_column: int) -> torch.Tensor:
        return (self._up[::every_row] @ self._down[:, ::every_column]).abs_()

    def tiles(self, scratch: Scratch) -> Iterator[torch.Tensor]:
        rows = _tile_rows(self.shape)
        for start in range(0, self.shape[0], rows):
            some = self._up[start : start + rows]
            yield torch.mm(some, self._down, out=scratch.tile(len(some), self.shape[1])).abs_()


class _Matrix:
    """The magnitudes of a dense delta; a block is copied only when it is measured."""

    def __init__(self, delta: Dense) -> None:
        self._values = delta.flattened().values
        self.shape = (self._values.shape[0], self._values.shape[1])

    def sample(self, every_row: int, every_column: int) -> torch.Tensor:
        return self._values[::every_row, ::every_column].to(torch.float32).abs()

    def tiles(self, scratch: Scratch) -> Iterator[torch.Tensor]:
        rows = _tile_rows(self.shape)
        for start in range(0, self.shape[0], rows):
            some = self._values[start : start + rows]
            yield scratch.tile(len(some), self.shape[1]).copy_(some).abs_()


def _tile_rows(shape: tuple[int, int]) -> int:
    return max(1, TILE_ELEMENTS // shape[1])


def _guesses(magnitudes: _Magnitudes, k: int) -> Iterator[float]:
    """Yield descending thresholds, from a sample, that slightly more than ``k`` values exceed.

    A threshold that is too high costs a second pass, one that is too low costs work; the result is
    the same. The last one is 0.
    """
    rows, columns = magnitudes.shape
    every = [-(-size // _SAMPLE_SIDE) for size in magnitudes.shape]
    sample = magnitudes.sample(every[0], every[1]).reshape(-1)
    expected = k * len(sample) / (rows * columns)
    # More margin than for random values: rows and columns differ in size, so large values cluster.
    wanted = math.ceil(1.25 * expected + 4 * math.sqrt(expected) + 4)
    while wanted < len(sample):
        yield float(sample.topk(wanted).values[-1])
        wanted *= _NEXT_GUESS
    yield 0.0
