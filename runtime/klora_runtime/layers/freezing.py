"""Compiled code that has folded weights in as constants and so cannot follow a fusion."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from klora_runtime.errors import IncompatibleModelError
from klora_runtime.layers.module_tree import modules_of

#: What a module has of its own, where it or its ``forward`` may have been compiled.
_TRACES = frozenset({"get_compiler_config", "_compiled_call_impl", "forward"})


def refuse_freezing(components: Iterable[nn.Module]) -> None:
    """See that inductor's option ``freezing`` is off, for all and for these components.

    Args:
        components: as the host holds them, compiled or not.

    Raises:
        IncompatibleModelError: it is on.
    """
    if _on_for_all() or any(_on_for(component) for component in components):
        raise IncompatibleModelError(
            "torch.compile's option freezing folds the weights into the compiled code, which then "
            "cannot follow a fusion. Switch it off (torch._inductor.config.freezing, the option "
            "of torch.compile, TORCHINDUCTOR_FREEZING) and compile anew."
        )


def _on_for_all() -> bool:
    config = sys.modules.get("torch._inductor.config")
    if config is None:
        return os.environ.get("TORCHINDUCTOR_FREEZING") == "1"
    return bool(getattr(config, "freezing", False))


def _on_for(component: nn.Module) -> bool:
    return any(
        _options(compiled).get("freezing", False)
        for module in modules_of(component)
        if vars(module).keys() & _TRACES
        for compiled in (module, *map(vars(module).get, ("_compiled_call_impl", "forward")))
    )


def _options(compiled: Any) -> dict[str, Any]:
    """What ``torch.compile`` was told; empty where it was told nothing or never called."""
    own = getattr(compiled, "__dict__", {})  # getattr of a module is slow where there is none
    read = own.get("get_compiler_config")
    return (read() if callable(read) else None) or {}
