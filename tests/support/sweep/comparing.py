"""What a fusion does in a pipeline, against K-LoRA recomputed at every evaluation."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from random_loras import random_lora
from reference import DENOISERS, KLora, sampling
from support.generation import LEAST_EFFECT, TOLERANCE
from support.sweep.pipelines import build, generate, pipeline_classes
from support.sweep.reasons import reason
from support.sweep.rounding import own_rounding
from tiny_pipeline import relative_difference
from torch import nn

from klora_compile import compile_fusion
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import KloraError

MODES = ("merge", "branch")
EQUAL = "equal"
WITHIN = "equal within the pipeline's own rounding"

#: Roundings of its weights that a mode may be away from the literal rule: its own, and those of
#: the activations that it adds up in another order.
ROUNDINGS = 4

#: A schedule that is one evaluation late must do this many times what rounding is allowed to do.
CLEARLY = 10


class _Remembering(KLora):
    """Computes once what is the same at every evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "top_k_sums", "delta"):
            setattr(self, name, functools.cache(getattr(self, name)))


@dataclass(frozen=True)
class Found:
    """How a pipeline class gets on with fusions."""

    pipeline: str
    built: str | None
    """Why it could not be built or called by the rules; None where it could."""
    modes: tuple[str, ...] = ()
    """For each mode ``equal``, perhaps within rounding, or why not."""


@dataclass(frozen=True)
class Literal:
    """What the literal rule gives, and how well a pipeline can be compared with it."""

    pipe: Any
    klora: KLora
    moments: tuple[float, ...]
    """The progress of each evaluation."""

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        return self._sampled(self.moments)

    @functools.cached_property
    def rounding(self) -> float:
        """How far rounding alone takes the pipeline; 0 where that would hide a wrong schedule."""
        rounding = own_rounding(denoisers_of(self.pipe), lambda: self._sampled(self.moments))
        late = self._sampled((self.moments[0], *self.moments[:-1]))
        shows = relative_difference(late, self.expected) >= CLEARLY * ROUNDINGS * rounding
        return rounding if shows else 0.0

    def verdict(self, found: torch.Tensor) -> str:
        """Whether a mode gave what the literal rule gives."""
        difference = relative_difference(found, self.expected)
        if difference <= TOLERANCE:
            return EQUAL
        if difference <= ROUNDINGS * self.rounding:
            return f"{WITHIN} ({self.rounding:.0e})"
        return f"differs by {difference:.0e}"

    def _sampled(self, moments: tuple[float, ...]) -> torch.Tensor:
        with sampling(self.pipe, self.klora, moments, adapted(self.pipe)):
            return generate(self.pipe)


def look_at(name: str) -> Found:
    """Build a pipeline class, and sample with a fusion in each mode."""
    kind = pipeline_classes()[name]
    if why := reason(kind):
        return Found(name, why)
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            pipe = build(kind)
            generate(pipe)  # leaves attributes on pipelines and schedulers
            with recorded(pipe, moments):
                bare = generate(pipe)
            files = [
                _lora(pipe, Path(folder) / f"{rank}.safetensors", seed=rank, rank=rank)
                for rank in (4, 3)
            ]
            literal = Literal(pipe, _Remembering(*files), tuple(moments))
            expected = literal.expected if moments else None
        except Exception as error:  # whatever diffusers raises where the rules do not fit
            said = f"not buildable: {type(error).__name__}: {error}"
            return Found(name, " ".join(said.split())[:160])
        fusion = compile_fusion(*files, device="cpu")
        if expected is None:
            return Found(name, None, tuple(_refused(pipe, fusion, mode) for mode in MODES))
        if not expected.isfinite().all():
            return Found(name, "not compared: its latents are not finite")
        if not relative_difference(expected, bare) >= LEAST_EFFECT:
            return Found(name, "not compared: its LoRAs change too little to compare")
        if not _switches(fusion, moments):
            return Found(name, "not compared: no layer switches while it is sampled")
        return Found(name, None, tuple(_in_mode(pipe, fusion, m, literal, bare) for m in MODES))


def adapted(pipe: Any) -> list[str]:
    """Name the denoisers that the scheduler of a pipeline steps, in order.

    Others, as priors of images' embeddings, have a scheduler of their own, as ``prior_scheduler``.
    """
    names = [name for name in DENOISERS if getattr(pipe, name, None) is not None]
    if getattr(pipe, "scheduler", None) is None:
        return names
    return [n for n in names if not hasattr(pipe, f"{n.partition('_')[0]}_scheduler")]


def _lora(pipe: Any, path: Path, *, seed: int, rank: int) -> Path:
    """On all linear layers and convolutions of its denoisers, and of its CLIP."""
    models = {
        name: model
        for name, model in pipe.components.items()
        if isinstance(model, nn.Module) and (name in adapted(pipe) or _is_clip(name, model))
    }
    return random_lora(models, path, lambda _: True, seed=seed, rank=rank, strength=0.5)


def _is_clip(name: str, model: nn.Module) -> bool:
    return name.startswith("text_encoder") and "CLIPText" in type(model).__name__


def _switches(fusion: Fusion, moments: list[float]) -> bool:
    """Whether a layer of a denoiser changes its LoRA between the first evaluation and the last."""
    first, last = min(moments), max(moments)
    return any(
        first < moment <= last
        for entry in fusion.entries
        if entry.component in DENOISERS
        for moment in entry.timeline.starts
    )


def _in_mode(pipe: Any, fusion: Fusion, mode: str, literal: Literal, bare: Any) -> str:
    try:
        with apply_fusion(pipe, fusion, mode=mode):
            found = generate(pipe)
    except KloraError as error:
        return f"refused: {error}".splitlines()[0]
    except Exception as error:  # a fault, to be seen in the table
        return f"raises {type(error).__name__}: {error}".splitlines()[0]
    again = relative_difference(generate(pipe), bare)
    verdict = literal.verdict(found)
    if again != 0 and verdict.startswith(EQUAL):
        return f"leaves {again:.0e} behind"
    return verdict


def _refused(pipe: Any, fusion: Fusion, mode: str) -> str:
    """What a mode says where nothing tells the steps of a pipeline, so that none could be right."""
    try:
        with apply_fusion(pipe, fusion, mode=mode):
            generate(pipe)
    except KloraError as error:
        return f"refused: {error}".splitlines()[0]
    return "not refused, though nothing tells its steps"


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """The models whose evaluations are compared."""
    return [getattr(pipe, name) for name in adapted(pipe)]


def _steps(scheduler: Any) -> int:
    """All that a loop can do; some schedulers list the end of the last step too."""
    ends = type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler")
    return len(scheduler.timesteps) - ends


@contextmanager
def recorded(pipe: Any, moments: list[float]) -> Iterator[None]:
    """Write down the progress of every evaluation of a denoiser.

    A step is over when ``scheduler.step`` follows an evaluation, however often it is called. A
    timestep that comes again, as where a loop goes back, is the same step. An evaluation between
    two runs through the schedule, as between chunks of a video, is at its end, after the last step.
    What begins where no timestep tells ends at the end of the schedule. A sampler
    of order 2 evaluates twice within a step. Nothing is written where no ``step`` tells.
    """
    scheduler = type(getattr(pipe, "scheduler", None))
    if not hasattr(scheduler, "step"):
        yield
        return
    step, restart = scheduler.step, scheduler.set_timesteps
    places: dict[Any, int] = {}  # of the steps that were done, in order
    at: list[int | None] = []  # None: the end of the schedule
    waiting = total = 0
    begun: int | None = None
    order = max(1, int(getattr(scheduler, "order", 1)))

    def evaluating(*_: Any) -> None:
        nonlocal waiting
        waiting += 1

    @functools.wraps(step)  # pipelines look at its signature
    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal waiting, total, begun
        if waiting:
            key = _key(self, *args, **kwargs)
            if not places and not isinstance(key, _Once):
                begun = torch.as_tensor(self.timesteps).tolist().index(key)
            place = places.setdefault(key, len(places))
            at.extend([place] * waiting)
        waiting, total = 0, _steps(self)
        return step(self, *args, **kwargs)

    @functools.wraps(restart)  # pipelines look at its signature
    def restarting(*args: Any, **kwargs: Any) -> Any:
        nonlocal waiting
        if places:
            at.extend([None] * waiting)
            waiting = 0
        return restart(*args, **kwargs)

    hooks = [model.register_forward_pre_hook(evaluating) for model in denoisers_of(pipe)]
    try:
        with patch.multiple(scheduler, step=stepping, set_timesteps=restarting):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    if not places:
        return
    at.extend([len(places)] * waiting)
    first = total - len(places) if begun is None else begun
    moments += [
        1.0 if place is None else ((first + place) // order + 0.5) / -(-total // order)
        for place in at
    ]


class _Once:
    """A step that is like no other."""


def _key(scheduler: Any, _: Any = None, timestep: Any = None, *__: Any, **___: Any) -> Any:
    """Name a step by its timestep, where the schedule has it once; else no other step is like it.

    The other arguments are those of ``step``: what the denoiser said comes first.
    """
    listed = torch.as_tensor(scheduler.timesteps).tolist()
    if isinstance(timestep, torch.Tensor):
        timestep = timestep.tolist()
    return timestep if listed.count(timestep) == 1 else _Once()
