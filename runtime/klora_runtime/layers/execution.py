"""Where, and in what dtype, a leaf module computes, when its weight alone does not say.

Quantised weights are packed integers, offloaded ones are elsewhere or nowhere until they are
needed. A new kind of base is a new row in one of the two tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from klora_runtime.devices.names import HOST, indexed
from klora_runtime.layers.targets import Target

#: Dtypes that low-rank factors can be multiplied in.
COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Attributes of a module in which these libraries keep what they do around its ``forward``.
_ACCELERATE, _DIFFUSERS = "_hf_hook", "_diffusers_hook"


def compute_dtype(target: Target) -> torch.dtype:
    """The dtype in which a target's module multiplies."""
    found = (dtype for dtype in _dtypes(target) if dtype in COMPUTE_DTYPES)
    return next(found, torch.float32)


def execution_device(target: Target) -> torch.device:
    """The device on which a target's module gets its inputs."""
    return next(device for device in _devices(target) if device.type != "meta")


def has_memory(target: Target) -> bool:
    """Whether a target's weight is somewhere, or something will load it when it is needed."""
    return target.parameter.device.type != "meta" or any(_hook_devices(target))


def diffusers_hook(module: nn.Module, name: str) -> Any:
    """The hook of this name that diffusers keeps on a module, or None."""
    registry = vars(module).get(_DIFFUSERS)  # getattr is slow where there is none
    return None if registry is None else getattr(registry, "hooks", {}).get(name)


def is_group_offloaded(target: Target) -> bool:
    """Whether diffusers' group offloading keeps copies of a target's weight."""
    return any(
        diffusers_hook(module, "group_offloading")
        for module in target.lineage
        if _DIFFUSERS in vars(module)
    )


def _dtypes(target: Target) -> Iterator[torch.dtype]:
    module = target.module
    for read in _DTYPE_READERS:
        yield read(module)
    yield from (parameter.dtype for parameter in target.model.parameters())


def _devices(target: Target) -> Iterator[torch.device]:
    yield from _hook_devices(target)
    yield target.parameter.device
    yield from (parameter.device for parameter in target.model.parameters())
    yield HOST


def _hook_devices(target: Target) -> Iterator[torch.device]:
    for module in reversed(target.lineage):
        own = vars(module)
        if _ACCELERATE in own or _DIFFUSERS in own:
            found = (read(module) for read in _DEVICE_READERS)
            yield from (indexed(device) for device in found if device is not None)


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _hf_device(module: nn.Module) -> Any:
    """accelerate: model and sequential offloading, device maps."""
    hook = vars(module).get(_ACCELERATE)
    hooks = getattr(hook, "hooks", (hook,))
    return _first(getattr(each, "execution_device", None) for each in hooks)


def _group_device(module: nn.Module) -> Any:
    """diffusers: group offloading, by block or by leaf."""
    for name in ("group_offloading", "lazy_prefetch_group_offloading"):
        hook = diffusers_hook(module, name)
        group = getattr(hook, "group", None)
        if group is not None:
            return group.onload_device
    return None


#: What is asked in turn for the dtype; the first that names one of :data:`COMPUTE_DTYPES` tells.
_DTYPE_READERS: tuple[Callable[[nn.Module], Any], ...] = (
    lambda module: getattr(diffusers_hook(module, "layerwise_casting"), "compute_dtype", None),
    lambda module: getattr(module, "compute_dtype", None),  # GGUF, bitsandbytes 4 bit
    lambda module: getattr(module.weight, "dtype", None),
)

#: What is asked for the device, of the leaf first and then of the modules around it.
_DEVICE_READERS: tuple[Callable[[nn.Module], Any], ...] = (_hf_device, _group_device)
