"""What one pipeline instance does while a fusion is on it.

Assignments to its components are seen, one generation runs at a time, and the methods that would
make a wrong picture or a wrong file are refused by name. Only this instance is concerned: it gets
a class of its own (`own_class`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

from klora_runtime.errors import InUseError
from klora_runtime.own_class import Overlay, take_off

#: Methods that are refused while a fusion is applied, and what they would do.
_REFUSED: Mapping[str, str] = {
    "load_lora_weights": "a LoRA on top of the fusion would be lost at the next switch",
    "fuse_lora": "what it fuses would be lost at the next switch",
    "unfuse_lora": "it would subtract from weights that a switch has written anew",
    "fuse_qkv_projections": "the fused projections would not follow the fusion",
    "enable_sequential_cpu_offload": "the weights would be out of reach",
    "enable_group_offload": "it keeps its own copies of the weights",
    "__reduce_ex__": "a copy (deepcopy or pickle) would keep the merged weights for ever",
}


class PipelineWatch:
    """Watches one pipeline.

    Args:
        pipe: the pipeline instance.
        on_scheduler: called with a scheduler that is being assigned to the pipeline.
        bare: gives a context in which the model is bare, for saving it.

    Attributes:
        components: names of the components that carry the fusion.
    """

    def __init__(
        self,
        pipe: Any,
        on_scheduler: Callable[[Any], None],
        bare: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.components: Collection[str] = ()
        self._pipe = pipe
        self._on_scheduler = on_scheduler
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
        self._pipe = self._on_scheduler = self._bare = None  # type: ignore[assignment]

    def check_thread(self) -> None:
        """Refuse a thread other than the one that is generating.

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
        for name, reason in _REFUSED.items():
            if callable(getattr(plain, name, None)):
                methods[name] = self._refused(getattr(plain, name), name, reason)
        for name, wrap in {"__call__": self.generate, "save_pretrained": self._save}.items():
            if callable(_attribute(plain, name)):
                methods[name] = self._through(wrap, _attribute(plain, name))
        return methods

    def _refused(self, method: Callable[..., Any], name: str, reason: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def refused(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if self._watches(pipe):
                raise InUseError(
                    f"{name.strip('_')} is not possible while a fusion is applied: {reason}. Call "
                    ".remove() on the handle first."
                )
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


def _busy() -> InUseError:
    return InUseError(
        "this denoiser is generating in another thread, and one fusion can be at one step only; "
        "wait for it, or give each thread its own pipeline."
    )
