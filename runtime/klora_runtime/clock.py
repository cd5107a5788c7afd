"""The clock: which step of which schedule is running, told by the scheduler instance itself.

A scheduler is the one object that every sampling loop talks to in the right order:
``set_timesteps`` before the loop, ``scale_model_input`` (where the loop has it) before the
denoiser, ``step`` after it. The timestep that a loop passes is a view of the scheduler's own
``timesteps``, so its storage offset *is* the index, without waiting for a GPU; where it is not a
view, ``set_begin_index`` and then counting take over.

The wrappers are bound methods in the instance's ``__dict__``: the class stays untouched, the
signatures stay true, and a deep copy of a scheduler drives the same clock. What an instance had
there before, another clock's wrapper included, is called from the wrapper and comes back later.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch

from klora_runtime.timeline import progress_of_step

_CLOCK_OF_WRAPPER = "_klora_clock"
_COVERED_BY_WRAPPER = "_klora_covered"


class Clock:
    """Follows schedulers and reports progress.

    Args:
        on_progress: called with the progress of the step that is about to run, before the
            denoiser does; only when it differs from the last one reported.
        guard: called before each wrapped method; what it raises keeps the method from running.

    Attributes:
        progress: of the current step; None before the first run.
    """

    def __init__(
        self, on_progress: Callable[[float], None], guard: Callable[[], None] = lambda: None
    ) -> None:
        self.progress: float | None = None
        self._on_progress = on_progress
        self._guard = guard
        self._running = True
        # Each scheduler seen, original or copy -> the index it has reached by counting.
        self._index: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def attach(self, scheduler: Any) -> None:
        """Follow ``scheduler``. A copy of a followed scheduler is followed already."""
        self._index.setdefault(scheduler, 0)
        for name, wrap in _WRAPPERS.items():
            _uncover(scheduler, name)
            covered = vars(scheduler).get(name)
            original = _function(covered, scheduler) or getattr(type(scheduler), name, None)
            if original is not None and not self._drives(covered):
                wrapper = functools.wraps(original)(wrap(self, original))
                setattr(wrapper, _CLOCK_OF_WRAPPER, self)
                setattr(wrapper, _COVERED_BY_WRAPPER, covered)
                vars(scheduler)[name] = types.MethodType(wrapper, scheduler)

    def detach(self) -> None:
        """Stop for good, and take the wrappers off every scheduler that was seen."""
        self._running = False
        for scheduler in list(self._index):
            for name in _WRAPPERS:
                _uncover(scheduler, name)

    def _drives(self, method: Any) -> bool:
        return getattr(method, _CLOCK_OF_WRAPPER, None) is self

    def _enter(self) -> None:
        if self._running:
            self._guard()

    def _index_of(self, scheduler: Any, timestep: Any) -> int:
        index = _index_by_view(scheduler.timesteps, timestep)
        return self._index.get(scheduler, 0) if index is None else index

    def _move(self, scheduler: Any, index: int) -> None:
        """Step ``index`` of the scheduler's full list comes next."""
        if not self._running:
            return
        self._index[scheduler] = index
        order = max(1, int(getattr(scheduler, "order", 1)))
        evaluations = 0 if scheduler.timesteps is None else len(scheduler.timesteps)
        if not 0 <= index < evaluations:
            return  # the run is over; the next one begins with set_timesteps
        steps = -(-evaluations // order)
        progress = progress_of_step(index // order, steps)
        if progress != self.progress:
            self.progress = None  # stays so if the next line raises
            self._on_progress(progress)
            self.progress = progress


def _function(method: Any, scheduler: Any) -> Callable[..., Any] | None:
    """What an instance holds in place of a method, as a function of the instance."""
    if method is None:
        return None
    if getattr(method, "__self__", None) is scheduler:
        return cast(Callable[..., Any], method.__func__)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return functools.wraps(method)(call)


def _uncover(scheduler: Any, name: str) -> None:
    """Take off the wrappers of stopped clocks, from the outside as far as there are any."""
    own = vars(scheduler)
    while (clock := getattr(own.get(name), _CLOCK_OF_WRAPPER, None)) and not clock._running:
        covered = getattr(own.pop(name), _COVERED_BY_WRAPPER)
        if hasattr(covered, _CLOCK_OF_WRAPPER):  # in a deep copy it is bound to the original
            covered = types.MethodType(covered.__func__, scheduler)
        if covered is not None:
            own[name] = covered


def _index_by_view(timesteps: Any, timestep: Any) -> int | None:
    """Index of ``timestep`` in ``timesteps`` where it is a view into that tensor, else None."""
    if not isinstance(timesteps, torch.Tensor) or not isinstance(timestep, torch.Tensor):
        return None
    if timestep.numel() != 1 or timesteps.dim() != 1 or timestep.dtype != timesteps.dtype:
        return None
    if timestep.device != timesteps.device:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    index = (timestep.storage_offset() - timesteps.storage_offset()) // max(1, timesteps.stride(0))
    return index if 0 <= index < len(timesteps) else None


_Method = Callable[..., Any]


def _set_timesteps(clock: Clock, original: _Method) -> _Method:
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock._enter()
        result = original(self, *args, **kwargs)
        clock._move(self, 0)
        return result

    return set_timesteps


def _set_begin_index(clock: Clock, original: _Method) -> _Method:
    def set_begin_index(self: Any, begin_index: int = 0, *args: Any, **kwargs: Any) -> Any:
        clock._enter()
        result = original(self, begin_index, *args, **kwargs)
        clock._move(self, begin_index)
        return result

    return set_begin_index


def _scale_model_input(clock: Clock, original: _Method) -> _Method:
    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        clock._enter()
        timestep = args[0] if args else kwargs.get("timestep")
        clock._move(self, clock._index_of(self, timestep))
        return original(self, sample, *args, **kwargs)

    return scale_model_input


def _step(clock: Clock, original: _Method) -> _Method:
    def step(self: Any, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        clock._enter()
        index = clock._index_of(self, args[0] if args else kwargs.get("timestep"))
        result = original(self, model_output, *args, **kwargs)
        clock._move(self, index + 1)
        return result

    return step


#: The methods that are wrapped, each with the wrapper that tells the clock.
_WRAPPERS: dict[str, Callable[[Clock, _Method], _Method]] = {
    "set_timesteps": _set_timesteps,
    "set_begin_index": _set_begin_index,
    "scale_model_input": _scale_model_input,
    "step": _step,
}
