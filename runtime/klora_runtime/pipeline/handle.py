"""Applying a fusion to a pipeline, and the handle that changes or undoes it.

Order of everything in here: check all, allocate all, then change; where a change fails, every
weight goes back to the base.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import nn

from klora_runtime.artifact.file import load_fusion
from klora_runtime.artifact.fusion import TEXT_ENCODERS, Fusion
from klora_runtime.artifact.references import complete
from klora_runtime.errors import ConfigError, IncompatibleModelError, InUseError, shown
from klora_runtime.layers.choice import MODES, choose, rounding_share
from klora_runtime.layers.freezing import refuse_freezing
from klora_runtime.layers.mode import Mode
from klora_runtime.layers.targets import Target, chosen_components, find_targets, original_module
from klora_runtime.pipeline.clock import Clock
from klora_runtime.pipeline.component_watch import ComponentWatch
from klora_runtime.pipeline.occupancy import Occupancy
from klora_runtime.pipeline.pipeline_watch import PipelineWatch
from klora_runtime.pipeline.refusals import refuse_lora_scale
from klora_runtime.pipeline.report import Report

#: Weights of slots lie within plus and minus this.
MAX_WEIGHT = 100.0


def apply_fusion(
    pipe: Any,
    path_or_fusion: str | os.PathLike[str] | Fusion,
    mode: str = "auto",
    *,
    components: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    sources: Mapping[str, str | os.PathLike[str]] | None = None,
    device: str | torch.device | None = None,
) -> FusionHandle:
    """Make a diffusers pipeline sample with a fusion. It stays an ordinary pipeline.

    Args:
        pipe: any diffusers pipeline with a scheduler.
        path_or_fusion: an artifact file, or one that :func:`load_fusion` has read.
        mode: ``merge`` writes base + delta into the live weights when something switches, and
            then costs nothing per step. ``branch`` leaves the base untouched and adds each
            layer's low-rank output, for weights that are quantised, offloaded, or too coarse to
            hold the delta. ``auto`` chooses; ``.report()`` says which and why.
        components: pipeline components to change; all of the fusion's by default.
        weights: slot name -> factor on its deltas, -100 to 100, on top of the fusion's own; 1 by
            default.
        sources: of a thin artifact, the LoRA files that it was compiled from:
            ``{"content": "fox.safetensors", "style": "ink.safetensors"}``.
        device: where the factors of a path are kept, see :func:`load_fusion`; host memory by
            default. Leave it out with a fusion that is loaded.

    Returns:
        The handle: remove, swap, set, enable and report. Also a context manager.

    Raises:
        ArtifactError: the file breaks the format, or a source is missing or another file.
        ConfigError: an unknown mode, component, slot, source or device, or a weight out of range.
        IncompatibleModelError: the fusion does not fit the pipeline; nothing was changed.
        InUseError: the pipeline carries a fusion already.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    fusion = _loaded(path_or_fusion, sources, device)
    return FusionHandle(pipe, fusion, mode, components, {} if weights is None else weights)


class FusionHandle:
    """A fusion on a pipeline. Made by :func:`apply_fusion`; use as a context manager or keep it."""

    def __init__(
        self,
        pipe: Any,
        fusion: Fusion,
        mode: str,
        components: Sequence[str] | None,
        weights: Mapping[str, float],
    ) -> None:
        self._pipe = pipe
        self._asked_components = components
        self._fusion = fusion
        self._weights = _checked_weights(fusion, weights)
        self._carriers: dict[str, ComponentWatch] = {}
        self._enabled = True
        self._removed = False
        self._rechecked = False
        self._occupancy = Occupancy()
        self._watch = PipelineWatch(
            pipe, self._occupancy, self._follow, self._observe, self._generation, self._bare
        )
        self._clock = Clock(self._on_progress, self._occupancy, self._on_begin)
        self._mode: Mode
        self._mode, self._why = choose(mode, self._find(fusion), self._weights)
        try:
            self._take_hold()
            self._write()
        except BaseException:
            self._let_go()
            raise

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

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The component modules that carry it."""
        return tuple(carrier.model for carrier in self._carriers.values())

    def remove(self) -> None:
        """Give every parameter back to the bit and take everything off the pipeline.

        Removing twice is removing once.

        Raises:
            InUseError: another thread is generating, or a layer is out of reach; nothing was
                changed, the fusion is still applied.
        """
        if self._removed:
            return
        with self._occupancy.change():
            self._let_go()

    def swap(
        self,
        path_or_fusion: str | os.PathLike[str] | Fusion,
        *,
        sources: Mapping[str, str | os.PathLike[str]] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Put another fusion in this one's place; weights of slots with the same name stay.

        Args:
            path_or_fusion: the other one.
            sources, device: as of :func:`apply_fusion`.

        Raises:
            the errors of :func:`apply_fusion`; the fusion that was applied then still is.
        """
        self._require_applied()
        fusion = _loaded(path_or_fusion, sources, device)
        with self._occupancy.change():
            mode = self._mode.successor(self._find(fusion))
            with self._as_it_was_on_failure():
                self._mode.yield_to(mode)
                self._fusion, self._mode = fusion, mode
                self._weights = {s: w for s, w in self._weights.items() if s in fusion.slots}
                self._take_hold()
                if self._enabled:
                    self._write()
        self._why = "kept at a swap, which never changes the mode"

    def set(self, weights: Mapping[str, float] | None = None, /, **named: float) -> None:
        """Change how strongly slots act: ``handle.set(content=0.8)``. Others stay.

        Args:
            weights: slot name -> factor, -100 to 100, for slot names that are not Python names.
            named: the same as keywords.

        Raises:
            ConfigError: an unknown slot or a factor out of range; nothing was changed.
            InUseError: another thread is generating.
        """
        self._require_applied()
        given = {} if weights is None else weights
        changed = _checked_weights(self._fusion, given) | _checked_weights(self._fusion, named)
        with self._occupancy.change(), self._as_it_was_on_failure():
            self._weights = self._weights | changed
            if self._enabled:
                self._write()

    @property
    def enabled(self) -> bool:
        """Whether the fusion acts. False gives the bare model, to the bit; True brings it back."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._require_applied()
        if not isinstance(value, bool):
            raise ConfigError(f"enabled={value!r}: expected True or False.")
        with self._occupancy.change():
            if value == self._enabled:
                return
            if value:
                self._write()
            else:
                self._pause()
            self._enabled = value

    def report(self) -> Report:
        """Mode, layers, rounding and memory. Measures the rounding anew, so it takes a while."""
        self._require_applied()
        rounding = list(self._mode.rounding(self._weights))
        acting = [e for e in self._fusion.entries if e.acts and e.component in self._carriers]
        return Report(
            mode=self._mode.name,
            why=self._why,
            layers=dict(Counter(entry.fate for entry in acting)),
            components=tuple(self._carriers),
            switches=self._mode.switches,
            weights={slot: self._weights.get(slot, 1.0) for slot in self._fusion.slots},
            enabled=self._enabled,
            progress=self._clock.progress,
            rounding=rounding_share(rounding),
            worst_rounding=max(
                ((part[0], rounding_share([part])) for part in rounding), key=lambda pair: pair[1]
            ),
            nbytes=self._mode.nbytes(),
        )

    def _names(self, fusion: Fusion) -> tuple[str, ...]:
        return chosen_components(fusion, self._asked_components)

    def _switches(self, fusion: Fusion, *names: str) -> bool:
        """Whether a layer of these (or the chosen) components ever switches: a clock is needed."""
        components = names or self._names(fusion)
        entries = (entry for entry in fusion.entries if entry.component in components)
        return any(entry.acts and entry.timeline.switches for entry in entries)

    def _find(self, fusion: Fusion) -> list[Target]:
        """Check ``fusion`` against this pipeline and find its layers; change nothing."""
        targets = find_targets(self._pipe, fusion, self._names(fusion), owner=self)
        refuse_freezing(getattr(self._pipe, name) for name in self._names(fusion))
        if self._switches(fusion) and getattr(self._pipe, "scheduler", None) is None:
            raise IncompatibleModelError(
                f"{type(self._pipe).__name__} has no pipe.scheduler, and the fusion switches "
                "layers by it; use a pipeline with one scheduler."
            )
        return targets

    def _take_hold(self) -> None:
        """Follow the scheduler, watch the pipeline and its components."""
        self._let_go_of_components()
        for name in self._names(self._fusion):
            model = original_module(getattr(self._pipe, name))
            timed = name not in TEXT_ENCODERS and self._switches(self._fusion, name)
            on_evaluation = self._on_evaluation if timed else None
            self._carriers[name] = ComponentWatch(
                model, self, self._mode.name, on_evaluation, self._bare
            )
            self._observe(name)
        self._watch.components, self._watch.mode = tuple(self._carriers), self._mode.name
        self._follow(getattr(self._pipe, "scheduler", None))
        self._watch.attach()

    def _observe(self, name: str) -> None:
        """Observe what the pipeline holds as this component, where that is compiled around it."""
        held = getattr(self._pipe, name)
        if held is not self._carriers[name].model:
            self._carriers[name].observe(held)

    def _let_go_of_components(self) -> None:
        for carrier in self._carriers.values():
            carrier.detach()
        self._carriers = {}

    def _let_go(self) -> None:
        """Undo everything; also from the middle of :meth:`_take_hold`."""
        self._mode.release()
        self._clock.detach()
        self._watch.detach()
        self._let_go_of_components()
        self._pipe = None
        self._removed = True

    def _follow(self, scheduler: Any) -> None:
        if self._switches(self._fusion):
            self._clock.attach(scheduler)

    def _on_begin(self) -> None:
        """A run begins. The first one of a generation was checked when the call began."""
        if not self._rechecked:
            self._recheck()
        self._rechecked = False

    def _recheck(self) -> None:
        """See that nothing has come between the fusion and its layers."""
        if self._enabled:
            refuse_freezing(getattr(self._pipe, name) for name in self._carriers)
            self._mode.check()

    @contextmanager
    def _generation(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Around one generation of the pipeline; text encoders run before the scheduler does."""
        if self._enabled:
            refuse_lora_scale(arguments)
        self._recheck()
        self._clock.rewind()
        self._rechecked = True
        try:
            yield
        finally:
            self._rechecked = False

    def _on_evaluation(self, timestep: Any) -> None:
        """A component with layers that switch is about to run."""
        if self._enabled:
            self._clock.evaluate(timestep)

    def _on_progress(self, progress: float) -> None:
        if self._enabled:
            self._mode.move(progress, self._weights)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The bare model for a while, in which nobody samples."""
        with self._occupancy.change():
            enabled = self._enabled
            self.enabled = False
            try:
                yield
            finally:
                self.enabled = enabled

    @contextmanager
    def _as_it_was_on_failure(self) -> Iterator[None]:
        """Undo the changes of attributes and layers inside where they fail."""
        before = self._fusion, self._mode, self._weights, self._enabled
        try:
            yield
        except BaseException:
            failed = self._mode
            self._fusion, self._mode, self._weights, self._enabled = before
            if failed is not self._mode:
                failed.yield_to(self._mode)
                self._take_hold()
            if self._enabled:
                self._write()
            raise

    def _write(self) -> None:
        """Make every layer act for the present progress; where that fails, none acts any more."""
        try:
            self._mode.write(self._clock.progress or 0.0, self._weights)
        except InUseError:
            raise  # nothing was changed
        except BaseException:
            self._enabled = False
            self._mode.pause()
            raise

    def _pause(self) -> None:
        """Make every layer bare; where that is interrupted, none is."""
        try:
            self._mode.pause()
        except InUseError:
            raise  # nothing was changed
        except BaseException:
            self._write()
            raise

    def _require_applied(self) -> None:
        if self._removed:
            raise InUseError("this fusion was removed from its pipeline; apply it again.")


def _loaded(
    path_or_fusion: str | os.PathLike[str] | Fusion,
    sources: Mapping[str, str | os.PathLike[str]] | None,
    device: str | torch.device | None,
) -> Fusion:
    if not isinstance(path_or_fusion, Fusion):
        place = "cpu" if device is None else device
        return complete(load_fusion(path_or_fusion, device=place, sources=sources))
    if device is not None:
        raise ConfigError(
            f"device={str(device)!r} is for a path, and this fusion is loaded already; leave it "
            "out, or load the file with load_fusion(path, device=...)."
        )
    return complete(path_or_fusion, sources)


def _checked_weights(fusion: Fusion, weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise ConfigError(f"weights={weights!r}: expected slot names with a number each.")
    for slot, weight in weights.items():
        if slot not in fusion.slots:
            raise ConfigError(
                f"there is no slot {shown(slot)}; this fusion has {', '.join(fusion.slots)}."
            )
        if not isinstance(weight, Real) or not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"weight of {slot}: expected a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, "
                f"found {weight!r}."
            )
    return {slot: float(weight) for slot, weight in weights.items()}
