"""The watch of one pipeline instance while a fusion is on it.

The watch sees assignments to the pipeline's components, lets one generation run at a time, and
refuses methods that would give a wrong picture or a wrong file (`refusals`). It affects this
instance only, which gets its own subclass (`layers.subclass`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from klora_runtime.errors import InUseError
from klora_runtime.layers.mode import Mode
from klora_runtime.layers.subclass import Overlay, inherited
from klora_runtime.pipeline.refusals import REFUSALS, refusing, saving


class Events(Protocol):
    """The receiver of a watch's events; it also answers questions about the fusion."""

    @property
    def components(self) -> Collection[str]:
        """Names of the components that carry the fusion."""

    @property
    def mode(self) -> Mode:
        """The mode in which the fusion acts."""

    def scheduler_assigned(self, scheduler: Any) -> None:
        """React to the assignment of a scheduler, before it happens."""

    def component_assigned(self, name: str) -> None:
        """React to the assignment of a component: the same one as before, compiled or not."""

    def generation(self, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return a context for one call of the pipeline with these keyword arguments."""

    def bare(self) -> AbstractContextManager[None]:
        """Return a context in which the model is bare, for saving it."""


class PipelineWatch:
    """The watch of one pipeline.

    Args:
        pipe: the pipeline instance.
        events: the receiver of the events.
    """

    def __init__(self, pipe: Any, events: Events) -> None:
        self._pipe = pipe
        self._events: Events | None = events  # None: detached
        self._overlay = Overlay(self._methods)

    def attach(self) -> None:
        """Begin to watch."""
        self._overlay.put_on(self._pipe)

    def detach(self) -> None:
        """Stop for good, and give the pipeline its class back."""
        self._overlay.retire([self._pipe])
        self._pipe = self._events = None

    def _events_of(self, pipe: Any) -> Events | None:
        """Return the receiver of events of ``pipe``; None for copies of the watched pipeline."""
        return self._events if pipe is self._pipe else None

    def _methods(self, plain: type) -> dict[str, Any]:
        """Return the attributes of the subclass of the pipeline's class ``plain``."""
        methods: dict[str, Any] = {}
        if (assign := inherited(plain, "__setattr__")) is not None:
            methods["__setattr__"] = self._assigning(assign)
        for name in REFUSALS:
            if (method := inherited(plain, name)) is not None:
                methods[name] = refusing(method, name, self._mode_on)
        if (save := inherited(plain, "save_pretrained")) is not None:
            methods["save_pretrained"] = saving(save, self._bare_on)
        if (call := inherited(plain, "__call__")) is not None:
            methods["__call__"] = self._generating(call)
        return methods

    def _mode_on(self, pipe: Any, *_: Any, **__: Any) -> Mode | None:
        events = self._events_of(pipe)
        return None if events is None else events.mode

    def _bare_on(self, pipe: Any, *_: Any, **__: Any) -> AbstractContextManager[None]:
        events = self._events_of(pipe)
        return nullcontext() if events is None else events.bare()

    def _assigning(self, set_attribute: Callable[..., None]) -> Callable[..., None]:
        def assign(pipe: Any, name: str, value: Any) -> None:
            events = self._events_of(pipe)
            if events is None:
                set_attribute(pipe, name, value)
                return
            carries = name in events.components
            if carries:
                _refuse_another(name, value, getattr(pipe, name, None))
            if name == "scheduler" and value is not None:
                events.scheduler_assigned(value)
            set_attribute(pipe, name, value)
            if carries:
                events.component_assigned(name)

        return assign

    def _generating(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def generate(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            events = self._events_of(pipe)
            with nullcontext() if events is None else events.generation(kwargs):
                return call(pipe, *args, **kwargs)

        return generate


def _refuse_another(name: str, value: Any, held: Any) -> None:
    if not _same_model(value, held):
        raise InUseError(
            f"pipe.{name} carries a fusion and cannot be replaced; call .remove() on the "
            "handle first, then apply the fusion to the new one."
        )


def _same_model(one: Any, other: Any) -> bool:
    """Return whether two modules are the same model, compiled or not."""
    return getattr(one, "_orig_mod", one) is getattr(other, "_orig_mod", other)
