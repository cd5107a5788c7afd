"""What one LoRA's layers weigh: L1 norm and exact Top-K sums of |delta|.

These are the only heavy numbers of K-LoRA (arXiv 2502.18461, eq. 1-5 and 8-9), and each belongs
to one LoRA: of the partner only K is needed. The network's scaling alpha / rank multiplies them
afterwards, because |s * x| = |s| * |x|; so one measurement serves every partner and either
reading of alpha.

Products are float32, without TF32. A delta is never held whole: on a CPU `tiles` goes
through a layer by tiles, on a GPU `batches` through layers of one shape together. Extra
memory, measured: on a CPU up to 16 times the :data:`~klora_compile.measuring.tiles.TILE_ELEMENTS`
float32 values of a tile (16 MiB) and 60 bytes for each of the K values, in each of as many workers
as torch has threads (at most 16); on a GPU see :data:`~klora_compile.measuring.batches.ELEMENTS`.
Neither grows with the layer.

On a CPU each layer is computed by one thread and the threads share out the layers: a library
that splits one product among threads may round differently for another number of threads, this
way every bit is the same.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from klora_compile.measuring.batches import measure_batches
from klora_compile.measuring.magnitudes import Statistics
from klora_compile.measuring.tiles import Scratch, measure_layer
from klora_compile.reading.deltas import Delta
from klora_compile.reading.layers import Layer
from klora_runtime.errors import ConfigError, LoraError, shown
from klora_runtime.layers.precision import full_float32

__all__ = ["MEASURE_VERSION", "OnLayer", "Statistics", "measure", "measured", "resolve_device"]

#: Moves when the same layer would be measured to other numbers.
MEASURE_VERSION = 1

_MAX_WORKERS = 16

#: Called after each layer with its name, how many are done, and how many there are.
OnLayer = Callable[[str, int, int], None]

#: A layer, and every K to sum for, each in 1..numel.
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
        layers: the layers; those that come first are measured while others arrive.
        ks: layer name -> every K to sum for, each in 1..numel; none where absent.
        device: where to compute. Decisions do not depend on it, sums may differ by 1e-7.
        on_layer: see :data:`OnLayer`.

    Returns:
        Layer name -> statistics, in the order of ``layers``. On one type of device the bits
        depend on nothing else: not on the number of threads, not on the other layers.

    Raises:
        LoraError: a product overflows float32.
    """
    tasks = ((layer, tuple(ks.get(layer.name, ()))) for layer in layers)
    results: dict[str, Statistics] = {}
    for layer, statistics in measured(tasks, device):
        results[layer.name] = statistics
        if on_layer is not None:
            on_layer(layer.name, len(results), len(layers))
    return {layer.name: results[layer.name] for layer in layers}


def measured(tasks: Iterable[Task], device: torch.device) -> Iterator[tuple[Layer, Statistics]]:
    """Each layer with its statistics, when it is done; see :func:`measure`."""
    run = _tile_by_tile if device.type == "cpu" else _shape_by_shape
    with full_float32(), torch.inference_mode():
        for layer, statistics in run(tasks, device):
            if not math.isfinite(statistics.l1):
                raise LoraError(f"{shown(layer.name)}: its delta overflows float32.")
            yield layer, statistics


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


def _tile_by_tile(tasks: Iterable[Task], _: torch.device) -> Iterator[tuple[Layer, Statistics]]:
    """In the order of the tasks."""
    scratches: dict[int, Scratch] = defaultdict(Scratch)

    def work(layer: Layer, ks: tuple[int, ...]) -> Statistics:
        with torch.inference_mode():  # a thread's own setting
            return measure_layer(layer.delta, ks, scratches[threading.get_ident()])

    running: deque[tuple[Layer, Future[Statistics]]] = deque()
    with _workers() as pool:
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


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that torch and the BLAS behind it do not split any further."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(
        min(threads, _MAX_WORKERS),
        thread_name_prefix="klora-measure",
        initializer=torch.set_num_threads,  # the BLAS' setting is a thread's own
        initargs=(1,),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
