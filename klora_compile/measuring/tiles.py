"""One layer on one thread of a CPU, tile by tile; a delta is never held whole.

Tiles of rows are multiplied in float32, their rows summed in float64 and the row sums joined
exactly by ``math.fsum``. The K largest values are found by a threshold that a sample of the delta
gives, carried from tile to tile, and summed exactly. Comparing and picking is numpy's part, which
does both several times as fast as torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from klora_compile.measuring.magnitudes import Flags, Largest, Statistics, sums_of_largest
from klora_runtime.artifact.delta import Delta, Dense, LowRank

#: Float32 values of a tile: 1 MiB, which stays in the cache.
TILE_ELEMENTS = 2**18

#: Rows and columns, at most, of the sample from which a threshold is guessed.
_SAMPLE_SIDE = 128
#: Where a guess was too high, the next one is a value that this many times as many exceed.
_NEXT_GUESS = 8


class Scratch:
    """Memory for the tile at hand, kept from layer to layer: new memory costs as much as sums."""

    def __init__(self) -> None:
        self._size = 0

    def tile(self, rows: int, columns: int) -> torch.Tensor:
        """Float32 values, undefined."""
        if rows * columns > self._size:
            self._size = rows * columns
            self._single = torch.empty(self._size)
            self._double = torch.empty(self._size, dtype=torch.float64)
            self._flags = np.empty(self._size, np.bool_)
        return self._single[: rows * columns].view(rows, columns)

    def row_sums(self, tile: torch.Tensor) -> torch.Tensor:
        """Of the values of a tile, in float64."""
        return self._double[: tile.numel()].view(tile.shape).copy_(tile).sum(dim=1)

    def flags(self, tile: torch.Tensor) -> Flags:
        """One for each value of a tile."""
        return self._flags[: tile.numel()]


def measure_layer(delta: Delta, ks: Sequence[int], scratch: Scratch) -> Statistics:
    """Measure one layer.

    Args:
        delta: its delta, on the CPU.
        ks: every K to sum for, each in 1..numel.
        scratch: of this thread.

    Returns:
        Its statistics; where a product overflows float32, only an L1 norm that is not finite.
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
        """Return some of them."""
        ...

    def tiles(self, scratch: Scratch) -> Iterator[torch.Tensor]:
        """Return all of them in blocks of rows, each in the memory of the one before."""
        ...


class _Product:
    """Of factors."""

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
    """Of a dense delta, which stays where it is until a block of it is looked at."""

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
    """Values that a few more than ``k`` of the magnitudes exceed, from a sample; each is lower.

    One that is too high costs a second pass, one that is too low work; the result is the same.
    The last one is 0, above which is all that counts.
    """
    rows, columns = magnitudes.shape
    every = [-(-size // _SAMPLE_SIDE) for size in magnitudes.shape]
    sample = magnitudes.sample(every[0], every[1]).reshape(-1)
    expected = k * len(sample) / (rows * columns)
    # More than by chance: rows and columns differ in size, so that what is large lies together.
    wanted = math.ceil(1.25 * expected + 4 * math.sqrt(expected) + 4)
    while wanted < len(sample):
        yield float(sample.topk(wanted).values[-1])
        wanted *= _NEXT_GUESS
    yield 0.0
