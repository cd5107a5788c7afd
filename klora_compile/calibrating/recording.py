"""Recording: what a pipeline's denoiser is asked, and answers, while it draws with one LoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from klora_compile.sampling.pictures import Request, arguments
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.schedule import STEPLESS
from klora_runtime.artifact.timeline import ClockName
from klora_runtime.errors import KloraError, shown
from klora_runtime.pipeline.clock import Clock
from klora_runtime.pipeline.components import models_in
from klora_runtime.pipeline.occupancy import Occupancy

#: Numbers of each weight that a digest takes.
_SAMPLE = 64


@dataclass(frozen=True)
class Call:
    """One call of a denoiser."""

    component: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: torch.Tensor
    """What the denoiser answered, with one LoRA alone."""
    progress: float
    """Progress of the sampling, in [0, 1]."""


def denoisers(pipe: Any, fusion: Fusion) -> dict[str, nn.Module]:
    """Return name -> model of the components with steps that a fusion changes."""
    return models_in(pipe, [name for name in fusion.components if name not in STEPLESS])


def weights_digest(models: Mapping[str, nn.Module]) -> str:
    """Return a digest of the names, shapes and some numbers of every weight of denoisers.

    It tells one base model from another in the time that reading a few numbers takes; weights of
    special classes, such as quantised ones, count by name and shape alone.
    """
    found = hashlib.sha256()
    for component, model in sorted(models.items()):
        for path, parameter in model.named_parameters():
            found.update(f"{component}.{path} {tuple(parameter.shape)}\n".encode())
            if type(parameter) is nn.Parameter and parameter.device.type != "meta":
                every = max(1, parameter.numel() // _SAMPLE)
                sample = parameter.detach().flatten()[::every].float().cpu()
                found.update(sample.numpy().tobytes())
    return found.hexdigest()


@contextmanager
def following(pipe: Any, name: ClockName) -> Iterator[Clock]:
    """Give a clock that follows the pipeline's scheduler inside the block.

    Args:
        name: what progress follows, ``step`` or ``noise``.

    Raises:
        IncompatibleModelError: the scheduler cannot be followed.
    """
    clock = Clock(_nothing, Occupancy())
    clock.name = name
    clock.attach(pipe.scheduler)
    try:
        yield clock
    finally:
        clock.detach()


def draw(pipe: Any, prompt: str, seed: int, call: Mapping[str, Any]) -> None:
    """Draw one picture, and stop before it is decoded if the pipeline can.

    Raises:
        ConfigError: the pipeline's call does not take an argument.
        KloraError: the pipeline failed.
    """
    request = Request((prompt,), seed, settings=call)
    given = arguments(pipe, request)
    if "output_type" in given:
        given["output_type"] = "latent"
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    try:
        pipe(prompt=prompt, generator=generator, **given)
    except KloraError:
        raise
    except Exception as error:  # pipelines raise many types
        why = shown(" ".join(str(error).split()) or type(error).__name__, limit=500)
        raise KloraError(
            f"{type(pipe).__name__} failed at prompt {shown(prompt)!r}, seed {seed}: "
            f"{type(error).__name__}: {why}"
        ) from error


@contextmanager
def listening(
    models: Mapping[str, nn.Module], on_call: Callable[[str, Any, Any, Any], None]
) -> Iterator[None]:
    """Call ``on_call(component, args, kwargs, output)`` after each call of a denoiser."""
    with ExitStack() as stack:
        for name, model in models.items():

            def heard(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                on_call(name, args, kwargs, output)

            hook = model.register_forward_hook(heard, with_kwargs=True)
            stack.callback(hook.remove)
        yield


@dataclass(frozen=True)
class Recorder:
    """Records the calls of a pipeline's denoisers, each tensor once."""

    pipe: Any
    models: Mapping[str, nn.Module]

    def record(self, clock: Clock, prompt: str, seed: int, call: Mapping[str, Any]) -> list[Call]:
        """Draw one picture and return the calls of the denoisers.

        Raises:
            KloraError: see :func:`draw`; or a denoiser was never called.
        """
        calls: list[Call] = []
        kept: dict[tuple[int, int], tuple[Any, Any]] = {}

        def on_call(name: str, args: Any, kwargs: Any, output: Any) -> None:
            progress = clock.progress
            held = _held(tuple(args), kept), _held(dict(kwargs), kept)
            answer = prediction(output).detach().clone()
            calls.append(Call(name, *held, answer, 1.0 if progress is None else progress))

        with listening(self.models, on_call):
            draw(self.pipe, prompt, seed, call)
        if not calls:
            raise KloraError(
                f"{type(self.pipe).__name__} did not call its {' or '.join(self.models)}, so "
                "nothing can be calibrated with it."
            )
        return calls


def prediction(output: Any) -> torch.Tensor:
    """Return the prediction in a denoiser's output.

    Raises:
        KloraError: there is none.
    """
    found = output
    if not isinstance(found, torch.Tensor):
        found = output[0] if isinstance(output, list | tuple) else getattr(output, "sample", None)
    if isinstance(found, list) and all(isinstance(each, torch.Tensor) for each in found):
        found = torch.stack(found)
    if not isinstance(found, torch.Tensor):
        raise KloraError(
            f"a denoiser gave a {type(output).__name__}, in which klora knows no prediction; "
            "calibrate with another pipeline."
        )
    return found


def _held(value: Any, kept: dict[tuple[int, int], tuple[Any, Any]]) -> Any:
    """Return a copy of nested arguments; a tensor that came before unchanged is copied once."""
    if isinstance(value, torch.Tensor):
        key = id(value), 0 if value.is_inference() else value._version
        if key not in kept:
            kept[key] = value, value.detach().clone()  # the original keeps its id taken
        return kept[key][1]
    if isinstance(value, dict):
        return {name: _held(each, kept) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_held(each, kept) for each in value)
    return value


def _nothing(_: float) -> None:
    """Do nothing: the recorder asks the clock when a call was made."""
