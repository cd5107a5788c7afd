"""torch, imported when something of it is first used.

    from klora_runtime.lazy_torch import torch

Importing torch takes seconds. Modules that also serve commands which need no numbers (headers,
documents, surveys) take torch from here, and use it inside functions only.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _OnUse(ModuleType):
        """A module that is imported when one of its attributes is first asked for."""

        _module: ModuleType | None = None

        def __getattr__(self, name: str) -> Any:
            if self._module is None:  # asking importlib each time takes microseconds
                self._module = import_module(self.__name__)
            return getattr(self._module, name)

    torch = _OnUse("torch")
