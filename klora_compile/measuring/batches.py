"""Measurement in batches of layers of one shape, for GPUs, on which one layer is too little work.

Layers are stacked, multiplied by one batched product and measured together, without a wait for the
host: the K largest values are in the K blocks with the largest maxima, so their number and place
are known beforehand. Layers arrive one by one, for example from a file that is being read; a batch
starts when it is full. While the device computes, the host gathers the next batch (`courier`). The
results come back in one transfer per batch, after the next batch was started.

All batches of a shape have the same size, the last one padded, so the bits of a layer do not depend
on the other layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from klora_compile.measuring.courier import Courier
from klora_compile.measuring.magnitudes import sums_of_largest
from klora_compile.measuring.statistics import Statistics
from klora_runtime.artifact.delta import Delta, LowRank, inner_products

#: Float32 values in a batch of deltas, or in a part of a larger delta: 128 MiB. Including factors
#: and picked values, a device holds less than three times as much (see tests/pipeline/test_gpu.py).
ELEMENTS = 2**25

#: Greatest number of layers in a batch; padding of a partly filled batch is wasted work.
_MOST = 64

#: A delta, and every K of its Top-K sums.
Task = tuple[Delta, tuple[int, ...]]


def measure_batches(
    tasks: Iterable[Task], device: torch.device, elements: int = ELEMENTS
) -> Iterator[tuple[int, Statistics]]:
    """Measure many layers.

    Args:
        tasks: deltas on the CPU, and every K, each in 1..numel.
        device: where to compute. A CPU is slow and gives the same within rounding, for tests.
        elements: see :data:`ELEMENTS`.

    Yields:
        Index in ``tasks`` and statistics, batch by batch. The L1 norm is not finite if a product
        overflows float32.
    """
    courier = Courier(device)
    running: _Batch | None = None
    for batch in _batches(tasks, elements):
        batch.start(courier)
        if running is not None:
            yield from running.results()
        running = batch
    if running is not None:
        yield from running.results()


def _batches(tasks: Iterable[Task], elements: int) -> Iterator[_Batch]:
    """Yield batches as they become full, then the partly filled ones."""
    alike: dict[object, dict[int, Task]] = defaultdict(dict)
    for place, (delta, ks) in enumerate(tasks):
        form = [(matrix.shape, matrix.dtype) for matrix in _matrices(delta)]
        group = (*form, max(ks, default=0))
        alike[group][place] = delta, ks
        if len(alike[group]) == _size(delta, elements):
            yield _Batch(alike.pop(group), _size(delta, elements), elements)
    for some in alike.values():
        yield _Batch(some, _size(next(iter(some.values()))[0], elements), elements)


def _size(delta: Delta, elements: int) -> int:
    """Return the number of layers like this one in a batch."""
    matrices = _matrices(delta)
    largest = max(matrices[0].shape[0] * matrices[-1].shape[1], *(m.numel() for m in matrices))
    return min(max(1, elements // largest), _MOST)


def _matrices(delta: Delta) -> tuple[torch.Tensor, ...]:
    """Return the matrices whose product is the delta: (up, down), or the delta itself."""
    return delta.flattened().tensors[::-1]


class _Batch:
    """A batch of layers of one shape.

    Args:
        tasks: index -> task.
        size: size of the batch; if there are fewer tasks, the last one is repeated.
        elements: greatest number of delta values in memory at once.
    """

    def __init__(self, tasks: Mapping[int, Task], size: int, elements: int) -> None:
        self._tasks = tasks
        self._size = size
        self._elements = elements

    def start(self, courier: Courier) -> None:
        """Start the computation."""
        deltas = [delta for delta, _ in self._tasks.values()]
        matrices = [
            _padded(courier.bring(some), self._size).float()
            for some in zip(*map(_matrices, deltas), strict=True)
        ]
        self._rows, columns = matrices[0].shape[1], matrices[-1].shape[2]
        k = max(next(iter(self._tasks.values()))[1], default=0)
        row_sums = []
        largest = matrices[0].new_empty(self._size, 0)
        step = max(1, self._elements // (self._size * columns))
        for start in range(0, self._rows, step):
            tile = _product(matrices, slice(start, start + step)).abs_()
            row_sums.append(tile.sum(dim=2, dtype=torch.float64))
            largest = _largest(torch.cat([largest, _largest(tile.flatten(1), k)], dim=1), k)
        found = [*row_sums, _norms(matrices).unsqueeze(1), largest.double()]
        self._parcel = courier.take(torch.cat(found, dim=1))

    def results(self) -> Iterator[tuple[int, Statistics]]:
        """Yield index and statistics of every layer, once they have arrived."""
        for (place, (_, ks)), numbers in zip(
            self._tasks.items(), self._parcel.opened(), strict=False
        ):
            row_sums, norm, largest = numbers.split([self._rows, 1, len(numbers) - self._rows - 1])
            l1 = math.fsum(row_sums.tolist())
            sums = sums_of_largest(largest.float().numpy(), ks) if math.isfinite(l1) else {}
            yield place, Statistics(l1, sums, float(norm))


def _padded(stacked: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - len(stacked)
    return torch.cat([stacked, stacked[-1:].expand(missing, -1, -1)]) if missing else stacked


def _product(matrices: Sequence[torch.Tensor], rows: slice) -> torch.Tensor:
    """Return some rows of the deltas, in new memory."""
    if len(matrices) == 1:
        return matrices[0][:, rows].clone()
    up, down = matrices
    return torch.bmm(up[:, rows], down)


def _norms(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return Frobenius norms; for products from the small matrices up^T up and down down^T."""
    if len(matrices) == 1:
        norms: torch.Tensor = torch.linalg.vector_norm(matrices[0], dim=(1, 2), dtype=torch.float64)
        return norms
    up, down = (matrix.double() for matrix in matrices)
    stack = LowRank(down, up)
    return inner_products(stack, stack).clamp_min(0.0).sqrt()


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ``k`` largest values of each row in any order; all if a row has no more.

    They are in the ``k`` blocks with the largest maxima: a value in another block is not larger
    than these ``k`` maxima.
    """
    count = values.shape[1]
    if k == 0 or count <= k:
        return values[:, :k]
    block = 2 ** (math.isqrt(count // k).bit_length() - 1)  # about as many as values in k blocks
    whole = count // block * block
    blocks = values[:, :whole].reshape(len(values), -1, block)
    chosen = blocks.amax(dim=2).topk(k, sorted=False).indices
    near = blocks.gather(1, chosen.unsqueeze(2).expand(-1, -1, block)).flatten(1)
    return torch.cat([near, values[:, whole:]], dim=1).topk(k, sorted=False).values
