"""The device and dtype in which a leaf module computes, when its weight does not show them.

Quantised weights are packed integers; offloaded weights are elsewhere, or without memory, until
they are needed. The target's host knows what the program does about that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from klora_runtime.devices.names import HOST
from klora_runtime.layers.targets import REAL_DTYPES, Target

#: Dtypes in which low-rank factors can be multiplied.
COMPUTE_DTYPES = REAL_DTYPES

#: Attributes in which modules with a packed weight have the dtype that they multiply in: those of
#: bitsandbytes, GGUF and HQQ; of Nunchaku; of SDNQ.
_COMPUTES = ("compute_dtype", "torch_dtype", "dtype")


def compute_dtype(target: Target) -> torch.dtype:
    """Return the dtype in which a target's module multiplies."""
    for dtype in _dtypes(target):
        if dtype is not None and dtype in COMPUTE_DTYPES:
            return dtype
    return torch.float32


def execution_device(target: Target) -> torch.device:
    """Return the device on which a target's module gets its inputs."""
    return next(device for device in _devices(target) if device.type != "meta")


def has_memory(target: Target) -> bool:
    """Return whether a target's weight has memory, or something loads it on demand."""
    return target.parameter.device.type != "meta" or target.host.device(target.lineage) is not None


def _dtypes(target: Target) -> Iterator[torch.dtype | None]:
    module, casting = target.module, target.host.casting(target.module)
    if casting is not None:
        yield casting.dtype
    yield from (getattr(module, name, None) for name in _COMPUTES)
    yield getattr(getattr(module, "weight", None), "dtype", None)
    yield from (parameter.dtype for parameter in target.model.parameters())


def _devices(target: Target) -> Iterator[torch.device]:
    brought = target.host.device(target.lineage)
    if brought is not None:
        yield brought
    yield target.parameter.device
    yield from (parameter.device for parameter in target.model.parameters())
    yield HOST
