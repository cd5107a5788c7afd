"""Offloading by accelerate and diffusers: where a module computes, and where its values are kept.

These libraries keep their hooks in attributes of the modules. A module is identified by its lineage
(the component, every module between, and the module), a parameter also by its names in them. A new
kind of offloading is a new row of :data:`_DEVICE_READERS`, and of :func:`origin` if it keeps values
elsewhere than in the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from klora_runtime.devices.names import indexed

#: Attributes of a module in which these libraries keep their hooks.
ACCELERATE, DIFFUSERS = "_hf_hook", "_diffusers_hook"


def devices(lineage: Sequence[nn.Module]) -> Iterator[torch.device]:
    """Yield the devices that a module's own hooks name, then those that its parents' hooks name."""
    for module in reversed(lineage):
        own = vars(module)  # a failing getattr of a module is slow
        if ACCELERATE in own or DIFFUSERS in own:
            found = (read(module) for read in _DEVICE_READERS)
            yield from (indexed(device) for device in found if device is not None)


def diffusers_hook(module: nn.Module, name: str) -> Any:
    """Return diffusers' hook of this name on a module, or None."""
    registry = vars(module).get(DIFFUSERS)
    return None if registry is None else getattr(registry, "hooks", {}).get(name)


def origin(lineage: Sequence[nn.Module], names: Sequence[str]) -> torch.Tensor | None:
    """Return the tensor from which a parameter is loaded before each call; None if there is none.

    Sequential offloading keeps a map from names to tensors in host memory, group offloading with a
    stream a copy per parameter. Group offloading without a stream moves the parameter itself.

    Args:
        names: the parameter's path inside the component, one name for each step of the lineage.
    """
    found = _sequential_origin(lineage, names)
    return _copy_of_a_group(lineage, names[-1]) if found is None else found


def unwritable(lineage: Sequence[nn.Module], names: Sequence[str], *, small: bool) -> str | None:
    """Return why a write to a parameter would not last, and the fix.

    Args:
        names: see :func:`origin`.
        small: whether the parameter is no weight that a layer multiplies with. Others are not
            written while they are offloaded.
    """
    parameter = lineage[-1]._parameters.get(names[-1])
    hooked = [module for module in lineage if DIFFUSERS in vars(module)]  # few or none
    groups = [hook for hook in map(_group_hook, hooked) if hook is not None]
    if not small:
        if parameter is not None and parameter.device.type == "meta":
            return "its weight has no memory (meta device): sequential offloading is on"
        if groups:
            return "group offloading keeps its own copy of the weight; switch it off first"
    elif any(hook.config.offload_to_disk_path is not None for hook in groups):
        return (
            f"group offloading reads its {names[-1]} from a file before each call; offload "
            "without offload_to_disk_path"
        )
    elif _sequential_map(lineage, names) is not None and origin(lineage, names) is None:
        return (
            f"accelerate reads its {names[-1]} from a file before each call; load the model "
            "without an offload_folder"
        )
    return None


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _accelerate_hooks(module: nn.Module) -> Sequence[Any]:
    hook = vars(module).get(ACCELERATE)
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _hf_device(module: nn.Module) -> Any:
    """Read the device from accelerate: model and sequential offloading, device maps."""
    return _first(getattr(each, "execution_device", None) for each in _accelerate_hooks(module))


def _group_device(module: nn.Module) -> Any:
    """Read the device from diffusers: group offloading by block or by leaf."""
    for name in ("group_offloading", "lazy_prefetch_group_offloading"):
        hook = diffusers_hook(module, name)
        group = getattr(hook, "group", None)
        if group is not None:
            return group.onload_device
    return None


#: Readers of the execution device, applied to the leaf first and then to its parents.
_DEVICE_READERS: tuple[Callable[[nn.Module], Any], ...] = (_hf_device, _group_device)


def _group_hook(module: nn.Module) -> Any:
    return diffusers_hook(module, "group_offloading")


def _sequential_map(lineage: Sequence[nn.Module], names: Sequence[str]) -> tuple[Any, str] | None:
    """Return accelerate's map for a parameter and the name in it; a parent may load it too."""
    for depth in reversed(range(len(lineage))):
        for hook in _accelerate_hooks(lineage[depth]):
            if not getattr(hook, "offload", False) or hook.weights_map is None:
                continue
            if depth == len(lineage) - 1 or hook.place_submodules:
                return hook.weights_map, ".".join(names[depth:])
    return None


def _sequential_origin(lineage: Sequence[nn.Module], names: Sequence[str]) -> torch.Tensor | None:
    found = _sequential_map(lineage, names)
    if found is None:
        return None
    kept, name = found
    try:
        value = kept[name]
        lasts = value is kept[name]  # what a map reads from a file is another tensor each time
    except KeyError:
        return None
    return value.detach() if lasts and isinstance(value, torch.Tensor) else None


def _copy_of_a_group(lineage: Sequence[nn.Module], name: str) -> torch.Tensor | None:
    parameter = lineage[-1]._parameters.get(name)
    for hook in map(_group_hook, reversed(lineage)):
        copies = {} if hook is None else hook.group.cpu_param_dict
        copy: torch.Tensor | None = None if parameter is None else copies.get(parameter)
        if copy is not None and parameter is not None:
            if parameter.device != copy.device and hook.group.stream is not None:
                hook.group.stream.synchronize()  # a transfer of it may be under way
            return copy
    return None
