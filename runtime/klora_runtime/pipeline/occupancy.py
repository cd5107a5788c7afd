"""Who is sampling with a fusion: one loop at a time, and in which thread.

A *call* is one of the watched pipeline: it has a certain end, and no other thread gets in between.
Any other loop (by hand, or of a pipeline that shares the scheduler) is only known by what it tells
its scheduler: it begins with ``set_timesteps``, and an abandoned one gives no signal. So the
next loop that begins takes over, and the earlier one is refused whatever it does next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from klora_runtime.errors import InUseError


class Occupancy:
    """Which thread's loop may sample now: one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._calls = 0

    @property
    def going_on(self) -> bool:
        """Whether a loop has begun and, as far as anybody knows, not ended."""
        return self._thread is not None

    @property
    def in_call(self) -> bool:
        """Whether it is a call of the watched pipeline."""
        return self._calls > 0

    @contextmanager
    def call(self) -> Iterator[bool]:
        """Around one call of the watched pipeline, which may call itself.

        Yields:
            Whether it is the outermost.

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
        """See that no other thread is in a call.

        Raises:
            InUseError: one is.
        """
        with self._lock:
            self._require_no_other_call()

    def begin(self) -> None:
        """A loop begins in this thread.

        Raises:
            InUseError: another thread is in a call.
        """
        with self._lock:
            self._require_no_other_call()
            self._thread = threading.current_thread()

    def go_on(self, *, at_known_step: bool = False) -> None:
        """A loop goes on in this thread.

        Args:
            at_known_step: True if the caller is at the step that is expected next. The loop may
                then have moved to another thread (a generator that a server drains).

        Raises:
            InUseError: it is another thread's.
        """
        with self._lock:
            here = threading.current_thread()
            if self._thread not in (None, here) and (self._calls or not at_known_step):
                raise self._busy()
            self._thread = here

    def end(self) -> None:
        """The loop is through its steps. A call goes on until it returns."""
        with self._lock:
            if self._calls == 0:
                self._thread = None

    @contextmanager
    def change(self) -> Iterator[None]:
        """Around a change of what is sampled with: no other thread samples meanwhile.

        Raises:
            InUseError: one does, or has abandoned a loop and still lives.
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
