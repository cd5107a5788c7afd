"""Frobenius norms from rank x rank products, for rules that need no Top-K sums."""

from __future__ import annotations

import math
from collections.abc import Collection

from klora_compile.measuring.statistics import OnLayer
from klora_compile.reading.layers import Layer
from klora_compile.threads import single_thread
from klora_runtime.errors import LoraError, shown


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
