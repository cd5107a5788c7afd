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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from klora_compile.measuring.batches import measure_batches
from klora_compile.measuring.magnitudes import Statistics
from klora_compile.measuring.tiles import Scratch, measure_layer
from klora_compile.reading.layers import Layer
from klora_runtime.errors import ConfigError, LoraError, shown
from klora_runtime.precision import full_float32

__all__ = ["MEASURE_VERSION", "OnLayer", "Statistics", "measure", "resolve_device"]

#: Moves when the same layer would be measured to other numbers.
MEASURE_VERSION = 1

_MAX_WORKERS = 16

#: Called after each layer with its name, how many are done, and how many there are.
OnLayer = Callable[[str, int, int], None]


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
    wanted = {layer.name: tuple(ks.get(layer.name, ())) for layer in layers}
    run = _tile_by_tile if device.type == "cpu" else _shape_by_shape
    results: dict[str, Statistics] = {}
    with full_float32(), torch.inference_mode():
        for layer, statistics in run(layers, wanted, device):
            if not math.isfinite(statistics.l1):
                raise LoraError(f"{shown(layer.name)}: its delta overflows float32.")
            results[layer.name] = statistics
            if on_layer is not None:
                on_layer(layer.name, len(results), len(layers))
    return {layer.name: results[layer.name] for layer in layers}


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


_Ks = Mapping[str, tuple[int, ...]]


def _tile_by_tile(
    layers: Sequence[Layer], ks: _Ks, _: torch.device
) -> Iterator[tuple[Layer, Statistics]]:
    scratches: dict[int, Scratch] = defaultdict(Scratch)

    def work(layer: Layer) -> Statistics:
        with torch.inference_mode():  # a thread's own setting
            return measure_layer(layer.delta, ks[layer.name], scratches[threading.get_ident()])

    with _workers() as pool:
        yield from zip(layers, pool.map(work, layers), strict=True)


def _shape_by_shape(
    layers: Sequence[Layer], ks: _Ks, device: torch.device
) -> Iterator[tuple[Layer, Statistics]]:
    tasks = [(layer.delta, ks[layer.name]) for layer in layers]
    for index, statistics in measure_batches(tasks, device):
        yield layers[index], statistics


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
