"""Acting: fusions on ComfyUI's model, while a sampler runs and at no other time.

    SAMPLER_SAMPLE  -> rehearse the sampler, put the fusions on the model, take them off at the end
    PREDICT_NOISE   -> the next evaluation begins: move to the progress of its step
    inject, eject   -> ComfyUI is about to change weights in the middle of a run: go, and come back

All fusions of one model act together, as one fusion of joined layers (`layers.joining`). Weights of
layers stay untouched; each layer adds to its output (mode ``branch``). ComfyUI may quantise, cast
and offload weights, and other nodes may patch them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule
from klora_runtime.errors import ConfigError, IncompatibleModelError, InUseError, KloraError
from klora_runtime.layers.branch import Branch
from klora_runtime.layers.claim import mark_of, refuse_claimed
from klora_runtime.layers.freezing import refuse_freezing
from klora_runtime.layers.hindrances import branch_hindrances
from klora_runtime.layers.host import Casting, Host
from klora_runtime.layers.joining import Part, joined_entry
from klora_runtime.layers.live_fusion import LiveFusion
from klora_runtime.layers.targets import find_targets, refuse

from .clock import Stretch, progress_of_steps, warn_of_a_part
from .names import Place, components_of, places_in
from .rehearsal import Rehearsal, rehearse, sigma_of

#: The key of everything that klora puts on a ``ModelPatcher``.
KEY = "klora"

#: The denoiser, in the names of errors.
_COMPONENT = "model"


@dataclass(frozen=True)
class Applied:
    """One artifact on a model, as a node was told."""

    fusion: Fusion
    weights: Mapping[str, float] = field(default_factory=dict)
    """Slot -> factor on its deltas; a missing slot has 1."""
    stretch: Stretch = field(default_factory=Stretch)
    denoiser: str = "auto"
    """See :func:`~.names.components_of`."""


class ComfyHost(Host):
    """What ComfyUI does to the modules of a model.

    Args:
        patcher: the ``ModelPatcher`` that loads the model.
    """

    def __init__(self, patcher: Any) -> None:
        self._device = patcher.load_device
        self._cast = getattr(patcher.model, "manual_cast_dtype", None)

    def device(self, lineage: Sequence[nn.Module]) -> torch.device | None:
        """See :meth:`Host.device`: weights that are offloaded go to the input's device."""
        return self._device

    def casting(self, module: nn.Module) -> Casting | None:
        """See :meth:`Host.casting`."""
        return None if self._cast is None else Casting(self._cast, "ComfyUI's casting")

    def offloads(self, model: nn.Module) -> bool:
        """See :meth:`Host.offloads`."""
        return True


class Stage:
    """All fusions of one model, and what they do in a run.

    Args:
        applied: the fusions, in the order of their nodes.
        places: for each of them, the parameters that it changes.
    """

    def __init__(self, applied: Sequence[Applied], places: Sequence[Sequence[Place]]) -> None:
        self.applied = tuple(applied)
        self._places = tuple(places)
        self._joined: Fusion | None = None
        self._run: _Run | None = None

    def also(self, applied: Applied, places: Sequence[Place]) -> Stage:
        """Return a stage with one fusion more; this one stays as it is."""
        clocks = {each.fusion.clock for each in (*self.applied, applied)}
        if len(clocks) > 1:
            raise ConfigError(
                "the artifacts on one model must follow one clock, and these follow step and "
                "noise. Give one of them the other clock: klora recompile FILE -o NEW --clock step."
            )
        stretches = {each.stretch for each in (*self.applied, applied)}
        if len(stretches) > 1 and clocks == {"step"}:
            raise ConfigError(
                "the artifacts on one model are for the same run. Set steps and start_at_step to "
                "the same numbers in each of their nodes."
            )
        return Stage((*self.applied, applied), (*self._places, places))

    @property
    def joined(self) -> Fusion:
        """All fusions as one, in the names of the model."""
        if self._joined is None:
            self._joined = _joined(self.applied, self._places)
        return self._joined

    def sampler_sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: Mapping[str, Any],
        callback: Any,
        noise: torch.Tensor,
        *others: Any,
        **named: Any,
    ) -> Any:
        """Sample with the fusions; a wrapper for ``SAMPLER_SAMPLE``."""
        if self._run is not None:
            raise InUseError("a sampler with this fusion runs already; wait for its end.")
        sampling = guider.model_patcher.get_model_object("model_sampling")
        rehearsal = rehearse(executor.class_obj, guider, sigmas, extra_args, noise)
        first = self.applied[0]
        warn_of_a_part(rehearsal, first.fusion.clock, first.stretch, sampling)
        progress = progress_of_steps(rehearsal, first.fusion.clock, first.stretch, sampling)
        self._run = _Run(self.joined, guider.model_patcher, rehearsal, progress)
        try:
            self._run.enter()
            return executor(guider, sigmas, extra_args, callback, noise, *others, **named)
        finally:
            run, self._run = self._run, None
            run.leave()

    def predict_noise(
        self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        """Move to the progress of this evaluation; a wrapper for ``PREDICT_NOISE``."""
        if self._run is not None:
            self._run.evaluate(sigma_of(timestep))
        return executor(x, timestep, *others, **named)

    def inject(self, patcher: Any) -> None:
        """Put the fusions back on the model in the middle of a run."""
        if self._run is not None:
            self._run.enter()

    def eject(self, patcher: Any) -> None:
        """Take the fusions off the model; does nothing outside a run."""
        if self._run is not None:
            self._run.leave()


class _Run:
    """One run of a sampler with a fusion."""

    def __init__(
        self, fusion: Fusion, patcher: Any, rehearsal: Rehearsal, progress: Sequence[float]
    ) -> None:
        self._fusion = fusion
        self._patcher = patcher
        self._rehearsal = rehearsal
        self._progress = progress
        self._next = 0
        self._now = progress[0] if progress else 0.0
        self._live: LiveFusion | None = None
        self._model: nn.Module | None = None

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The denoiser, while it carries the fusion."""
        return () if self._model is None else (self._model,)

    def enter(self) -> None:
        """Put the fusion on the denoiser; a second call does nothing."""
        if self._live is not None:
            return
        model = self._patcher.model.diffusion_model
        models = {_COMPONENT: model}
        refuse_claimed(models, self)
        refuse_freezing(models.values())
        targets = find_targets(models, self._fusion, ComfyHost(self._patcher))
        live = LiveFusion(self._fusion, Branch(targets), {})
        try:
            live.write()
            live.move(self._now)
        except BaseException:
            with suppress(KloraError):
                live.release()
            raise
        self._live, self._model = live, model
        vars(model).update(mark_of(self))

    def leave(self) -> None:
        """Take the fusion off the denoiser, which is bare then to the bit."""
        live, model = self._live, self._model
        if live is None or model is None:
            return
        live.release()
        self._live = self._model = None
        for name in mark_of(self):
            vars(model).pop(name, None)

    def evaluate(self, sigma: float) -> None:
        """Move to the step of the next evaluation, which is at this noise level."""
        evaluations = self._rehearsal.evaluations
        known = evaluations[self._next] if self._next < len(evaluations) else None
        if known is None or not known.is_at(sigma):
            expected = "no more" if known is None else f"noise level {known.sigma:.4g}"
            raise IncompatibleModelError(
                f"klora cannot follow the sampler {self._rehearsal.sampler}: its evaluation "
                f"{self._next + 1} is at noise level {sigma:.4g}, and in a rehearsal it was "
                f"{expected}. Use another sampler, such as euler."
            )
        self._next += 1
        self._now = self._progress[known.step]
        if self._live is not None:
            self._live.move(self._now)


def apply_to(patcher: Any, applied: Applied) -> Any:
    """Return a clone of a ``ModelPatcher`` on which a fusion acts whenever a sampler runs.

    Everything is checked here; nothing changes before a run.

    Raises:
        IncompatibleModelError: the fusion does not fit the model; ``issues`` lists every layer.
        ConfigError: a setting contradicts the artifact, or another artifact on the model.
    """
    if applied.fusion.is_thin:
        raise ConfigError(
            "the artifact is thin: the numbers of its LoRAs are in their files. Compile it again "
            "without --thin."
        )
    components = components_of(applied.fusion, applied.denoiser)
    places = places_in(patcher.model, applied.fusion, components)
    if not places:
        return patcher.clone()
    new = patcher.clone()
    before = new.get_attachment(KEY)
    stage = (before or Stage((), ())).also(applied, places)
    targets = find_targets(
        {_COMPONENT: patcher.model.diffusion_model}, stage.joined, ComfyHost(patcher)
    )
    refuse(branch_hindrances(targets), "klora cannot act on these layers; nothing was changed.")
    _attach(new, stage)
    return new


def _attach(patcher: Any, stage: Stage) -> None:
    """Let a stage follow a patcher; another stage on it ends."""
    from comfy.patcher_extension import PatcherInjection, WrappersMP

    wrappers: Mapping[str, Callable[..., Any]] = {
        WrappersMP.SAMPLER_SAMPLE: stage.sampler_sample,
        WrappersMP.PREDICT_NOISE: stage.predict_noise,
    }
    for kind, wrapper in wrappers.items():
        patcher.remove_wrappers_with_key(kind, KEY)
        patcher.add_wrapper_with_key(kind, KEY, wrapper)
    patcher.set_injections(KEY, [PatcherInjection(inject=stage.inject, eject=stage.eject)])
    patcher.set_attachments(KEY, stage)


def _joined(applied: Sequence[Applied], places: Sequence[Sequence[Place]]) -> Fusion:
    """Return the fusions as one, in which each parameter of the model has one entry."""
    parts: dict[tuple[str, str], list[Part]] = {}
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for each, own in zip(applied, places, strict=True):
        for place in own:
            key = place.module, place.parameter
            shapes[key] = place.shape
            parts.setdefault(key, []).extend(
                Part(entry, rows, each.weights) for entry, rows in place.layers
            )
    entries: list[Entry] = [
        joined_entry(_COMPONENT, module, parameter, shapes[module, parameter], own)
        for (module, parameter), own in sorted(parts.items())
    ]
    first = applied[0].fusion
    return Fusion({}, {}, Rule(KEY, {}, {}), None, tuple(entries), first.tool, clock=first.clock)
