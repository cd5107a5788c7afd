"""Memory for many numbers that are all written at once."""

from __future__ import annotations

import math
import mmap

from klora_runtime.lazy_torch import torch

_HUGE = 2**21


def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return (count,) in host memory, with undefined values.

    Large tensors get huge pages where the system has them (Linux): the first write to a page costs
    more than reading or decoding what it holds.

    Raises:
        RuntimeError: there is not enough memory.
    """
    size = count * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < 2 * _HUGE:
        return torch.empty(count, dtype=dtype)
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, math.ceil(size / _HUGE) * _HUGE, flags=flags)
        memory.madvise(advice)
    except (OSError, OverflowError, ValueError):  # no such memory: let torch say so
        return torch.empty(count, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count)
