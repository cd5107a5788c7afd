"""What one pipeline instance does while a fusion is on it.

Assignments to its components are seen, one generation runs at a time, and the methods that would
make a wrong picture or a wrong file are refused by name (`refusals`). Only this instance is
concerned: it gets a class of its own (`own_class`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

from klora_runtime.errors import InUseError
from klora_runtime.own_class import Overlay, take_off
from klora_runtime.refusals import REFUSALS, refuse_method


class PipelineWatch:
    """Watches one pipeline.

    Args:
        pipe: the pipeline instance.
        on_scheduler: called with a scheduler that is being assigned to the pipeline.
        generation: gives a context around each generation.
        bare: gives a context in which the model is bare, for saving it.

    Attributes:
        components: names of the components that carry the fusion.
        mode: the name of the mode that it is applied in.
    """

    def __init__(
        self,
        pipe: Any,
        on_scheduler: Callable[[Any], None],
        generation: Callable[[], AbstractContextManager[None]],
        bare: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.components: Collection[str] = ()
        self.mode = ""
        self._pipe = pipe
        self._on_scheduler = on_scheduler
        self._generation = generation
        self._bare = bare
        self._overlay = Overlay(self._methods)
        self._running = threading.RLock()
        self._thread: int | None = None

    def attach(self) -> None:
        """Begin to watch."""
        self._overlay.put_on(self._pipe)

    def detach(self) -> None:
        """Stop for good, and give the pipeline its class back."""
        self._overlay.active = False
        take_off(self._pipe)
        self._pipe = None
        self._on_scheduler = self._generation = self._bare = None  # type: ignore[assignment]

    def check_thread(self) -> None:
        """Refuse a thread other than the one that is generating.

        Raises:
            InUseError: another thread is in the middle of a generation.
        """
        if self._thread not in (None, threading.get_ident()):
            raise busy()

    def generate(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one generation, alone."""
        if not self._running.acquire(blocking=False):
            raise busy()
        outer = self._thread
        try:
            if self._thread is not None:  # a pipeline that calls itself
                return call(*args, **kwargs)
            self._thread = threading.get_ident()
            with self._generation():
                return call(*args, **kwargs)
        finally:
            self._thread = outer
            self._running.release()

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
            if self._watches(pipe):
                self.assign(name, value)
            set_attribute(pipe, name, value)

        def new(cls: type, *args: Any, **kwargs: Any) -> Any:
            """``type(pipe)(**components)`` makes another pipeline, which is not watched."""
            return plain(*args, **kwargs)

        methods: dict[str, Any] = {"__setattr__": assign, "__new__": new}
        for name in REFUSALS:
            if callable(getattr(plain, name, None)):
                methods[name] = self._refused(getattr(plain, name), name)
        for name, wrap in {"__call__": self.generate, "save_pretrained": self._save}.items():
            if callable(_attribute(plain, name)):
                methods[name] = self._through(wrap, _attribute(plain, name))
        return methods

    def _refused(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def refused(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if self._watches(pipe):
                refuse_method(name, self.mode)
            return method(pipe, *args, **kwargs)

        return refused

    def _through(self, wrap: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def through(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if self._watches(pipe):
                return wrap(method, pipe, *args, **kwargs)
            return method(pipe, *args, **kwargs)

        return through

    def _save(self, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Save the bare model: the fusion has a file of its own."""
        self.check_thread()
        with self._bare():
            return save(*args, **kwargs)


def _attribute(cls: type, name: str) -> Any:
    """A class's own or inherited attribute, not its metaclass's (every class is callable)."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _same_model(one: Any, other: Any) -> bool:
    """Whether two modules are the same one, compiled or not."""
    return getattr(one, "_orig_mod", one) is getattr(other, "_orig_mod", other)


def busy() -> InUseError:
    """The error for a thread that comes while another one generates."""
    return InUseError(
        "this denoiser is generating in another thread, and one fusion can be at one step only; "
        "wait for it, or give each thread its own pipeline."
    )
