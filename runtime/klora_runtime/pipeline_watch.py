"""What one pipeline instance does while a fusion is on it: assignments and generations.

The instance gets a subclass of its own class, with the same name. The class that other instances
share is never touched.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from typing import Any

from klora_runtime.errors import InUseError

_WATCH = "_klora_watch"


class PipelineWatch:
    """Sees a replaced scheduler, refuses a replaced component and a second generation at a time.

    Args:
        pipe: the pipeline instance.
        on_scheduler: called with a scheduler that is being assigned to the pipeline.

    Attributes:
        components: names of the components that carry the fusion.
    """

    def __init__(self, pipe: Any, on_scheduler: Callable[[Any], None]) -> None:
        self.components: Collection[str] = ()
        self._pipe = pipe
        self._on_scheduler = on_scheduler
        self._attached = False
        self._plain = type(pipe)
        self._running = threading.RLock()
        self._thread: int | None = None

    def attach(self) -> None:
        self._plain = type(self._pipe)
        self._pipe.__class__ = _watched(self._plain, self)
        self._attached = True

    def detach(self) -> None:
        """Give the pipeline its class back, once no watch of another fusion is in between."""
        self._attached = False
        while (watch := vars(type(self._pipe)).get(_WATCH)) and not watch._attached:
            self._pipe.__class__ = watch._plain

    def check_thread(self) -> None:
        """Refuse a denoising step of a thread other than the one that is generating.

        Raises:
            InUseError: another thread is in the middle of a generation.
        """
        if self._thread not in (None, threading.get_ident()):
            raise _busy()

    def generate(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one generation, alone."""
        if not self._running.acquire(blocking=False):
            raise _busy()
        outer, self._thread = self._thread, threading.get_ident()
        try:
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
        if name == "scheduler" and value is not None and self._attached:
            self._on_scheduler(value)


def _same_model(one: Any, other: Any) -> bool:
    """Whether two modules are the same one, compiled or not."""
    return getattr(one, "_orig_mod", one) is getattr(other, "_orig_mod", other)


def _busy() -> InUseError:
    return InUseError(
        "this denoiser is generating in another thread, and one fusion can be at one step only; "
        "wait for it, or give each thread its own pipeline."
    )


def _watched(plain: type, watch: PipelineWatch) -> type:
    set_attribute: Any = plain.__setattr__

    def assign(self: Any, name: str, value: Any) -> None:
        watch.assign(name, value)
        set_attribute(self, name, value)

    namespace: dict[str, Any] = {
        "__setattr__": assign,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        _WATCH: watch,
    }
    if callable(getattr(plain, "__call__", None)):  # noqa: B004  (the class's, for instances)
        generate = plain.__call__

        @functools.wraps(generate)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return watch.generate(generate, self, *args, **kwargs)

        namespace["__call__"] = call
    return type(plain.__name__, (plain,), namespace)
