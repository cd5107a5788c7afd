"""Measuring a LoRA once: its statistics are looked up in a store before anything is measured.

They depend on the partner through K only. So the store keeps, for each layer, the sums for K = rank
times 1, 2, 4, … 256, which suit partners of usual ranks, and those that were asked for before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from klora_compile.measuring.statistics import MEASURE_VERSION, OnLayer, Statistics
from klora_compile.profiles.store import Store
from klora_compile.reading.layers import Layer
from klora_runtime.artifact.tensor_file import identity
from klora_runtime.errors import KloraError
from klora_runtime.lazy_torch import torch

#: K = a layer's rank times each of these is also measured and kept.
PARTNERS = tuple(2**i for i in range(9))


def measure_once(
    layers: Collection[Layer],
    ks: Mapping[str, Sequence[int]],
    *,
    device: str | torch.device,
    store: Store,
    on_layer: OnLayer | None = None,
) -> dict[str, Statistics]:
    """Do as :func:`~klora_compile.measuring.measure.measure`, but look into a store first.

    Args:
        layers: see there.
        ks: see there.
        device: see there; or the name of the host, which needs no torch if all layers are known.
        store: the store, which keeps what was measured. One that cannot be written is only read.
        on_layer: see there.
    """
    if not layers:
        return {}
    key = statistics_key(layers, device)
    known = store.statistics(key)
    if known is None or len(known) != len(layers):
        known = [Statistics(0.0, {}, 0.0)] * len(layers)
        missing = list(layers)
    else:
        missing = [
            layer
            for layer, own in zip(layers, known, strict=True)
            if not set(ks.get(layer.name, ())) <= own.top_k.keys()
        ]
    found = dict(zip((layer.name for layer in layers), known, strict=True))
    if missing:
        tasks = [(layer, _wanted(layer, ks.get(layer.name, ()))) for layer in missing]
        done = len(layers) - len(missing)
        for layer, statistics in measured(tasks, torch.device(device)):
            sums = {**found[layer.name].top_k, **statistics.top_k}
            found[layer.name] = Statistics(statistics.l1, sums, statistics.frobenius)
            done += 1
            if on_layer is not None:
                on_layer(layer.name, done, len(layers))
        with suppress(KloraError):  # not writable: the next run measures again
            store.keep_statistics(key, [found[layer.name] for layer in layers])
    elif on_layer is not None:
        on_layer(next(reversed(found)), len(layers), len(layers))
    return {
        name: Statistics(each.l1, {k: each.top_k[k] for k in ks.get(name, ())}, each.frobenius)
        for name, each in found.items()
    }


def measured(
    tasks: Iterable[tuple[Layer, tuple[int, ...]]], device: torch.device
) -> Iterator[tuple[Layer, Statistics]]:
    """See :func:`~klora_compile.measuring.measure.measured`, which is imported when it is used."""
    from klora_compile.measuring.measure import measured as yielded

    yield from yielded(tasks, device)


def statistics_key(layers: Iterable[Layer], device: str | torch.device) -> str:
    """Return a digest of all inputs of a measurement, in order.

    CPU and GPU differ in the last bits, so the type of the device is one of them.
    """
    found = hashlib.sha256(f"{MEASURE_VERSION}\n{kind_of(device)}".encode())
    for layer in layers:
        for part in layer.delta.parts:
            found.update(f"\ntorch.{identity(part)}".encode())
    return found.hexdigest()


def kind_of(device: str | torch.device) -> str:
    """Return the type of the device that measures."""
    if isinstance(device, str):
        return device
    from klora_runtime.devices.precision import home_of_float64

    return home_of_float64(device).type


def _wanted(layer: Layer, ks: Sequence[int]) -> tuple[int, ...]:
    kept = {layer.rank * times for times in PARTNERS}
    return tuple(sorted({*ks, *(k for k in kept if k <= layer.numel)}))
