"""What one pipeline instance does while a fusion is on it.

Assignments to its components are seen, one generation runs at a time, and the methods that would
make a wrong picture or a wrong file are refused by name (`refusals`). Only this instance is
concerned: it gets a class of its own (`own_class`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from klora_runtime.errors import InUseError
from klora_runtime.pipeline.occupancy import Occupancy
from klora_runtime.pipeline.refusals import REFUSALS, refusing, saving
from klora_runtime.pipeline.subclass import Overlay, take_off


class PipelineWatch:
    """Watches one pipeline.

    Args:
        pipe: the pipeline instance.
        occupancy: which loop may sample.
        on_scheduler: called with a scheduler that is being assigned to the pipeline.
        on_component: called with the name of a component that carries the fusion, after it was
            assigned anew: the same one, compiled or not.
        generation: given the arguments of a call, makes a context around the generation.
        bare: gives a context in which the model is bare, for saving it.

    Attributes:
        components: names of the components that carry the fusion.
        mode: the name of the mode that it is applied in.
    """

    def __init__(
        self,
        pipe: Any,
        occupancy: Occupancy,
        on_scheduler: Callable[[Any], None],
        on_component: Callable[[str], None],
        generation: Callable[[dict[str, Any]], AbstractContextManager[None]],
        bare: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.components: Collection[str] = ()
        self.mode = ""
        self._pipe = pipe
        self._occupancy = occupancy
        self._on_scheduler = on_scheduler
        self._on_component = on_component
        self._generation = generation
        self._bare = bare
        self._overlay = Overlay(self._methods)

    def attach(self) -> None:
        """Begin to watch."""
        self._overlay.put_on(self._pipe)

    def detach(self) -> None:
        """Stop for good, and give the pipeline its class back."""
        self._overlay.active = False
        take_off(self._pipe)
        self._pipe = None
        nothing: Any = None
        self._on_scheduler = self._on_component = self._generation = self._bare = nothing

    def generate(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one generation, alone."""
        with (
            self._occupancy.call() as outermost,
            self._generation(kwargs) if outermost else nullcontext(),
        ):
            return call(*args, **kwargs)

    def assign(self, name: str, value: Any) -> None:
        """Called before ``pipe.name = value``."""
        if name in self.components and not _same_model(value, getattr(self._pipe, name, None)):
            raise InUseError(
                f"pipe.{name} carries a fusion and cannot be replaced; call .remove() on the "
                "handle first, then apply the fusion to the new one."
            )
        if name == "scheduler" and value is not None:
            self._on_scheduler(value)

    def _watches(self, pipe: Any) -> bool:
        return self._overlay.active and pipe is self._pipe

    def _methods(self, plain: type) -> dict[str, Any]:
        """The attributes of the watched pipeline's class."""
        set_attribute: Any = plain.__setattr__

        def assign(pipe: Any, name: str, value: Any) -> None:
            watched = self._watches(pipe)
            if watched:
                self.assign(name, value)
            set_attribute(pipe, name, value)
            if watched and name in self.components:
                self._on_component(name)

        methods: dict[str, Any] = {"__setattr__": assign}
        for name in REFUSALS:
            if callable(getattr(plain, name, None)):
                methods[name] = refusing(getattr(plain, name), name, self._mode_on)
        if callable(save := _attribute(plain, "save_pretrained")):
            methods["save_pretrained"] = saving(save, self._bare_on)
        if callable(call := _attribute(plain, "__call__")):
            methods["__call__"] = self._generating(call)
        return methods

    def _mode_on(self, pipe: Any, *_: Any, **__: Any) -> str | None:
        return self.mode if self._watches(pipe) else None

    def _bare_on(self, pipe: Any, *_: Any, **__: Any) -> AbstractContextManager[None]:
        return self._bare() if self._watches(pipe) else nullcontext()

    def _generating(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def generate(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if self._watches(pipe):
                return self.generate(call, pipe, *args, **kwargs)
            return call(pipe, *args, **kwargs)

        return generate


def _attribute(cls: type, name: str) -> Any:
    """A class's own or inherited attribute, not its metaclass's (every class is callable)."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _same_model(one: Any, other: Any) -> bool:
    """Whether two modules are the same one, compiled or not."""
    return getattr(one, "_orig_mod", one) is getattr(other, "_orig_mod", other)
