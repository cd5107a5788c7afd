"""Occupancy: one loop at a time samples with a fusion, in one thread.

A *call* of the watched pipeline has a definite end, and other threads are refused until then. Any
other loop (by hand, or of a pipeline that shares the scheduler) is visible only through the calls
of its scheduler: it begins with ``set_timesteps``, and nothing shows when it is abandoned. So the
next loop that begins takes over, and the earlier loop is refused from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from klora_runtime.errors import InUseError


class Occupancy:
    """The record of the loop that may sample now, and its thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._calls = 0

    @property
    def going_on(self) -> bool:
        """Whether a loop has begun and is not known to have ended."""
        return self._thread is not None

    @property
    def in_call(self) -> bool:
        """Whether the running loop is a call of the watched pipeline."""
        return self._calls > 0

    @contextmanager
    def call(self) -> Iterator[bool]:
        """Mark the block as a call of the watched pipeline, which may call itself.

        Yields:
            Whether the call is the outermost one.

        Raises:
            InUseError: another thread is in a call.
        """
        with self._lock:
            self._require_no_other_call()
            self._thread = threading.current_thread()
            self._calls += 1
        try:
            yield self._calls == 1
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0:
                    self._thread = None

    def require_no_other_call(self) -> None:
        """Check that no other thread is in a call.

        Raises:
            InUseError: another thread is in a call.
        """
        with self._lock:
            self._require_no_other_call()

    def begin(self) -> None:
        """Begin a loop in this thread.

        Raises:
            InUseError: another thread is in a call.
        """
        with self._lock:
            self._require_no_other_call()
            self._thread = threading.current_thread()

    def go_on(self, *, at_known_step: bool = False) -> None:
        """Continue a loop in this thread.

        Args:
            at_known_step: whether the caller is at the expected next step. If so, the loop may have
                moved to another thread (a generator that a server drains).

        Raises:
            InUseError: the loop belongs to another thread.
        """
        with self._lock:
            here = threading.current_thread()
            if self._thread not in (None, here) and (self._calls or not at_known_step):
                raise self._busy()
            self._thread = here

    def end(self) -> None:
        """End the loop after its last step; a call lasts until it returns."""
        with self._lock:
            if self._calls == 0:
                self._thread = None

    @contextmanager
    def change(self) -> Iterator[None]:
        """Let no other thread sample inside the block, which changes the fusion.

        Raises:
            InUseError: another thread samples, or has abandoned a loop and is still alive.
        """
        with self._lock:
            before = self._thread
            elsewhere = before not in (None, threading.current_thread())
            if elsewhere and (self._calls or before in threading.enumerate()):
                raise self._busy()
            self._thread = threading.current_thread()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._thread = None if elsewhere else before

    def _require_no_other_call(self) -> None:
        if self._calls and self._thread != threading.current_thread():
            raise self._busy()

    def _busy(self) -> InUseError:
        abandoned = (
            " (If that loop was abandoned, call pipe.scheduler.set_timesteps in this thread to end "
            "it.)"
        )
        return InUseError(
            "this denoiser is generating in another thread, and one fusion can be at one step "
            "only; wait for it, or give each thread its own pipeline."
            + ("" if self._calls else abandoned)
        )
