"""The arithmetic of a training: float32, or bfloat16 where a processor is made for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def arithmetic(device: str, bfloat16: bool) -> Iterator[None]:
    """Convolve and multiply in bfloat16, or leave everything as it is.

    Weights and optimizer stay float32. The attention is computed by plain products, since torch's
    fused attention on a CPU is about five times slower backwards in bfloat16 than in float32.
    """
    if not bfloat16:
        yield
        return
    with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield
