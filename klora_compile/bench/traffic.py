"""What a branch must move through memory, however it is computed: the floor of its cost.

Each call of a branched layer reads its input once more for the first thin product, reads the
layer's output and writes the sum, and reads the factors. On a GPU, where a layer's activations do
not stay in the cache, no kernel that leaves the base's own product alone can be faster than
these bytes through the memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from klora_compile.bench.timing import seconds_of
from klora_runtime.modes.leaf import is_branched

#: Bytes that are copied to measure a memory's speed: more than any cache holds.
_COPY_BYTES = 2**28
_COPIES = 7


def branch_bytes(model: nn.Module, sample: Callable[[], object]) -> int:
    """Bytes that the branches of a model move while ``sample`` runs.

    Args:
        model: a denoiser with branched layers, not compiled.
    """
    total = 0

    def count(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        factors = module._klora_down.nbytes + module._klora_up.nbytes
        total += inputs[0].nbytes + 2 * output.nbytes + factors

    branched = [module for module in model.modules() if is_branched(module)]
    hooks = [module.register_forward_hook(count) for module in branched]
    try:
        sample()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that a device's memory reads and writes, by a large copy."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(_COPIES)]
    return 2 * _COPY_BYTES / statistics.median(times)
