"""The host of a diffusers pipeline: what diffusers, accelerate and transformers do to its modules.

These libraries keep their state in attributes of the modules. A new kind of offloading is a new
row of :data:`_DEVICE_READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from klora_runtime.devices.names import indexed
from klora_runtime.layers.host import Casting, Host

#: Attributes of a module in which these libraries keep their hooks.
_ACCELERATE, _DIFFUSERS = "_hf_hook", "_diffusers_hook"

#: transformers 5 dropped this prefix from some CLIP classes and kept it in others.
_OPTIONAL_PREFIX = "text_model."

#: Projections that are unused after ``fuse_qkv_projections``.
_FUSIBLE = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")

#: Classes of diffusers whose ``forward`` reads the weights of layers instead of calling them.
_READERS = {
    "HunyuanDiTAttentionPool": ("q_proj", "k_proj", "v_proj", "c_proj"),
    "FirUpsample2D": ("Conv2d_0",),
    "FirDownsample2D": ("Conv2d_0",),
}


class PipelineHost(Host):
    """The host of a diffusers pipeline; see :class:`~klora_runtime.layers.host.Host`."""

    def paths(self, path: str) -> Sequence[str]:
        if path.startswith(_OPTIONAL_PREFIX):
            return path, path.removeprefix(_OPTIONAL_PREFIX)
        return path, _OPTIONAL_PREFIX + path

    def device(self, lineage: Sequence[nn.Module]) -> torch.device | None:
        """See :meth:`Host.device`. The leaf's own hook is asked first, then its parents' hooks."""
        found = (device for device in _hook_devices(lineage) if device.type != "meta")
        return next(found, None)

    def casting(self, module: nn.Module) -> Casting | None:
        hook = _diffusers_hook(module, "layerwise_casting")
        return None if hook is None else Casting(hook.compute_dtype, "layerwise casting")

    def offloads(self, model: nn.Module) -> bool:
        return hasattr(model, _ACCELERATE)

    def unused(self, lineage: Sequence[nn.Module], name: str) -> str | None:
        if name not in _FUSIBLE or not _projections_are_fused(lineage[-2]):
            return None
        return (
            "is unused since fuse_qkv_projections(); call pipe.unfuse_qkv_projections(), "
            "apply the fusion, and leave the projections apart"
        )

    def reads_weight(self, lineage: Sequence[nn.Module], name: str) -> bool:
        """See :meth:`Host.reads_weight`."""
        return name in _READERS.get(type(lineage[-2]).__name__, ())

    def unwritable(
        self, lineage: Sequence[nn.Module], parameter: torch.Tensor, *, small: bool
    ) -> str | None:
        if parameter.device.type == "meta":
            return "its weight has no memory (meta device): sequential offloading is on"
        hooks = [_diffusers_hook(module, "group_offloading") for module in lineage]
        if any(hook and not (small and _only_moves(hook)) for hook in hooks):
            return "group offloading keeps its own copy of the weight; switch it off first"
        return None

    def repeated_blocks(self, model: nn.Module) -> Collection[str]:
        """See :meth:`Host.repeated_blocks`; the names are those of ``compile_repeated_blocks``."""
        return getattr(model, "_repeated_blocks", None) or ()


def _hook_devices(lineage: Sequence[nn.Module]) -> Iterator[torch.device]:
    for module in reversed(lineage):
        own = vars(module)  # a failing getattr of a module is slow
        if _ACCELERATE in own or _DIFFUSERS in own:
            found = (read(module) for read in _DEVICE_READERS)
            yield from (indexed(device) for device in found if device is not None)


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    """Return diffusers' hook of this name on a module, or None."""
    registry = vars(module).get(_DIFFUSERS)
    return None if registry is None else getattr(registry, "hooks", {}).get(name)


def _only_moves(hook: Any) -> bool:
    """Return whether group offloading moves parameters; with streams or a disk it copies them."""
    config = hook.config
    return config.stream is None and config.offload_to_disk_path is None


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _hf_device(module: nn.Module) -> Any:
    """Read the device from accelerate: model and sequential offloading, device maps."""
    hook = vars(module).get(_ACCELERATE)
    hooks = getattr(hook, "hooks", (hook,))
    return _first(getattr(each, "execution_device", None) for each in hooks)


def _group_device(module: nn.Module) -> Any:
    """Read the device from diffusers: group offloading by block or by leaf."""
    for name in ("group_offloading", "lazy_prefetch_group_offloading"):
        hook = _diffusers_hook(module, name)
        group = getattr(hook, "group", None)
        if group is not None:
            return group.onload_device
    return None


#: Readers of the execution device, applied to the leaf first and then to its parents.
_DEVICE_READERS: tuple[Callable[[nn.Module], Any], ...] = (_hf_device, _group_device)


def _projections_are_fused(attention: nn.Module) -> bool:
    if not getattr(attention, "fused_projections", False):
        return False
    if hasattr(attention, "unfuse_projections"):
        return True
    # An older kind of attention never clears the flag; its processor's class shows the state.
    return type(getattr(attention, "processor", None)).__name__.startswith("Fused")
