"""The arithmetic and memory traffic of branches: the least possible cost.

Two thin products of rank r cost r * (in + out) multiplications per token, the layer's own product
in * out. Unless the device is idle while it waits for memory, they add to its time.

Each call of a branched layer reads its input again for the first thin product, reads the layer's
output and writes the sum, and reads the factors. On a GPU, whose cache does not hold a layer's
activations, no kernel beside the base's own product can be faster than this memory traffic.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmark.timing import seconds_of
from klora_runtime.layers.leaf import branch_of, is_branched

#: Bytes to copy for measuring memory bandwidth: more than any cache holds.
_COPY_BYTES = 2**28
_COPIES = 7


@dataclass(frozen=True)
class BranchWork:
    """The work of all branches of a model for one image."""

    nbytes: int
    """Least bytes that they move through memory."""
    share: float
    """Their operations relative to those of the bare model's products."""


def branch_work(model: nn.Module, sample: Callable[[], object]) -> BranchWork:
    """Return the work of a model's branches while ``sample`` runs.

    Args:
        model: a denoiser with branched layers that is not compiled.
    """
    nbytes = operations = 0

    def count(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal nbytes, operations
        addition = branch_of(module)
        down, up = addition.down, addition.up
        assert down is not None
        assert up is not None
        nbytes += inputs[0].nbytes + 2 * output.nbytes + down.nbytes + up.nbytes
        rank, out = up.shape
        inner = down.numel() // rank
        operations += 2 * (output.numel() // out) * rank * (inner + out)

    branched = [module for module in model.modules() if is_branched(module)]
    hooks = [module.register_forward_hook(count) for module in branched]
    try:
        with FlopCounterMode(display=False) as counter:
            sample()
    finally:
        for hook in hooks:
            hook.remove()
    return BranchWork(nbytes, operations / (counter.get_total_flops() - operations))


def memory_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a device's memory reads and writes in a large copy."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(_COPIES)]
    return 2 * _COPY_BYTES / statistics.median(times)
