"""The clock: which step of which schedule is running. The scheduler instance itself tells it.

A scheduler is the one object that every sampling loop talks to in the right order:
``set_timesteps`` before the loop, ``scale_model_input`` (where the loop has it) before the
denoiser, ``step`` after it. The timestep that a loop passes is a view of the scheduler's own
``timesteps``, so its storage offset *is* the index, without waiting for a GPU. Where it is not a
view, its value is looked up if it is on the host, and then ``set_begin_index`` and counting
take over.

The scheduler instance gets a class of its own (`layers.subclass`), so the shared class and the
instance's ``__dict__`` stay untouched and signatures stay true. A copy drives the same clock; one
that was pickled does not.

The denoiser tells the timestep that it is about to run at (:meth:`Clock.evaluate`). That shows
whether the loop that runs it is the one over the followed scheduler.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

from klora_runtime.artifact.timeline import progress_of_step
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.layers.subclass import Overlay, inherited, plain_twin
from klora_runtime.pipeline.occupancy import Occupancy
from klora_runtime.pipeline.timesteps import (
    Reader,
    differ,
    index_by_value,
    index_by_view,
    timestep_reader,
)

#: What a scheduler must have; ``scale_model_input`` and ``set_begin_index`` are used where it does.
_NEEDED = ("set_timesteps", "step")


class Clock:
    """Follows schedulers and reports progress.

    Args:
        on_progress: called with the progress of the step that is about to run, before the
            denoiser does: when a loop begins, and whenever it changes.
        occupancy: which loop may sample; asked before each wrapped method does anything.
        on_begin: called when a loop begins, after its timesteps are set.

    Attributes:
        progress: of the current step; None before the first run.
    """

    def __init__(
        self,
        on_progress: Callable[[float], None],
        occupancy: Occupancy,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.progress: float | None = None
        self._on_progress = on_progress
        self._occupancy = occupancy
        self._on_begin = on_begin
        self._overlay = Overlay(self._methods)
        # Each scheduler seen, original or copy -> the index it has reached by counting.
        self._index: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._told_by: weakref.ref[Any] | None = None  # the scheduler that spoke last
        self._begun_by: weakref.ref[Any] | None = None  # the one whose timesteps were set last
        self._timestep: Any = None  # of the first evaluation since the last word

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
                + "; ".join(
                    [f"it has no {name}" for name in missing]
                    + [f"its {name} was replaced on this instance" for name in covered]
                )
                + ". Use an unchanged scheduler of diffusers."
            )
        self._index.setdefault(scheduler, 0)
        self._overlay.put_on(scheduler)

    def detach(self) -> None:
        """Stop for good, and give every scheduler that was seen its class back."""
        self._overlay.retire(list(self._index))
        self._index.clear()
        self._on_progress, self._on_begin = _ignore, _ignore
        self._told_by = self._begun_by = self._timestep = None

    def rewind(self) -> None:
        """A call of the pipeline begins; what it evaluates before its loop is at progress 0."""
        self.progress = self._timestep = None
        self._on_progress(0.0)

    def evaluate(self, timestep: Any) -> None:
        """The denoiser is about to run.

        Args:
            timestep: what it is given as that; None where it is not known.

        Raises:
            InUseError: no loop over a followed scheduler is going on, or it is not this one.
        """
        scheduler, index = self._place_of(timestep)
        if scheduler is None:
            if not self._occupancy.going_on:
                raise InUseError(f"{_NOT_FOLLOWED} (To call the denoiser by hand, {_BY_HAND})")
            self._occupancy.go_on(at_known_step=self._timestep is None)  # between two steps
        else:
            self._go_on(scheduler, index)
            if index != self._index.get(scheduler) or not self._was_told_by(scheduler):
                self._move(scheduler, index)
        if timestep is not None:
            self._require_one_timestep(timestep)

    def _place_of(self, timestep: Any) -> tuple[Any, int]:
        """The scheduler whose list a timestep is in, the one that spoke last first; and where."""
        seen = list(self._index)
        for scheduler in sorted(seen, key=self._was_told_by, reverse=True):
            index = index_by_view(scheduler.timesteps, timestep)
            if index is not None:
                return scheduler, index
        return None, 0

    def _was_told_by(self, scheduler: Any) -> bool:
        """Whether this scheduler spoke last."""
        return self._told_by is not None and self._told_by() is scheduler

    def _require_one_timestep(self, timestep: Any) -> None:
        """Between two calls of the scheduler the denoiser must not see two timesteps."""
        if self._timestep is None:
            self._timestep = timestep
        elif differ(self._timestep, timestep, wait=not self._occupancy.in_call):
            raise InUseError(
                f"{_NOT_FOLLOWED} (It went from one timestep to another, and the scheduler was "
                f"not told. To call the denoiser by hand, {_BY_HAND})"
            )

    def _methods(self, plain: type) -> dict[str, Any]:
        """What is different in a scheduler of class ``plain``."""
        wrapped = {
            name: functools.wraps(original)(wrap(self, original))
            for name, wrap in _WRAPPERS.items()
            if (original := inherited(plain, name)) is not None
        }
        return wrapped | _copying(self, plain)

    def _index_of(self, scheduler: Any, timestep: Any) -> int:
        counted = self._index.get(scheduler, 0)
        index = index_by_view(scheduler.timesteps, timestep)
        if index is None:
            index = index_by_value(scheduler.timesteps, timestep, counted)
        return counted if index is None else index

    def _begin(self, scheduler: Any) -> None:
        if self._overlay.active:
            self._occupancy.begin()
            self._begun_by = weakref.ref(scheduler)
            self._on_begin()
            self.progress = None  # told anew, so that whatever was interrupted is made good
        self._move(scheduler, 0)

    def _go_on(self, scheduler: Any, index: int) -> None:
        """``scheduler`` is about to be told something about step ``index``."""
        if self._overlay.active:
            known = self._was_told_by(scheduler) and index == self._index.get(scheduler)
            self._occupancy.go_on(at_known_step=known)

    def _move(self, scheduler: Any, index: int) -> None:
        """Step ``index`` of the scheduler's full list comes next."""
        if not self._overlay.active:
            return
        self._index[scheduler] = index
        self._told_by, self._timestep = weakref.ref(scheduler), None
        order = max(1, int(getattr(scheduler, "order", 1)))
        evaluations = 0 if scheduler.timesteps is None else len(scheduler.timesteps)
        if not 0 <= index < evaluations:
            if self._begun_by is not None and self._begun_by() is scheduler:  # and no copy of it
                self._occupancy.end()
            return
        steps = -(-evaluations // order)
        progress = progress_of_step(index // order, steps)
        if progress != self.progress:
            self.progress = None  # stays so if the next line raises
            self._on_progress(progress)
            self.progress = progress


_NOT_FOLLOWED = (
    "the denoiser runs, but the scheduler that the fusion follows does not. Another pipeline may "
    "share the denoiser and have a scheduler of its own: give it the scheduler of the pipeline "
    "that carries the fusion, or apply the fusion to that other pipeline."
)
_BY_HAND = "call scheduler.set_timesteps first and scheduler.step after each step."


def _ignore(*_: object) -> None:
    """Whom a stopped clock tells."""


_Method = Callable[..., Any]


def _after_the_sample(method: _Method) -> Reader:
    """Reads the timestep from the arguments after the first one, which is a sample."""
    return timestep_reader(method, skip=2, otherwise=0)


def _set_timesteps(clock: Clock, original: _Method) -> _Method:
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        if clock._overlay.active:
            clock._occupancy.require_no_other_call()
        result = original(self, *args, **kwargs)
        clock._begin(self)
        return result

    return set_timesteps


def _set_begin_index(clock: Clock, original: _Method) -> _Method:
    def set_begin_index(self: Any, begin_index: int = 0, *args: Any, **kwargs: Any) -> Any:
        clock._go_on(self, begin_index)
        result = original(self, begin_index, *args, **kwargs)
        clock._move(self, begin_index)
        return result

    return set_begin_index


def _scale_model_input(clock: Clock, original: _Method) -> _Method:
    timestep = _after_the_sample(original)

    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        index = clock._index_of(self, timestep(args, kwargs))
        clock._go_on(self, index)
        clock._move(self, index)
        return original(self, sample, *args, **kwargs)

    return scale_model_input


def _step(clock: Clock, original: _Method) -> _Method:
    timestep = _after_the_sample(original)

    def step(self: Any, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        index = clock._index_of(self, timestep(args, kwargs))
        clock._go_on(self, index)
        result = original(self, model_output, *args, **kwargs)
        clock._move(self, index + 1)
        return result

    return step


def _copying(clock: Clock, plain: type) -> dict[str, Any]:
    """Copies are followed from where the scheduler is; what is pickled is an ordinary scheduler."""

    def twin_of(scheduler: Any) -> Any:
        twin = object.__new__(type(scheduler))
        if clock._overlay.active and scheduler in clock._index:
            clock._index[twin] = clock._index[scheduler]
        return twin

    def copied(self: Any) -> Any:
        twin = twin_of(self)
        vars(twin).update(vars(self))
        return twin

    def deep_copied(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = twin_of(self)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def reduced(self: Any, _: Any) -> Any:
        return plain_twin(self, plain).__reduce_ex__(1)  # later ones insist on the class of self

    return {"__copy__": copied, "__deepcopy__": deep_copied, "__reduce_ex__": reduced}


#: The methods that are wrapped, each with the wrapper that tells the clock.
_WRAPPERS: dict[str, Callable[[Clock, _Method], _Method]] = {
    "set_timesteps": _set_timesteps,
    "set_begin_index": _set_begin_index,
    "scale_model_input": _scale_model_input,
    "step": _step,
}
