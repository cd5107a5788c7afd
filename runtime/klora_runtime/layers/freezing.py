"""Detection of compiled code that folds weights in as constants and cannot follow a fusion."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from klora_runtime.errors import IncompatibleModelError
from klora_runtime.layers.module_tree import modules_of

#: Attributes on the instance of a module that may have been compiled.
_TRACES = frozenset({"get_compiler_config", "_compiled_call_impl", "forward"})


def refuse_freezing(components: Iterable[nn.Module]) -> None:
    """Refuse inductor's option ``freezing``, set globally or for these components.

    Args:
        components: component modules as the host holds them, compiled or not.

    Raises:
        IncompatibleModelError: the option is on.
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
    """Return the options given to ``torch.compile``; empty if there were none."""
    own = getattr(compiled, "__dict__", {})  # a failing getattr of a module is slow
    read = own.get("get_compiler_config")
    return (read() if callable(read) else None) or {}
