"""The modules of a model, found faster than by ``Module.modules()``, which also names them."""

from __future__ import annotations

from torch import nn


def modules_of(root: nn.Module) -> list[nn.Module]:
    """Return ``root`` and every module below it, each once."""
    found = [root]
    seen: set[nn.Module] = {root}
    for module in found:  # the list grows in the loop
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def uses_of(root: nn.Module) -> list[nn.Module]:
    """Return ``root`` and every module below it, once for each path that leads to it."""
    found = [root]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def original_module(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` may have wrapped."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original
