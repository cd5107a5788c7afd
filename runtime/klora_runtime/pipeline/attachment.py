"""The connection of a fusion and one pipeline: watches, the clock, and reactions to their events.

scheduler  -> Clock           -> progress            -> LiveFusion.move
component  -> ComponentWatch  -> it is about to run   -> check: does the clock's scheduler run?
pipeline   -> PipelineWatch   -> a generation begins  -> check: is every layer in place?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.schedule import STEPLESS
from klora_runtime.errors import IncompatibleModelError, KloraError
from klora_runtime.layers.claim import Claimant, refuse_claimed
from klora_runtime.layers.freezing import refuse_freezing
from klora_runtime.layers.live_fusion import LiveFusion
from klora_runtime.layers.mode import Mode
from klora_runtime.layers.module_tree import original_module
from klora_runtime.layers.targets import (
    Target,
    chosen_components,
    find_targets,
    without_missing,
)
from klora_runtime.pipeline.base_files import Base
from klora_runtime.pipeline.clock import Clock
from klora_runtime.pipeline.component_watch import ComponentWatch
from klora_runtime.pipeline.components import models_in, refuse_adapters
from klora_runtime.pipeline.host import PipelineHost
from klora_runtime.pipeline.occupancy import Occupancy
from klora_runtime.pipeline.pipeline_watch import PipelineWatch
from klora_runtime.pipeline.refusals import refuse_lora_scale

#: What to do with layers that the model lacks.
MISSING = ("error", "skip")


@dataclass(frozen=True)
class Fit:
    """A fusion and its layers in a pipeline."""

    fusion: Fusion
    """The fusion, without the layers that were left out."""
    layers: list[Target]
    missing: tuple[str, ...]
    """Names of the layers that were left out, because the model lacks them."""


def fit(
    pipe: Any,
    fusion: Fusion,
    components: Sequence[str] | None,
    owner: Claimant,
    *,
    skip_missing: bool = False,
    base: Base = None,
) -> Fit:
    """Find and check the layers of a fusion in a pipeline; change nothing.

    Args:
        pipe: a diffusers pipeline.
        components: components to search; None for all of the fusion's.
        owner: a handle whose own fusion may be on the components.
        skip_missing: whether layers that the model lacks are left out; if not, they are refused.
        base: the files that the pipeline was loaded from, see :data:`Base`.

    Raises:
        ConfigError: the fusion has no such component.
        InUseError: a component carries another fusion.
        IncompatibleModelError: the fusion does not fit the pipeline.
    """
    names = chosen_components(fusion, components)
    models = models_in(pipe, names)
    refuse_claimed(models, owner)
    refuse_adapters(models)
    host, missing = PipelineHost(base), tuple[str, ...]()
    if skip_missing:
        fusion, missing = without_missing(models, fusion, host)
    targets = find_targets(models, fusion, host)
    refuse_freezing(getattr(pipe, name) for name in names)
    if _switches(fusion, *names) and getattr(pipe, "scheduler", None) is None:
        raise IncompatibleModelError(
            f"{type(pipe).__name__} has no pipe.scheduler, and the fusion switches "
            "layers by it; use a pipeline with one scheduler."
        )
    return Fit(fusion, targets, missing)


class Attachment:
    """The connection of a live fusion and a pipeline, from :meth:`take_hold` to :meth:`let_go`.

    Args:
        pipe: the pipeline.
        live: the fusion on layers of this pipeline.
        components: components to change; None for all of the fusion's.
        owner: the handle; it lives as long as the pipeline carries the fusion.
        skip_missing: see :func:`fit`.
        base: see :func:`fit`.
    """

    def __init__(
        self,
        pipe: Any,
        live: LiveFusion,
        components: Sequence[str] | None,
        owner: Claimant,
        *,
        skip_missing: bool = False,
        base: Base = None,
    ) -> None:
        self._pipe: Any = pipe  # None: let go
        self._live = live
        self._asked = components
        self._skip_missing = skip_missing
        self._base = base
        self._owner: Any = owner  # None: let go
        self._rechecked = False
        self._unconfirmed: set[nn.Module] = set()  # components that have not run since the check
        self._component_watches: dict[str, ComponentWatch] = {}
        self._occupancy = Occupancy()
        self._clock = Clock(live.move, self._occupancy, self._on_loop)
        self._pipeline_watch = PipelineWatch(pipe, self)

    @property
    def pipe(self) -> Any:
        """The pipeline; None once the fusion was removed."""
        return self._pipe

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that carry the fusion."""
        return tuple(self._component_watches)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The modules of these components."""
        return tuple(watch.model for watch in self._component_watches.values())

    @property
    def mode(self) -> Mode:
        """The mode in which the fusion acts."""
        return self._live.mode

    @property
    def progress(self) -> float | None:
        """Progress of the step that runs now or ran last; None before the first step."""
        return self._clock.progress

    def fit(self, fusion: Fusion) -> Fit:
        """See :func:`fit`."""
        return fit(
            self._pipe,
            fusion,
            self._asked,
            self._owner,
            skip_missing=self._skip_missing,
            base=self._base,
        )

    def take_hold(self, fusion: Fusion) -> None:
        """Follow the scheduler, and watch the pipeline and the components of this fusion."""
        self._let_go_of_components()
        self._clock.name = fusion.clock
        for name in chosen_components(fusion, self._asked):
            model = original_module(getattr(self._pipe, name))
            timed = name not in STEPLESS and _switches(fusion, name)
            on_evaluation = self._on_evaluation if timed else None
            watch = ComponentWatch(
                model,
                self._owner,
                lambda: self._live.mode,
                on_evaluation,
                self._on_evaluated,
                self._on_converted,
                self.bare,
            )
            self._component_watches[name] = watch  # first, so that a failing attach is undone
            watch.attach()
            self.component_assigned(name)
        if _switches(fusion, *self.components):
            self._clock.attach(getattr(self._pipe, "scheduler", None))
        self._pipeline_watch.attach()

    def let_go(self) -> None:
        """Take everything off the pipeline for good, even if :meth:`take_hold` failed half-way."""
        self._clock.detach()
        self._pipeline_watch.detach()
        self._let_go_of_components()
        self._pipe = self._owner = None

    def change(self) -> AbstractContextManager[None]:
        """Return a context for a change of the fusion, during which no other thread samples.

        Raises:
            InUseError: another thread samples now.
        """
        return self._occupancy.change()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Make the model bare inside the block, in which no thread samples."""
        with self.change(), self._live.bare():
            yield

    @contextmanager
    def generation(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Wrap one call of the pipeline and check the layers; text encoders run before the loop."""
        with self._occupancy.call() as outermost:
            if not outermost:
                yield
                return
            if self._live.enabled:
                refuse_lora_scale(arguments)
            self._recheck()
            self._clock.rewind()
            self._rechecked = True
            try:
                yield
            finally:
                self._rechecked = False

    def scheduler_assigned(self, scheduler: Any) -> None:
        """Follow the new scheduler of the pipeline."""
        if _switches(self._live.fusion, *self.components):
            self._clock.attach(scheduler)

    def component_assigned(self, name: str) -> None:
        """Watch a component that was assigned; it is the same one as before, compiled or not."""
        held = getattr(self._pipe, name)
        watch = self._component_watches[name]
        if held is not watch.model:
            watch.observe(held)

    def _on_loop(self) -> None:
        """React to the begin of a loop. The call already checked the first loop of a generation."""
        if not self._rechecked:
            self._recheck()
        self._rechecked = False

    def _on_evaluation(self, timestep: Any) -> None:
        """React to the coming run of a component with layers that switch."""
        if self._live.enabled:
            self._clock.evaluate(timestep)

    def _on_evaluated(self, model: nn.Module) -> None:
        """React to the first run of a component: check that its layers acted."""
        if model in self._unconfirmed:
            self._unconfirmed.discard(model)
            self._live.mode.confirm(model)

    def _on_converted(self) -> None:
        """A component was moved or converted. What keeps the fusion from it stops the next run."""
        with suppress(KloraError):
            self._live.follow()

    def _recheck(self) -> None:
        """Check that the fusion can still act on its layers."""
        if self._live.enabled:
            refuse_freezing(getattr(self._pipe, name) for name in self.components)
            self._live.mode.check()
            self._unconfirmed = set(self.models)

    def _let_go_of_components(self) -> None:
        for watch in self._component_watches.values():
            watch.detach()
        self._component_watches = {}
        self._unconfirmed = set()


def _switches(fusion: Fusion, *components: str) -> bool:
    """Return whether a layer of these components ever switches and so needs a clock."""
    entries = (entry for entry in fusion.entries if entry.component in components)
    return any(entry.acts and entry.timeline.switches for entry in entries)
