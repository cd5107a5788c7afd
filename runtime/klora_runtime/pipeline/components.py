"""The component modules of a pipeline that a fusion changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from klora_runtime.artifact.schedule import STEPLESS
from klora_runtime.errors import IncompatibleModelError
from klora_runtime.layers.module_tree import modules_of, original_module
from klora_runtime.layers.targets import refuse


def models_in(pipe: Any, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return name -> component module, without the wrapper of ``torch.compile``.

    Args:
        pipe: a diffusers pipeline.
        names: names of the components that the fusion changes.

    Raises:
        IncompatibleModelError: the pipeline lacks a component.
    """
    return {name: _component(pipe, name, names) for name in names}


def refuse_adapters(models: Mapping[str, nn.Module]) -> None:
    """Refuse components with PEFT adapters.

    Raises:
        IncompatibleModelError: a component has adapters; ``issues`` lists the modules.
    """
    for name, model in models.items():
        if not any(map(_is_adapter, modules_of(model))):
            continue
        wrapped = [path for path, module in model.named_modules() if _is_adapter(module)]
        refuse(
            [f"{name}.{path}" for path in wrapped],
            f"{name} carries PEFT adapters on {len(wrapped)} modules, active or not, and they "
            "would share these modules with the fusion. Call pipe.unload_lora_weights() first "
            "(after pipe.fuse_lora(), to keep their effect).",
        )


def _component(pipe: Any, name: str, chosen: Sequence[str]) -> nn.Module:
    model = getattr(pipe, name, None)
    if not isinstance(model, nn.Module):
        rest = [component for component in chosen if component != name]
        raise IncompatibleModelError(
            f"this {type(pipe).__name__} has no {name}, but the fusion changes it. "
            + (f"Leave it out with components={rest}" if rest else "Load the full pipeline")
            + (", or compile with --text-encoder none." if name in STEPLESS else ".")
        )
    return original_module(model)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")
