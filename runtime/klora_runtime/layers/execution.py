"""Where, and in what dtype, a leaf module computes, when its weight alone does not say.

Quantised weights are packed integers, offloaded ones are elsewhere or nowhere until they are
needed. What the host does about it the target's host tells.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from klora_runtime.artifact.tensor_file import REAL_DTYPES
from klora_runtime.devices.names import HOST
from klora_runtime.layers.targets import Target

#: Dtypes that low-rank factors can be multiplied in.
COMPUTE_DTYPES = REAL_DTYPES


def compute_dtype(target: Target) -> torch.dtype:
    """The dtype in which a target's module multiplies."""
    for dtype in _dtypes(target):
        if dtype is not None and dtype in COMPUTE_DTYPES:
            return dtype
    return torch.float32


def execution_device(target: Target) -> torch.device:
    """The device on which a target's module gets its inputs."""
    return next(device for device in _devices(target) if device.type != "meta")


def has_memory(target: Target) -> bool:
    """Whether a target's weight is somewhere, or something will load it when it is needed."""
    return target.parameter.device.type != "meta" or target.host.device(target.lineage) is not None


def _dtypes(target: Target) -> Iterator[torch.dtype | None]:
    module, casting = target.module, target.host.casting(target.module)
    if casting is not None:
        yield casting.dtype
    yield getattr(module, "compute_dtype", None)  # of weights packed into 4 bits, GGUF's too
    yield getattr(module.weight, "dtype", None)
    yield from (parameter.dtype for parameter in target.model.parameters())


def _devices(target: Target) -> Iterator[torch.device]:
    brought = target.host.device(target.lineage)
    if brought is not None:
        yield brought
    yield target.parameter.device
    yield from (parameter.device for parameter in target.model.parameters())
    yield HOST
