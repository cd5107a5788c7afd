"""What one component (a denoiser, a text encoder) does while a fusion is on it.

Several pipelines may share a component, so what concerns it is on it: the mark by which a second
fusion knows of the first, the methods that are refused, and a look at each evaluation. These are
attributes of the instance and a forward hook: its class, and with it all compiled code, stay.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from klora_runtime.refusals import REFUSALS, refuse_method
from klora_runtime.targets import APPLIED_MARK


class ComponentWatch:
    """Watches one component of a pipeline.

    Args:
        model: the component itself, not what ``torch.compile`` made around it.
        owner: the handle of the fusion; referred to weakly.
        mode: the name of the mode that the fusion is applied in.
        on_evaluation: called before each evaluation that is not compiled; may raise. None where
            it does not matter when the component runs.
        bare: gives a context in which the component is bare, for saving it.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: object,
        mode: str,
        on_evaluation: Callable[[], None] | None,
        bare: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.model = model
        self._attributes: dict[str, Any] = {APPLIED_MARK: weakref.ref(owner)}
        for method in REFUSALS:
            if callable(getattr(model, method, None)):
                self._attributes[method] = _refused(getattr(model, method), method, mode)
        save = getattr(model, "save_pretrained", None)
        if callable(save):
            self._attributes["save_pretrained"] = _saving(save, bare)
        own = vars(model)
        self._before = {name: own[name] for name in self._attributes if name in own}
        own.update(self._attributes)
        self._hook = None if on_evaluation is None else _before(model, on_evaluation)

    def detach(self) -> None:
        """Stop for good."""
        if self._hook is not None:
            self._hook.remove()
        for name in self._attributes:
            vars(self.model).pop(name, None)
        vars(self.model).update(self._before)
        self._attributes, self._before = {}, {}


def _before(model: nn.Module, on_evaluation: Callable[[], None]) -> RemovableHandle:
    def before(module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            on_evaluation()

    return model.register_forward_pre_hook(before)


def _refused(method: Callable[..., Any], name: str, mode: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def refused(*args: Any, **kwargs: Any) -> Any:
        refuse_method(name, mode)
        return method(*args, **kwargs)

    return refused


def _saving(
    save: Callable[..., Any], bare: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        with bare():
            return save(*args, **kwargs)

    return save_pretrained
