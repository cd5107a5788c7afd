"""Frobenius norms and inner products of deltas, from rank x rank products."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import combinations

from klora_compile.measuring.statistics import OnLayer
from klora_compile.reading.layers import Layer
from klora_compile.threads import single_thread
from klora_runtime.errors import LoraError, shown

#: Two slots, in the order of the LoRAs.
Pair = tuple[str, str]


def frobenius_norms(
    layers: Collection[Layer], *, on_layer: OnLayer | None = None
) -> dict[str, float]:
    """Return layer name -> Frobenius norm of its delta, without its scaling.

    Args:
        layers: layers of one LoRA.
        on_layer: see :data:`~klora_compile.measuring.statistics.OnLayer`.

    Raises:
        LoraError: a norm overflows float64.
    """
    norms: dict[str, float] = {}
    if not layers:
        return norms
    with single_thread():
        for layer in layers:
            norms[layer.name] = layer.delta.norm()
            if not math.isfinite(norms[layer.name]):
                raise LoraError(f"{shown(layer.name)}: its delta overflows float64.")
            if on_layer is not None:
                on_layer(layer.name, len(norms), len(layers))
    return norms


def inner_products(layers: Mapping[str, Mapping[str, Layer]]) -> dict[str, dict[Pair, float]]:
    """Return layer name -> two slots -> Frobenius inner product of deltas, without their scalings.

    Args:
        layers: slot -> layer name -> layer; layers of one name have one shape.
    """
    found: dict[str, dict[Pair, float]] = {}
    with single_thread():
        for (one, mine), (other, yours) in combinations(layers.items(), 2):
            for name in mine.keys() & yours.keys():
                product = mine[name].delta.inner(yours[name].delta)
                found.setdefault(name, {})[one, other] = product
    return found
