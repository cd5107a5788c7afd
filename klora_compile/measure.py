"""What one LoRA's layers weigh: L1 norm and exact Top-K sums of |delta|.

These are the only heavy numbers of K-LoRA (arXiv 2502.18461, eq. 1-5 and 8-9), and each belongs
to one LoRA: of the partner only K is needed. The network's scaling alpha / rank multiplies them
afterwards, because |s * x| = |s| * |x|; so one measurement serves every partner and either
reading of alpha.

A delta is never held whole. Tiles of rows are multiplied in float32 (without TF32), their rows
summed in float64 and the row sums joined exactly by ``math.fsum``. The K largest values are found
by a threshold that a sample of the delta gives, carried from tile to tile, and summed exactly.
Extra memory per worker, measured: up to 16 tiles of :data:`TILE_ELEMENTS` float32 values (16 MiB
on a CPU) plus 60 bytes for each of the K values, whatever the size of the layer. There are as many
workers as torch has threads, at most 16.

On a CPU each layer is computed by one thread and the threads share out the layers: a library
that splits one product among threads may round differently for another number of threads, this
way every bit is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from klora_compile.reading.deltas import Delta, Dense, LowRank
from klora_compile.reading.layers import Layer
from klora_runtime.errors import ConfigError, LoraError, shown
from klora_runtime.precision import full_float32

#: Moves when the same layer would be measured to other numbers.
MEASURE_VERSION = 1

TILE_ELEMENTS = 2**18
_CUDA_TILE_ELEMENTS = 2**24
_MAX_WORKERS = 16
_SUM_BLOCK = 2**16

#: Rows and columns, at most, of the sample from which a threshold is guessed.
_SAMPLE_SIDE = 128
#: Values that are compared with the threshold at once.
_BLOCK = 64
#: How many times K values may wait before the smaller ones are dropped.
_SLACK = 4

#: Called after each layer with its name, how many are done, and how many there are.
OnLayer = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Statistics:
    """Magnitudes of one layer's delta, without its scaling."""

    l1: float
    """Sum of all absolute values (float64)."""
    top_k: Mapping[int, float]
    """K -> sum of the K largest absolute values (float64, exact for the float32 products)."""
    frobenius: float
    """Square root of the sum of all squares."""


def measure(
    layers: Sequence[Layer],
    ks: Mapping[str, Sequence[int]],
    *,
    device: torch.device,
    on_layer: OnLayer | None = None,
) -> dict[str, Statistics]:
    """Measure layers of one LoRA.

    Args:
        layers: the layers.
        ks: layer name -> every K to sum for, each in 1..numel; none where absent.
        device: where to compute. Decisions do not depend on it, sums may differ by 1e-7.
        on_layer: see :data:`OnLayer`.

    Returns:
        Layer name -> statistics, in the order of ``layers``. On one type of device the bits
        depend on nothing else: not on the number of threads, not on the other layers.

    Raises:
        LoraError: a product overflows float32.
    """
    results: dict[str, Statistics] = {}
    with full_float32(), torch.inference_mode(), _workers(device) as run:
        tasks = [(layer, tuple(ks.get(layer.name, ()))) for layer in layers]
        for layer, statistics in zip(
            layers, run(lambda task: _measure_layer(*task, device), tasks), strict=True
        ):
            if not math.isfinite(statistics.l1):
                raise LoraError(f"{shown(layer.name)}: its delta overflows float32.")
            results[layer.name] = statistics
            if on_layer is not None:
                on_layer(layer.name, len(results), len(layers))
    return results


def resolve_device(name: str) -> torch.device:
    """``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda`` or ``cuda:N`` as a device.

    Raises:
        ConfigError: another name, or a GPU that is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda:0" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _device_error(name, "not a device") from error
    if device.type not in ("cpu", "cuda"):
        raise _device_error(name, "not supported")
    if device.type == "cuda":
        count = torch.cuda.device_count() if available else 0
        index = device.index or 0
        if index >= count:
            raise _device_error(name, f"torch sees {count} CUDA devices")
        return torch.device("cuda", index)
    return torch.device("cpu")


def _device_error(name: str, why: str) -> ConfigError:
    return ConfigError(f"device {shown(name)}: {why}; expected auto, cpu, cuda or cuda:N.")


_Task = tuple[Layer, tuple[int, ...]]
_Run = Callable[[Callable[[_Task], Statistics], list[_Task]], Iterator[Statistics]]


@contextmanager
def _workers(device: torch.device) -> Iterator[_Run]:
    """A parallel ``map`` over layers on a CPU; a plain one on a GPU, which is parallel itself."""
    if device.type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for the workers, which inherit it
    pool = ThreadPoolExecutor(min(threads, _MAX_WORKERS), thread_name_prefix="klora-measure")
    try:
        yield lambda work, tasks: pool.map(_in_inference_mode(work), tasks)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _in_inference_mode(work: Callable[[_Task], Statistics]) -> Callable[[_Task], Statistics]:
    def run(task: _Task) -> Statistics:
        with torch.inference_mode():  # a thread-local setting
            return work(task)

    return run


def _measure_layer(layer: Layer, ks: tuple[int, ...], device: torch.device) -> Statistics:
    magnitudes = _magnitudes(layer.delta, device)
    k = max(ks, default=0)
    row_sums: list[float] = []
    largest = _Largest(k, _guess(magnitudes, k))
    for tile in magnitudes.tiles():
        row_sums.extend(tile.sum(dim=1, dtype=torch.float64).tolist())
        largest.add(tile)
    l1 = math.fsum(row_sums)
    if not math.isfinite(l1):
        return Statistics(l1, {}, math.inf)  # refused by the caller
    if not largest.complete:  # the guess was too high
        largest = _Largest(k, -1.0)
        for tile in magnitudes.tiles():
            largest.add(tile)
    return Statistics(l1, largest.sums(ks), layer.delta.norm())


class _Magnitudes(Protocol):
    """The absolute values of a delta as a matrix, on a device."""

    shape: tuple[int, int]

    def sample(self, every_row: int, every_column: int) -> torch.Tensor:
        """Some of them."""
        ...

    def tiles(self) -> Iterator[torch.Tensor]:
        """All of them in blocks of rows, float32, each in the memory of the one before."""
        ...


def _magnitudes(delta: Delta, device: torch.device) -> _Magnitudes:
    return _Product(delta, device) if isinstance(delta, LowRank) else _Matrix(delta, device)


class _Product:
    """Of factors."""

    def __init__(self, delta: LowRank, device: torch.device) -> None:
        self._up = delta.up.to(device, torch.float32, copy=True).flatten(1)
        self._down = delta.down.to(device, torch.float32, copy=True).flatten(1)
        self.shape = (self._up.shape[0], self._down.shape[1])

    def sample(self, every_row: int, every_column: int) -> torch.Tensor:
        return (self._up[::every_row] @ self._down[:, ::every_column]).abs_()

    def tiles(self) -> Iterator[torch.Tensor]:
        rows = _tile_rows(self.shape, self._up.device)
        buffer = self._up.new_empty(min(rows, self.shape[0]), self.shape[1])
        for start in range(0, self.shape[0], rows):
            some = self._up[start : start + rows]
            yield torch.mm(some, self._down, out=buffer[: len(some)]).abs_()


class _Matrix:
    """Of a dense delta, which stays where it is until a block of it is looked at."""

    def __init__(self, delta: Dense, device: torch.device) -> None:
        self._values = delta.values.reshape(len(delta.values), -1)
        self._device = device
        self.shape = (self._values.shape[0], self._values.shape[1])

    def sample(self, every_row: int, every_column: int) -> torch.Tensor:
        return self._values[::every_row, ::every_column].to(self._device, torch.float32).abs()

    def tiles(self) -> Iterator[torch.Tensor]:
        rows = _tile_rows(self.shape, self._device)
        for start in range(0, self.shape[0], rows):
            yield self._values[start : start + rows].to(self._device, torch.float32).abs()


def _tile_rows(shape: tuple[int, int], device: torch.device) -> int:
    elements = TILE_ELEMENTS if device.type == "cpu" else _CUDA_TILE_ELEMENTS
    return max(1, elements // shape[1])


def _guess(magnitudes: _Magnitudes, k: int) -> float:
    """A value that a few more than ``k`` of the magnitudes exceed, from a sample.

    A higher one costs a second pass, a lower one work; the result is the same.
    """
    rows, columns = magnitudes.shape
    sample = magnitudes.sample(-(-rows // _SAMPLE_SIDE), -(-columns // _SAMPLE_SIDE)).reshape(-1)
    expected = k * len(sample) / (rows * columns)
    wanted = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    if k == 0 or wanted >= len(sample):
        return -1.0
    return float(sample.topk(wanted).values[-1])


class _Largest:
    """The K largest of all values seen, exactly.

    Args:
        k: how many.
        threshold: values up to this are passed over; it rises as larger ones are found.
    """

    def __init__(self, k: int, threshold: float) -> None:
        self._k = k
        self._threshold = threshold
        self._values: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether no value that was passed over can be one of the K largest."""
        return self._k == 0 or (self._values is not None and len(self._values) >= self._k)

    def add(self, tile: torch.Tensor) -> None:
        if self._k == 0:
            return
        found = _above(tile.reshape(-1), self._threshold)
        self._values = found if self._values is None else torch.cat([self._values, found])
        if len(self._values) > _SLACK * self._k:
            self._keep_largest()

    def _keep_largest(self) -> None:
        assert self._values is not None
        self._values = self._values.topk(self._k).values
        self._threshold = float(self._values[-1])  # others cannot change the sum

    def sums(self, ks: tuple[int, ...]) -> dict[int, float]:
        """K -> exact sum of the K largest."""
        if not ks:
            return {}
        assert self._values is not None
        largest = self._values.topk(self._k).values
        return {k: math.fsum(_numbers(largest[:k])) for k in ks}


def _above(values: torch.Tensor, threshold: float) -> torch.Tensor:
    """The values above a threshold: blocks first, for few blocks have any."""
    whole = len(values) // _BLOCK * _BLOCK
    blocks = values[:whole].view(-1, _BLOCK)
    hits = (blocks.amax(dim=1) > threshold).nonzero().squeeze(1) if whole else blocks[:0, 0].long()
    if 2 * len(hits) > len(blocks):
        return values[values > threshold]
    near = torch.cat([blocks[hits].reshape(-1), values[whole:]])
    return near[near > threshold]


def _numbers(values: torch.Tensor) -> Iterator[float]:
    for start in range(0, len(values), _SUM_BLOCK):
        yield from values[start : start + _SUM_BLOCK].tolist()
