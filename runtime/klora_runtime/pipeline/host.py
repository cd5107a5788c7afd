"""The host of a diffusers pipeline: what diffusers, accelerate and transformers do to its modules.

What they do in order to free memory is in `offloading`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from klora_runtime.layers.host import Casting, Host
from klora_runtime.pipeline import offloading
from klora_runtime.pipeline.base_files import Base, files_of

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
    """The host of a diffusers pipeline; see :class:`~klora_runtime.layers.host.Host`.

    Args:
        base: the files that the pipeline was loaded from, see :data:`Base`.
    """

    def __init__(self, base: Base = None) -> None:
        self._base = base

    def paths(self, path: str) -> Sequence[str]:
        if path.startswith(_OPTIONAL_PREFIX):
            return path, path.removeprefix(_OPTIONAL_PREFIX)
        return path, _OPTIONAL_PREFIX + path

    def device(self, lineage: Sequence[nn.Module]) -> torch.device | None:
        """See :meth:`Host.device`. The leaf's own hook is asked first, then its parents' hooks."""
        found = (device for device in offloading.devices(lineage) if device.type != "meta")
        return next(found, None)

    def casting(self, module: nn.Module) -> Casting | None:
        hook = offloading.diffusers_hook(module, "layerwise_casting")
        return None if hook is None else Casting(hook.compute_dtype, "layerwise casting")

    def offloads(self, model: nn.Module) -> bool:
        return hasattr(model, offloading.ACCELERATE)

    def checkpoints(self, component: str, model: nn.Module) -> Sequence[Path] | None:
        """See :meth:`Host.checkpoints`."""
        return files_of(self._base, component, model)

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
        self, lineage: Sequence[nn.Module], names: Sequence[str], *, small: bool
    ) -> str | None:
        """See :meth:`Host.unwritable`."""
        return offloading.unwritable(lineage, names, small=small)

    def origin(self, lineage: Sequence[nn.Module], names: Sequence[str]) -> torch.Tensor | None:
        """See :meth:`Host.origin`."""
        return offloading.origin(lineage, names)

    def repeated_blocks(self, model: nn.Module) -> Collection[str]:
        """See :meth:`Host.repeated_blocks`; the names are those of ``compile_repeated_blocks``."""
        return getattr(model, "_repeated_blocks", None) or ()


def _projections_are_fused(attention: nn.Module) -> bool:
    if not getattr(attention, "fused_projections", False):
        return False
    if hasattr(attention, "unfuse_projections"):
        return True
    # An older kind of attention never clears the flag; its processor's class shows the state.
    return type(getattr(attention, "processor", None)).__name__.startswith("Fused")
