"""Measurement of one LoRA's layers: L1 norm and exact Top-K sums of |delta|.

These are the only expensive numbers of K-LoRA (arXiv 2502.18461, eq. 1-5 and 8-9). Each belongs to
one LoRA; the partner only determines K. The network's scaling alpha / rank is multiplied in
afterwards, because |s * x| = |s| * |x|; so one measurement serves every partner and both readings
of alpha.

Products are float32, without TF32. A delta is never held as a whole: on a CPU `tiles` measures a
layer by tiles, on a GPU `batches` measures layers of one shape together. Measured extra memory: on
a CPU up to 16 times the :data:`~klora_compile.measuring.tiles.TILE_ELEMENTS` float32 values of a
tile (16 MiB) and 60 bytes per K, for each worker (as many as torch has threads, at most 16); for a
GPU see :data:`~klora_compile.measuring.batches.ELEMENTS`. Neither grows with the layer.

On a CPU one thread computes each layer, and the threads share out the layers: a library that splits
a product among threads may round differently with another number of threads, but this way every
bit is the same.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future

import torch

from klora_compile.measuring.batches import measure_batches
from klora_compile.measuring.statistics import OnLayer, Statistics
from klora_compile.measuring.tiles import Scratch, measure_layer
from klora_compile.reading.layers import Layer
from klora_compile.threads import single_threads
from klora_runtime.artifact.delta import Delta
from klora_runtime.devices.device_types import type_of
from klora_runtime.devices.precision import full_float32, home_of_float64
from klora_runtime.errors import ConfigError, LoraError, shown

_MAX_WORKERS = 16

#: A layer, and every K of its Top-K sums, each in 1..numel.
Task = tuple[Layer, tuple[int, ...]]


def measure(
    layers: Collection[Layer],
    ks: Mapping[str, Sequence[int]],
    *,
    device: torch.device,
    on_layer: OnLayer | None = None,
) -> dict[str, Statistics]:
    """Measure layers of one LoRA.

    Args:
        layers: the layers.
        ks: layer name -> every K to sum for, each in 1..numel; a missing layer has none.
        device: where to compute; a device without float64 is replaced by the CPU. Decisions do not
            depend on the device; sums may differ by 1e-7.
        on_layer: see :data:`OnLayer`.

    Returns:
        Layer name -> statistics, in the order of ``layers``. On one type of device the bits do not
        depend on the number of threads or on the other layers.

    Raises:
        LoraError: a product overflows float32.
        ConfigError: torch lacks an operation on the device.
    """
    tasks = ((layer, tuple(ks.get(layer.name, ()))) for layer in layers)
    results: dict[str, Statistics] = {}
    for layer, statistics in measured(tasks, device):
        results[layer.name] = statistics
        if on_layer is not None:
            on_layer(layer.name, len(results), len(layers))
    return {layer.name: results[layer.name] for layer in layers}


def measured(tasks: Iterable[Task], device: torch.device) -> Iterator[tuple[Layer, Statistics]]:
    """Yield each layer with its statistics, once it is measured; see :func:`measure`."""
    place = home_of_float64(device)
    run = _tile_by_tile if type_of(place).is_host else _shape_by_shape
    with full_float32(), torch.inference_mode():
        try:
            for layer, statistics in run(tasks, place):
                if not math.isfinite(statistics.l1):
                    raise LoraError(f"{shown(layer.name)}: its delta overflows float32.")
                yield layer, statistics
        except NotImplementedError as error:
            raise ConfigError(
                f"device {place}: torch cannot measure there: {shown(error)}. Choose another "
                "device, such as cpu."
            ) from error


def _tile_by_tile(tasks: Iterable[Task], _: torch.device) -> Iterator[tuple[Layer, Statistics]]:
    """Measure layer by layer, in the order of the tasks."""
    scratches: dict[int, Scratch] = defaultdict(Scratch)

    def work(layer: Layer, ks: tuple[int, ...]) -> Statistics:
        with torch.inference_mode():  # this setting is per thread
            return measure_layer(layer.delta, ks, scratches[threading.get_ident()])

    running: deque[tuple[Layer, Future[Statistics]]] = deque()
    with single_threads("klora-measure", most=_MAX_WORKERS) as pool:
        for task in tasks:
            running.append((task[0], pool.submit(work, *task)))
            while running and running[0][1].done():
                layer, statistics = running.popleft()
                yield layer, statistics.result()
        for layer, statistics in running:
            yield layer, statistics.result()


def _shape_by_shape(
    tasks: Iterable[Task], device: torch.device
) -> Iterator[tuple[Layer, Statistics]]:
    layers: list[Layer] = []

    def deltas() -> Iterator[tuple[Delta, tuple[int, ...]]]:
        for layer, ks in tasks:
            layers.append(layer)
            yield layer.delta, ks

    for place, statistics in measure_batches(deltas(), device):
        yield layers[place], statistics
