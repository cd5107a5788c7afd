"""The clock: which step of which schedule is running, told by the scheduler instance itself.

A scheduler is the one object that every sampling loop talks to in the right order:
``set_timesteps`` before the loop, ``scale_model_input`` (where the loop has it) before the
denoiser, ``step`` after it. The timestep that a loop passes is a view of the scheduler's own
``timesteps``, so its storage offset *is* the index, without waiting for a GPU. Where it is not a
view, its value is looked up if it is on the host, and then ``set_begin_index`` and counting
take over.

The scheduler instance gets a class of its own (`own_class`), so the shared class and the
instance's ``__dict__`` stay untouched, signatures stay true, and a deep copy drives the same clock.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from klora_runtime.errors import IncompatibleModelError
from klora_runtime.own_class import Overlay, take_off
from klora_runtime.timeline import progress_of_step

#: What a scheduler must have; ``scale_model_input`` and ``set_begin_index`` are used where it does.
_NEEDED = ("set_timesteps", "step")


class Clock:
    """Follows schedulers and reports progress.

    Args:
        on_run: called when a run begins, after its timesteps are set.
        on_progress: called with the progress of the step that is about to run, before the
            denoiser does: when a run begins, and whenever it changes.
        guard: called before each wrapped method; what it raises keeps the method from running.

    Attributes:
        progress: of the current step; None before the first run.
        thread: the thread in which a run is going on; None between runs.
    """

    def __init__(
        self,
        on_progress: Callable[[float], None],
        guard: Callable[[], None] = lambda: None,
        on_run: Callable[[], None] = lambda: None,
    ) -> None:
        self.progress: float | None = None
        self.thread: int | None = None
        self._on_progress = on_progress
        self._on_run = on_run
        self._guard = guard
        self._overlay = Overlay(self._methods)
        # Each scheduler seen, original or copy -> the index it has reached by counting.
        self._index: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def attach(self, scheduler: Any) -> None:
        """Follow ``scheduler``. A copy of a followed scheduler is followed already.

        Raises:
            IncompatibleModelError: it has no steps to follow, or something else has replaced its
                methods on the instance.
        """
        missing = [name for name in _NEEDED if not callable(getattr(scheduler, name, None))]
        covered = [name for name in _WRAPPERS if name in vars(scheduler)]
        if missing or covered:
            raise IncompatibleModelError(
                f"this {type(scheduler).__name__} cannot be followed: "
                + (f"it has no {' and no '.join(missing)}" if missing else "")
                + (f"its {', '.join(covered)} was replaced on the instance" if covered else "")
                + "; use a diffusers scheduler as it is."
            )
        self._index.setdefault(scheduler, 0)
        self._overlay.put_on(scheduler)

    def detach(self) -> None:
        """Stop for good, and give every scheduler that was seen its class back."""
        self._overlay.active = False
        for scheduler in list(self._index):
            take_off(scheduler)
        self._index.clear()
        self._on_progress, self._on_run, self._guard = _ignore, _ignore, _ignore

    def end_run(self) -> None:
        """The run is over, also where it was interrupted."""
        self.thread = None

    def _methods(self, plain: type) -> dict[str, Any]:
        """The wrapped methods for a scheduler of class ``plain``."""
        return {
            name: functools.wraps(original)(wrap(self, original))
            for name, wrap in _WRAPPERS.items()
            if (original := getattr(plain, name, None)) is not None
        }

    def _index_of(self, scheduler: Any, timestep: Any) -> int:
        counted = self._index.get(scheduler, 0)
        index = _index_by_view(scheduler.timesteps, timestep)
        if index is None:
            index = _index_by_value(scheduler.timesteps, timestep, counted)
        return counted if index is None else index

    def _begin(self, scheduler: Any) -> None:
        if self._overlay.active:
            self._on_run()
            self.progress = None  # told anew, so that whatever was interrupted is made good
        self._move(scheduler, 0)

    def _move(self, scheduler: Any, index: int) -> None:
        """Step ``index`` of the scheduler's full list comes next."""
        if not self._overlay.active:
            return
        self._index[scheduler] = index
        order = max(1, int(getattr(scheduler, "order", 1)))
        evaluations = 0 if scheduler.timesteps is None else len(scheduler.timesteps)
        if not 0 <= index < evaluations:
            self.end_run()  # the next one begins with set_timesteps
            return
        self.thread = threading.get_ident()
        steps = -(-evaluations // order)
        progress = progress_of_step(index // order, steps)
        if progress != self.progress:
            self.progress = None  # stays so if the next line raises
            self._on_progress(progress)
            self.progress = progress


def _ignore(*_: object) -> None:
    """What a stopped clock tells."""


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


def _index_by_value(timesteps: Any, timestep: Any, counted: int) -> int | None:
    """Index of a host-side ``timestep`` by its value, at or after the counted index; else None.

    Nothing is looked up on a GPU: that would wait for it. A value may occur twice in a row (PNDM,
    Heun), hence the counted index.
    """
    if isinstance(timestep, torch.Tensor):
        if timestep.numel() != 1 or timestep.device.type != "cpu":
            return None
        timestep = timestep.item()
    if not isinstance(timesteps, torch.Tensor) or timesteps.device.type != "cpu":
        return None
    matches = (timesteps == timestep).nonzero().flatten().tolist()
    return next((index for index in matches if index >= counted), None)


_Method = Callable[..., Any]


def _timestep(method: _Method) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """What takes the timestep from the arguments after the first one.

    It is the first of them, but CogVideoX's DPM scheduler steps with another before it.
    """
    names = list(inspect.signature(method).parameters)
    place = names.index("timestep") - 2 if "timestep" in names else 0

    def take(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[place] if place < len(args) else kwargs.get("timestep")

    return take


def _set_timesteps(clock: Clock, original: _Method) -> _Method:
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock._guard()
        result = original(self, *args, **kwargs)
        clock._begin(self)
        return result

    return set_timesteps


def _set_begin_index(clock: Clock, original: _Method) -> _Method:
    def set_begin_index(self: Any, begin_index: int = 0, *args: Any, **kwargs: Any) -> Any:
        clock._guard()
        result = original(self, begin_index, *args, **kwargs)
        clock._move(self, begin_index)
        return result

    return set_begin_index


def _scale_model_input(clock: Clock, original: _Method) -> _Method:
    timestep = _timestep(original)

    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        clock._guard()
        clock._move(self, clock._index_of(self, timestep(args, kwargs)))
        return original(self, sample, *args, **kwargs)

    return scale_model_input


def _step(clock: Clock, original: _Method) -> _Method:
    timestep = _timestep(original)

    def step(self: Any, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        clock._guard()
        index = clock._index_of(self, timestep(args, kwargs))
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
