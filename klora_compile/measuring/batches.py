"""Layers of one shape together, for devices on which one layer is too little work: GPUs.

Layers are stacked, multiplied by one batched product and looked at together, with nothing that the
host would have to wait for: the K largest values lie in the K blocks with the largest maxima, so
their number and place are known beforehand. Layers come one by one, from a file that is being read
for example; a batch starts when it is full. While the device computes it the host gathers the next
one (`courier`). What was found comes back in one transfer per batch, when the next batch has been
started.

Every batch of a shape has the same size, the last one padded, so that the bits of a layer do not
depend on which others are measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from klora_compile.measuring.courier import Courier
from klora_compile.measuring.magnitudes import Statistics, sums_of_largest
from klora_runtime.artifact.delta import Delta, LowRank, inner_products

#: Float32 values of a batch of deltas, or of the part of a larger one: 128 MiB. With factors and
#: what is picked a device holds less than three times that (`tests/pipeline/test_gpu.py` counts).
ELEMENTS = 2**25

#: Layers of a batch, at most: where they are few, the rest of it is computed for nothing.
_MOST = 64

#: A delta, and every K to sum for.
Task = tuple[Delta, tuple[int, ...]]


def measure_batches(
    tasks: Iterable[Task], device: torch.device, elements: int = ELEMENTS
) -> Iterator[tuple[int, Statistics]]:
    """Measure many layers.

    Args:
        tasks: their deltas on the CPU, and every K, each in 1..numel.
        device: where to compute. A CPU gives the same within rounding, slowly; tests do so.
        elements: see :data:`ELEMENTS`.

    Yields:
        Place in ``tasks`` and statistics, batch by batch. The L1 norm is not finite where a product
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
    """Batches as they become full, then those that do not."""
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
    """Return the layers like this one in a batch."""
    matrices = _matrices(delta)
    largest = max(matrices[0].shape[0] * matrices[-1].shape[1], *(m.numel() for m in matrices))
    return min(max(1, elements // largest), _MOST)


def _matrices(delta: Delta) -> tuple[torch.Tensor, ...]:
    """What a delta is the product of, from the left: up and down, or all of it."""
    return delta.flattened().tensors[::-1]


class _Batch:
    """Layers of one shape.

    Args:
        tasks: place -> task.
        size: of the batch; where the tasks are fewer, the last one is computed several times.
        elements: how many values of the deltas may be there at once.
    """

    def __init__(self, tasks: Mapping[int, Task], size: int, elements: int) -> None:
        self._tasks = tasks
        self._size = size
        self._elements = elements

    def start(self, courier: Courier) -> None:
        """Begin to compute."""
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
        """Place and statistics of every layer, when they have arrived."""
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
    """Return some rows of the deltas, in memory of their own."""
    if len(matrices) == 1:
        return matrices[0][:, rows].clone()
    up, down = matrices
    return torch.bmm(up[:, rows], down)


def _norms(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Frobenius norms; of products by the two small matrices up^T up and down down^T."""
    if len(matrices) == 1:
        norms: torch.Tensor = torch.linalg.vector_norm(matrices[0], dim=(1, 2), dtype=torch.float64)
        return norms
    up, down = (matrix.double() for matrix in matrices)
    stack = LowRank(down, up)
    return inner_products(stack, stack).clamp_min(0.0).sqrt()


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ``k`` largest of each row, in any order; all where a row has no more.

    They lie in the ``k`` blocks that have the largest maxima, wherever those are: a value outside
    is no larger than ``k`` others.
    """
    count = values.shape[1]
    if k == 0 or count <= k:
        return values[:, :k]
    block = 2 ** (math.isqrt(count // k).bit_length() - 1)  # about as many blocks as values in k
    whole = count // block * block
    blocks = values[:, :whole].reshape(len(values), -1, block)
    chosen = blocks.amax(dim=2).topk(k, sorted=False).indices
    near = blocks.gather(1, chosen.unsqueeze(2).expand(-1, -1, block)).flatten(1)
    return torch.cat([near, values[:, whole:]], dim=1).topk(k, sorted=False).values
