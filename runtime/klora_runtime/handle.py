"""Applying a fusion to a pipeline, and the handle that changes or undoes it.

Order of everything in here: check all, allocate all, then change; where a change fails, every
weight goes back to the base.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import TracebackType
from typing import Any

from klora_runtime.artifact import load_fusion
from klora_runtime.clock import Clock
from klora_runtime.errors import ConfigError, IncompatibleModelError, InUseError, shown
from klora_runtime.fusion import Fusion
from klora_runtime.merge import Merge
from klora_runtime.pipeline_watch import PipelineWatch
from klora_runtime.pristine import Pristine
from klora_runtime.targets import (
    APPLIED_MARK,
    chosen_components,
    find_targets,
    original_module,
)

MODES = ("auto", "merge")


@dataclass(frozen=True)
class Report:
    """What a handle holds and how good it is; ``str()`` makes a short text of it."""

    mode: str
    why: str
    """Why this mode."""
    layers: Mapping[str, int]
    """Fate -> number of layers that are applied."""
    components: tuple[str, ...]
    switches: int
    """Single-layer switches in one run of the whole schedule."""
    weights: Mapping[str, float]
    enabled: bool
    progress: float | None
    """Of the step that ran last or runs now; None before the first."""
    rounding: float
    """||held delta - exact delta|| / ||exact delta|| over all layers; 0 is exact."""
    bytes_pristine: Mapping[str, int]
    """Device -> bytes of base weights kept for restoring."""
    bytes_factors: int
    """Bytes of factors and scratch kept for writing."""

    def __str__(self) -> str:
        fates = ", ".join(f"{count} {fate}" for fate, count in self.layers.items())
        kept = ", ".join(f"{size / 1e6:.1f} MB on {d}" for d, size in self.bytes_pristine.items())
        state = "" if self.enabled else " (disabled)"
        return (
            f"mode {self.mode}{state}: {self.why}\n"
            f"layers: {fates} in {', '.join(self.components)}; {self.switches} switches a run\n"
            f"rounding: {self.rounding:.2g} of the delta\n"
            f"memory: base weights {kept}; factors and scratch {self.bytes_factors / 1e6:.1f} MB"
        )


def apply_fusion(
    pipe: Any,
    path_or_fusion: str | os.PathLike[str] | Fusion,
    *,
    mode: str = "auto",
    components: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> FusionHandle:
    """Make a diffusers pipeline sample with a fusion. It stays an ordinary pipeline.

    Args:
        pipe: any diffusers pipeline with a scheduler.
        path_or_fusion: an artifact file, or one that :func:`load_fusion` has read.
        mode: ``merge`` writes base + delta into the live weights, only where something
            switches; ``auto`` chooses a mode (``merge`` is the only one at present).
        components: pipeline components to change; all of the fusion's by default.
        weights: slot name -> factor on its deltas, on top of the fusion's own; 1 by default.

    Returns:
        The handle: remove, swap, set, enable and report. Also a context manager.

    Raises:
        ArtifactError: the file breaks the format.
        ConfigError: an unknown mode, component or slot, or a weight that is not finite.
        IncompatibleModelError: the fusion does not fit the pipeline; nothing was changed.
        InUseError: the pipeline carries a fusion already.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    fusion = _fusion(path_or_fusion)
    return FusionHandle(pipe, fusion, components, weights or {})


class FusionHandle:
    """A fusion on a pipeline. Made by :func:`apply_fusion`; use as a context manager or keep it."""

    def __init__(
        self,
        pipe: Any,
        fusion: Fusion,
        components: Sequence[str] | None,
        weights: Mapping[str, float],
    ) -> None:
        self._pipe = pipe
        self._asked_components = components
        self._components: tuple[str, ...] = ()
        self._enabled = True
        self._removed = False
        self._pristine = Pristine()
        self._watch = PipelineWatch(pipe, self._follow)
        self._clock = Clock(self._on_progress, self._watch.check_thread)
        self._fusion = fusion
        self._weights = _checked_weights(fusion, weights)
        names, self._mode = self._prepare(fusion)
        self._write()
        self._mark(names)
        if getattr(pipe, "scheduler", None) is not None:
            self._follow(pipe.scheduler)
        self._watch.attach()

    def __enter__(self) -> FusionHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def fusion(self) -> Fusion:
        """The fusion that is applied now."""
        return self._fusion

    def remove(self) -> None:
        """Give every parameter back to the bit and take everything off the pipeline.

        Removing twice is removing once.
        """
        if self._removed:
            return
        self._pristine.restore(self._pristine.paths)
        self._pristine.forget(self._pristine.paths)
        self._clock.detach()
        self._watch.detach()
        self._mark(())
        self._removed = True

    def swap(self, path_or_fusion: str | os.PathLike[str] | Fusion) -> None:
        """Put another fusion in this one's place; weights of slots with the same name stay.

        Raises:
            the errors of :func:`apply_fusion`; the fusion that was applied then still is.
        """
        self._require_applied()
        fusion = _fusion(path_or_fusion)
        kept = self._pristine.paths
        try:
            names, mode = self._prepare(fusion)
        except BaseException:
            self._pristine.forget(set(self._pristine.paths) - set(kept))
            raise
        before = self._fusion, self._mode, self._weights
        self._pristine.restore(set(self._mode.paths) - set(mode.paths))
        self._fusion, self._mode = fusion, mode
        self._weights = {s: w for s, w in self._weights.items() if s in fusion.slots}
        try:
            if self._enabled:
                self._write()
        except BaseException:
            self._fusion, self._mode, self._weights = before
            self._pristine.forget(set(self._pristine.paths) - set(kept))
            self._write()
            raise
        self._pristine.forget(set(self._pristine.paths) - set(mode.paths))
        self._mark(names)

    def set(self, weights: Mapping[str, float] | None = None, /, **named: float) -> None:
        """Change how strongly slots act: ``handle.set(content=0.8)``. Others stay.

        Args:
            weights: slot name -> factor, for slot names that are not Python names.
            named: the same as keywords.

        Raises:
            ConfigError: an unknown slot or a factor that is not finite; nothing was changed.
        """
        self._require_applied()
        changed = _checked_weights(self._fusion, {**(weights or {}), **named})
        self._weights = {**self._weights, **changed}
        if self._enabled:
            self._write()

    @property
    def enabled(self) -> bool:
        """Whether the fusion acts. False gives the bare model, to the bit; True brings it back."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._require_applied()
        if value == self._enabled:
            return
        if value:
            self._write()
        else:
            self._pristine.restore(self._mode.paths)
        self._enabled = value

    def report(self) -> Report:
        """Mode, layers, rounding and memory. Measures the rounding anew, so it takes a while."""
        self._require_applied()
        acting = [e for e in self._fusion.entries if e.acts and e.component in self._components]
        return Report(
            mode=self._mode.name,
            why="every weight is a plain dense tensor",
            layers=dict(Counter(entry.fate for entry in acting)),
            components=self._components,
            switches=self._mode.switches,
            weights={slot: self._weights.get(slot, 1.0) for slot in self._fusion.slots},
            enabled=self._enabled,
            progress=self._clock.progress,
            rounding=self._mode.rounding(self._weights),
            bytes_pristine=self._pristine.nbytes_by_place(),
            bytes_factors=self._mode.nbytes,
        )

    def _prepare(self, fusion: Fusion) -> tuple[tuple[str, ...], Merge]:
        """Check everything about ``fusion`` on this pipeline and allocate; change no weight."""
        names = chosen_components(fusion, self._asked_components)
        targets = find_targets(self._pipe, fusion, names, owner=id(self))
        _check_scheduler(self._pipe, fusion, names)
        return names, Merge(targets, self._pristine)

    def _mark(self, names: tuple[str, ...]) -> None:
        """Say on the components themselves, which other pipelines may share, who is on them."""
        for name in self._components:
            delattr(original_module(getattr(self._pipe, name)), APPLIED_MARK)
        for name in names:
            setattr(original_module(getattr(self._pipe, name)), APPLIED_MARK, id(self))
        self._components = self._watch.components = names

    def _follow(self, scheduler: Any) -> None:
        self._clock.attach(scheduler)

    def _on_progress(self, progress: float) -> None:
        if self._enabled:
            self._mode.move(progress, self._weights)

    def _write(self) -> None:
        """Write every layer for the present progress; where that fails, restore the base."""
        try:
            self._mode.write(self._clock.progress or 0.0, self._weights)
        except BaseException:
            self._pristine.restore(self._mode.paths)
            self._clock.progress = None  # so that the next step writes again
            raise

    def _require_applied(self) -> None:
        if self._removed:
            raise InUseError("this fusion was removed from its pipeline; apply it again.")


def _fusion(path_or_fusion: str | os.PathLike[str] | Fusion) -> Fusion:
    return path_or_fusion if isinstance(path_or_fusion, Fusion) else load_fusion(path_or_fusion)


def _checked_weights(fusion: Fusion, weights: Mapping[str, float]) -> dict[str, float]:
    for slot, weight in weights.items():
        if slot not in fusion.slots:
            raise ConfigError(
                f"there is no slot {shown(slot)}; this fusion has {', '.join(fusion.slots)}."
            )
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ConfigError(f"weight of {slot}: expected a finite number, found {weight!r}.")
    return {slot: float(weight) for slot, weight in weights.items()}


def _check_scheduler(pipe: Any, fusion: Fusion, components: Sequence[str]) -> None:
    switching = any(
        entry.acts and entry.timeline.switches and entry.component in components
        for entry in fusion.entries
    )
    if switching and getattr(pipe, "scheduler", None) is None:
        raise IncompatibleModelError(
            f"{type(pipe).__name__} has no pipe.scheduler, and the fusion switches layers by it; "
            "use a pipeline with one scheduler."
        )
