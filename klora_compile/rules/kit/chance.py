"""Random numbers that are the same on every machine, for every number of threads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod

import numpy as np
import torch


def chances(seed: int, layer: str, slot: str, shape: Sequence[int]) -> torch.Tensor:
    """Return uniform numbers, of the seed and the two names alone.

    They are the leading bits of Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011), a counter-based generator of whole numbers, with a digest of the seed and
    the names as its key.

    Args:
        seed: any whole number.
        layer: name of the layer.
        slot: name of the LoRA, so that two LoRAs get independent numbers.
        shape: of the result.

    Returns:
        float64, each a multiple of 2**-32 in [0, 1).
    """
    text = "\n".join((str(seed), layer, slot))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    count = prod(shape)
    raw = np.random.Philox(key=key).random_raw(-(-count // 2)).astype("<u8").view("<u4")
    return torch.from_numpy(raw[:count].astype(np.float64) * 2.0**-32).reshape(*shape)
