"""The watch of one component (a denoiser or text encoder) while a fusion is on it.

Several pipelines may share a component, so the watch is on the component itself: the mark that
keeps a second fusion away, the refused methods, and an observer of its evaluations. They are
attributes of the instance and forward hooks, so the class and all compiled code stay valid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from klora_runtime.layers.claim import Claimant, mark_of
from klora_runtime.layers.mode import Mode
from klora_runtime.pipeline.refusals import REFUSALS, refusing, saving
from klora_runtime.pipeline.timesteps import timestep_reader

#: Attribute in which ``Module.compile`` keeps the code of a module compiled in place.
_COMPILED = "_compiled_call_impl"

#: What all ways to move and to convert a module call, of the module and of those around it.
_CONVERT = "_apply"


class ComponentWatch:
    """The watch of one component of a pipeline, from :meth:`attach` to :meth:`detach`.

    Args:
        model: the component itself, not the wrapper of ``torch.compile``.
        owner: the handle of the fusion; the watch refers to it weakly.
        mode: returns the mode in which the fusion is applied.
        on_evaluation: called with the timestep (None if there is none) before each evaluation;
            may raise. None if evaluations need no check.
        on_evaluated: called with the component after each evaluation; may raise.
        on_converted: called when the component was moved or converted.
        bare: returns a context in which the component is bare, for saving it.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: Claimant,
        mode: Callable[[], Mode],
        on_evaluation: Callable[[Any], None] | None,
        on_evaluated: Callable[[nn.Module], None],
        on_converted: Callable[[], None],
        bare: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.model = model
        self._attributes: dict[str, Any] = dict(mark_of(owner))
        self._attributes[_CONVERT] = _converting(getattr(model, _CONVERT), on_converted)
        for method in REFUSALS:
            if callable(getattr(model, method, None)):
                self._attributes[method] = refusing(
                    getattr(model, method), method, lambda *_, **__: mode()
                )
        save = getattr(model, "save_pretrained", None)
        if callable(save):
            self._attributes["save_pretrained"] = saving(save, lambda *_, **__: bare())
        self._observer = None if on_evaluation is None else _observer(model, on_evaluation)
        if self._observer is not None:
            self._attributes["compile"] = self._compiling(model.compile)
        own = vars(model)
        self._before = {name: own[name] for name in self._attributes if name in own}
        # Id of a module -> hook before it; key 0 -> hook after the component.
        self._hooks: dict[int, RemovableHandle] = {}
        self._after = _after(on_evaluated)

    def attach(self) -> None:
        """Begin to watch; if this fails half-way, call :meth:`detach`."""
        vars(self.model).update(self._attributes)
        self._hooks[0] = self.model.register_forward_hook(self._after)
        self.observe(self.model)
        self._observe_compiled()

    def observe(self, caller: nn.Module) -> None:
        """Observe evaluations through this module: the component, or its compiled wrapper.

        Hooks added inside code that is already compiled do not run; hooks of the wrapper do.
        """
        if self._observer is not None and id(caller) not in self._hooks:
            hook = caller.register_forward_pre_hook(self._observer, with_kwargs=True)
            self._hooks[id(caller)] = hook

    def detach(self) -> None:
        """Stop for good, even if :meth:`attach` failed half-way."""
        for hook in self._hooks.values():
            hook.remove()
        compiled = vars(self.model).get(_COMPILED)
        if isinstance(compiled, _Observed):
            vars(self.model)[_COMPILED] = compiled.inner
        for name in self._attributes:
            vars(self.model).pop(name, None)
        vars(self.model).update(self._before)
        self._attributes, self._before, self._hooks, self._observer = {}, {}, {}, None

    def _compiling(self, compile_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compile_)
        def compiled(*args: Any, **kwargs: Any) -> Any:
            result = compile_(*args, **kwargs)
            self._observe_compiled()
            return result

        return compiled

    def _observe_compiled(self) -> None:
        """Observe the evaluations of a component that was compiled in place."""
        compiled = vars(self.model).get(_COMPILED)
        if (
            self._observer is not None
            and compiled is not None
            and not isinstance(compiled, _Observed)
        ):
            vars(self.model)[_COMPILED] = _Observed(self.model, self._observer, compiled)


class _Observed:
    """Compiled code that calls an observer first."""

    def __init__(self, model: nn.Module, observer: Callable[..., None], inner: Any) -> None:
        functools.update_wrapper(self, inner)
        self._model, self._observer, self.inner = model, observer, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._observer(self._model, args, kwargs)
        return self.inner(*args, **kwargs)


def _converting(convert: Callable[..., Any], on_converted: Callable[[], None]) -> Any:
    @functools.wraps(convert)
    def converted(*args: Any, **kwargs: Any) -> Any:
        result = convert(*args, **kwargs)
        on_converted()
        return result

    return converted


def _after(on_evaluated: Callable[[nn.Module], None]) -> Callable[..., None]:
    """Return a forward hook that reports an evaluation; in compiled code it does nothing."""

    def observe(model: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            on_evaluated(model)

    return observe


def _observer(model: nn.Module, on_evaluation: Callable[[Any], None]) -> Callable[..., None]:
    timestep = timestep_reader(type(model).forward, skip=1)  # a cache may hide that one's names

    def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            on_evaluation(timestep(args, kwargs))

    return observe
