"""The clock: it follows the scheduler instance to know which step is running.

Every sampling loop calls its scheduler in the same order: ``set_timesteps`` before the loop,
``scale_model_input`` (in some loops) before the denoiser, ``step`` after it. The timestep that a
loop passes is a view of the scheduler's own ``timesteps``, so its storage offset *is* the index,
without waiting for a GPU. If it is not a view, its value is looked up if it is on the host; else
the clock uses ``set_begin_index`` and counts steps.

The scheduler instance gets its own subclass (`layers.subclass`), so the shared class, the
instance's ``__dict__`` and all signatures stay as they are. A copy of the scheduler drives the
same clock; a pickled copy does not.

The progress of a step is its place among the steps, or follows the noise (`noise_levels`). For the
latter, the levels are read when timesteps are set, so no step waits for a GPU.

The denoiser reports the timestep of each evaluation (:meth:`Clock.evaluate`). This shows whether
the running loop uses a followed scheduler.

Some pipelines also evaluate the denoiser outside of their loops, to fill a cache with keys and
values of what is clean already: a given image or video, a chunk that a loop has just finished. They
tell it timestep 0, which is the end of the schedule.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal

from klora_runtime.artifact.timeline import ClockName, progress_of_step
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.layers.subclass import Overlay, inherited, plain_twin
from klora_runtime.pipeline.noise_levels import NoiseSteps, noise_level_of, order_of
from klora_runtime.pipeline.occupancy import Occupancy
from klora_runtime.pipeline.timesteps import (
    Reader,
    differ,
    evaluations_of,
    index_by_value,
    index_by_view,
    is_clean,
    timestep_reader,
)

#: Methods that a scheduler must have; ``scale_model_input`` and ``set_begin_index`` are optional.
_NEEDED = ("set_timesteps", "step")

#: Progress at the end of the schedule, after the last step.
_END = 1.0


class Clock:
    """A clock that follows schedulers and reports progress.

    Args:
        on_progress: called with the progress of the next step before the denoiser runs: when a
            loop begins, and whenever the progress changes.
        occupancy: decides which loop may sample; asked first in each wrapped method.
        on_begin: called when a loop begins, after its timesteps were set.

    Attributes:
        progress: progress of the current step, 1 at the end; None before the first run.
        name: what progress follows, ``step`` or ``noise``; set it before :meth:`attach`.
    """

    def __init__(
        self,
        on_progress: Callable[[float], None],
        occupancy: Occupancy,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.progress: float | None = None
        self.name: ClockName = "step"
        self._on_progress = on_progress
        self._occupancy = occupancy
        self._on_begin = on_begin
        self._overlay = Overlay(self._methods)
        # Followed scheduler, original or copy -> the index it has reached by counting.
        self._index: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        # Followed scheduler -> the progress of each of its steps by noise.
        self._by_noise: weakref.WeakKeyDictionary[Any, NoiseSteps] = weakref.WeakKeyDictionary()
        self._told_by: weakref.ref[Any] | None = None  # the scheduler that was called last
        self._begun_by: weakref.ref[Any] | None = None  # the one whose timesteps were set last
        self._where: Literal["before", "in", "after"] = "in"  # where in its loop a call is
        self._timestep: Any = None  # of the first evaluation since the scheduler's last call
        self._blind = False  # an evaluation since then did not say its timestep

    def attach(self, scheduler: Any) -> None:
        """Follow ``scheduler``; copies of a followed scheduler are followed already.

        Raises:
            IncompatibleModelError: the scheduler lacks a needed method, something replaced a
                method on the instance, it samples in stages, or it does not tell its noise and the
                clock follows that.
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
        stages = getattr(getattr(scheduler, "config", None), "stages", 1)
        if stages != 1:
            raise IncompatibleModelError(
                f"this {type(scheduler).__name__} samples in {stages} stages, each with a schedule "
                "of its own, so no step of the whole is known. Use a scheduler with stages=1."
            )
        if self.name == "noise":
            noise_level_of(scheduler)
        self._index.setdefault(scheduler, 0)
        self._overlay.put_on(scheduler)

    def detach(self) -> None:
        """Stop for good, and give every followed scheduler its class back."""
        self._overlay.retire(list(self._index))
        self._index.clear()
        self._by_noise.clear()
        self._on_progress, self._on_begin = _ignore, _ignore
        self._told_by = self._begun_by = self._timestep = None

    def rewind(self) -> None:
        """Begin a call of the pipeline: its evaluations before the loop are at progress 0."""
        self.progress = self._timestep = None
        self._where = "before"
        self._on_progress(0.0)

    def evaluate(self, timestep: Any) -> None:
        """Check that the denoiser, which is about to run, belongs to a followed loop.

        Args:
            timestep: the denoiser's timestep argument; None if unknown.

        Raises:
            InUseError: no loop over a followed scheduler is running, or the timestep belongs to
                another loop.
        """
        scheduler, index = self._place_of(timestep)
        if scheduler is None:
            if not self._occupancy.going_on:
                raise InUseError(f"{_NOT_FOLLOWED} (To call the denoiser by hand, {_BY_HAND})")
            self._occupancy.go_on(at_known_step=self._timestep is None)  # between two steps
            if self._where == "after" or (self._where == "before" and is_clean(timestep)):
                self._report(_END)
        else:
            self._go_on(scheduler, index)
            if index != self._index.get(scheduler) or not self._was_told_by(scheduler):
                self._move(scheduler, index)
        if timestep is not None:
            self._require_one_timestep(timestep)
        elif self._overlay.active:
            self._blind = True

    def _place_of(self, timestep: Any) -> tuple[Any, int]:
        """Return the scheduler whose list has the timestep (last called first), and the index."""
        seen = list(self._index)
        for scheduler in sorted(seen, key=self._was_told_by, reverse=True):
            index = index_by_view(scheduler.timesteps, timestep)
            if index is not None:
                return scheduler, index
        return None, 0

    def _was_told_by(self, scheduler: Any) -> bool:
        """Return whether this scheduler was called last."""
        return self._told_by is not None and self._told_by() is scheduler

    def _require_one_timestep(self, timestep: Any) -> None:
        """Refuse a second timestep between two calls of the scheduler."""
        if self._timestep is None:
            self._timestep = timestep
        elif differ(self._timestep, timestep, wait=not self._occupancy.in_call):
            raise InUseError(
                f"{_NOT_FOLLOWED} (It went from one timestep to another, and the scheduler was "
                f"not told. To call the denoiser by hand, {_BY_HAND})"
            )

    def _methods(self, plain: type) -> dict[str, Any]:
        """Return the attributes of the subclass of a scheduler's class ``plain``."""
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
            if self.name == "noise":
                self._by_noise[scheduler] = NoiseSteps.of(scheduler)
            self._occupancy.begin()
            self._begun_by = weakref.ref(scheduler)
            self._on_begin()
            self.progress = None  # report it again, in case an earlier write was interrupted
        self._move(scheduler, 0)

    def _go_on(self, scheduler: Any, index: int) -> None:
        """React to a coming call of ``scheduler`` for step ``index``."""
        if self._overlay.active:
            known = self._was_told_by(scheduler) and index == self._index.get(scheduler)
            self._occupancy.go_on(at_known_step=known)

    def _require_the_step_of_the_evaluation(self, scheduler: Any, index: int) -> None:
        """Refuse a loop that began in the middle, and whose denoiser could not say so."""
        began = self._index.get(scheduler, 0)
        if self._blind and self._was_told_by(scheduler) and index != began:
            raise InUseError(
                f"the denoiser ran for step {began + 1} of the schedule, and the scheduler was "
                f"then called for step {index + 1}. This denoiser is not told its timestep, so "
                "the loop must begin at the first step: call the pipeline with strength=1."
            )

    def _move(self, scheduler: Any, index: int) -> None:
        """Move to step ``index`` of the scheduler's full list."""
        if not self._overlay.active:
            return
        self._index[scheduler] = index
        self._told_by, self._timestep = weakref.ref(scheduler), None
        self._blind = False
        if not 0 <= index < evaluations_of(scheduler):
            if self._begun_by is not None and self._begun_by() is scheduler:  # not a copy
                self._where = "after"
                self._occupancy.end()
            return
        self._where = "in"
        self._report(self._progress_at(scheduler, index))

    def _report(self, progress: float) -> None:
        """Tell a change of progress."""
        if progress != self.progress:
            self.progress = None  # stays so if the next line raises
            self._on_progress(progress)
            self.progress = progress

    def _progress_at(self, scheduler: Any, index: int) -> float:
        """Return the progress of the step that an evaluation belongs to."""
        order = order_of(scheduler)
        step, steps = index // order, -(-evaluations_of(scheduler) // order)
        if self.name == "step":
            return progress_of_step(step, steps)
        known = self._by_noise.get(scheduler)
        if known is None or not known.hold(scheduler, steps):  # swapped or written in between
            known = self._by_noise[scheduler] = NoiseSteps.of(scheduler)
        return known.progress[step]


_NOT_FOLLOWED = (
    "the denoiser runs, but the scheduler that the fusion follows does not. Another pipeline may "
    "share the denoiser and have a scheduler of its own: give it the scheduler of the pipeline "
    "that carries the fusion, or apply the fusion to that other pipeline."
)
_BY_HAND = "call scheduler.set_timesteps first and scheduler.step after each step."


def _ignore(*_: object) -> None:
    """Do nothing: the listener of a stopped clock."""


_Method = Callable[..., Any]


def _after_the_sample(method: _Method) -> Reader:
    """Return a reader of the timestep from the arguments after the first one, a sample."""
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
        clock._require_the_step_of_the_evaluation(self, index)
        result = original(self, model_output, *args, **kwargs)
        clock._move(self, index + 1)
        return result

    return step


def _batch_step(clock: Clock, original: _Method) -> _Method:
    def batch_step_no_noise(self: Any, *args: Any, **kwargs: Any) -> Any:
        if clock._overlay.active:
            raise InUseError(
                "the loop samples several steps in one evaluation of the denoiser, and a layer has "
                "the LoRAs of one step. Use a pipeline that calls scheduler.step after each step."
            )
        return original(self, *args, **kwargs)

    return batch_step_no_noise


def _copying(clock: Clock, plain: type) -> dict[str, Any]:
    """Return methods for copying: copies are followed, and pickles are ordinary schedulers."""

    def twin_of(scheduler: Any) -> Any:
        twin = object.__new__(type(scheduler))
        if clock._overlay.active and scheduler in clock._index:
            clock._index[twin] = clock._index[scheduler]
            if scheduler in clock._by_noise:
                clock._by_noise[twin] = clock._by_noise[scheduler]
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
        return plain_twin(self, plain).__reduce_ex__(1)  # later protocols need the class of self

    return {"__copy__": copied, "__deepcopy__": deep_copied, "__reduce_ex__": reduced}


#: The wrapped methods, each with the wrapper that informs the clock.
_WRAPPERS: dict[str, Callable[[Clock, _Method], _Method]] = {
    "set_timesteps": _set_timesteps,
    "set_begin_index": _set_begin_index,
    "scale_model_input": _scale_model_input,
    "step": _step,
    "batch_step_no_noise": _batch_step,
}
